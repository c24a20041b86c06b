// Which kernel serves a call. Dispatch, the sentence of an unsupported call and the support table
// are all one table of kernels and one of features.
#pragma once

#include <limits>
#include <string>

#include "common/flash.h"

namespace flash {

enum class Operation { kMhaFwd, kMhaVarlenFwd, kMhaBwd, kMhaVarlenBwd, kMhaFwdKvcache, kCombine };

// What a call may ask for beside its operation, masks and grouped heads, which every kernel does.
enum Feature : uint32_t {
  kDropout = 1u << 0,
  kSoftcap = 1u << 1,
  kAlibi = 1u << 2,
  kSink = 1u << 3,
  kBias = 1u << 4,
  kUsedKeys = 1u << 5,
  kLeftPadding = 1u << 6,
  kCacheIndices = 1u << 7,
  kPagedKeys = 1u << 8,
  kAppend = 1u << 9,
  kRotary = 1u << 10,
  kSplits = 1u << 11,
  kDescale = 1u << 12,
  kBlockDescale = 1u << 13,
  kFp8Keys = 1u << 14,
  kWideOutput = 1u << 15,
  kFp8Features = kDescale | kBlockDescale | kFp8Keys | kWideOutput,
  kAllFeatures = (1u << 16) - 1,
};

struct KernelRequest {
  Operation operation;
  Target target;
  Dtype dtype;            // of q
  int64_t d, d_v;         // head dims of q and k, of v
  uint32_t features = 0;  // set of Feature
  // The device has tensor maps and they can describe q, k, v and out.
  bool has_tensor_maps = false;
};

// A checked call's.
KernelRequest request_of(Operation operation, const Flash_fwd_params& params);
KernelRequest request_of(Operation operation, const Flash_bwd_params& params);
KernelRequest request_of(Operation operation, const Combine_params& params);

// One row of the support table.
struct Kernel {
  Operation operation;
  flash_attn_device_type device_type;
  const char* backend;
  const char* isa;
  // Compute capabilities of the devices that run it.
  int min_capability = 0, max_capability = std::numeric_limits<int>::max();
  uint32_t dtypes;  // of q; bit i: the Dtype of value i
  int64_t max_d, max_d_v;
  uint32_t features;  // set of Feature
  bool needs_tensor_maps = false;
  // What its operation needs; the others are null.
  void (*mha_fwd)(const Flash_fwd_params&) = nullptr;
  void (*mha_bwd)(const Flash_bwd_params&) = nullptr;
  void (*combine)(const Combine_params&) = nullptr;
  // Bytes of workspace for a call; null: none.
  size_t (*fwd_workspace_bytes)(const Flash_fwd_params&) = nullptr;
  size_t (*bwd_workspace_bytes)(const Flash_bwd_params&) = nullptr;
};

bool serves(const Kernel& kernel, const KernelRequest& request);

// The kernel that runs `request` on this machine now. Throws ApiError(FLASH_ATTN_UNSUPPORTED), with
// a sentence that names what the best candidate lacks, if there is none.
const Kernel& select_kernel(const KernelRequest& request);

// One line a kernel: "backend isa operation dtypes head_dims".
std::string support_table();

}  // namespace flash
