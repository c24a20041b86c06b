// Which kernel serves a call. Dispatch, the sentence of an unsupported call and the support table
// are all this one table.
#pragma once

#include <string>

#include "common/flash.h"
#include "cpu/cpu_backend.h"
#include "flash_attn/flash_attn.h"

namespace flash {

enum class Operation { kMhaFwd, kMhaVarlenFwd, kMhaBwd, kMhaVarlenBwd, kMhaFwdKvcache, kCombine };

struct KernelRequest {
  Operation operation;
  flash_attn_device_type device_type;
  Dtype dtype;
  int64_t head_dim;  // the larger of d and dv
};

// One row of the support table.
struct Kernel {
  Operation operation;
  flash_attn_device_type device_type;
  const char* backend;
  const char* isa;
  uint32_t dtypes;  // bit i: the Dtype of value i
  int64_t max_head_dim;
  const cpu::Kernels* cpu;
};

// The kernel that runs `request` on this machine now. Throws ApiError(FLASH_ATTN_UNSUPPORTED) if
// there is none.
const Kernel& select_kernel(const KernelRequest& request);

// One line a kernel: "backend isa operation dtypes head_dims".
std::string support_table();

}  // namespace flash
