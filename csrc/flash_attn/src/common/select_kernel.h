// Which kernel serves a call. Dispatch, the sentence of an unsupported call and the support table
// are all this one table.
#pragma once

#include <string>

#include "common/flash.h"
#include "flash_attn/flash_attn.h"

namespace flash {

enum class Operation { kMhaFwd, kMhaVarlenFwd, kMhaBwd, kMhaVarlenBwd, kMhaFwdKvcache, kCombine };

// What a call may ask for beside its operation, masks and grouped heads, which every kernel does.
enum Feature : uint32_t {
  kDropout = 1u << 0,
  kSoftcap = 1u << 1,
  kAlibi = 1u << 2,
  kSink = 1u << 3,
  kBias = 1u << 4,
  kPagedKeys = 1u << 5,
  kAllFeatures = (1u << 6) - 1,
};

struct KernelRequest {
  Operation operation;
  flash_attn_device_type device_type;
  Dtype dtype;
  int64_t head_dim;       // the larger of d and dv
  uint32_t features = 0;  // set of Feature
};

// A checked call's.
uint32_t features_of(const Flash_fwd_params& params);

// One row of the support table.
struct Kernel {
  Operation operation;
  flash_attn_device_type device_type;
  const char* backend;
  const char* isa;
  uint32_t dtypes;  // bit i: the Dtype of value i
  int64_t max_head_dim;
  uint32_t features;  // set of Feature
  void (*mha_fwd)(const Flash_fwd_params&);
  void (*mha_bwd)(const Flash_bwd_params&);  // null where the backend has none
  void (*combine)(const Combine_params&);    // likewise
};

// The kernel that runs `request` on this machine now. Throws ApiError(FLASH_ATTN_UNSUPPORTED), with
// a sentence that names what is missing, if there is none.
const Kernel& select_kernel(const KernelRequest& request);

// How sentences begin that turn down what needs CUDA kernels.
inline constexpr const char* kNoCudaKernels =
    "this build of flash_attn has no CUDA kernels (FLASH_ATTN_CUDA=PYPI pip install . makes one "
    "that has)";

// One line a kernel: "backend isa operation dtypes head_dims".
std::string support_table();

}  // namespace flash
