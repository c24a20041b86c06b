#include "functions.h"

#include <algorithm>

#include "exec/register_limits.h"

namespace gpu_emulator::driver {
int max_threads_of(const Function& function, const Arch& arch) {
  const int bound = exec::bound_threads(function.code());
  return bound > 0 ? std::min(bound, arch.max_threads_per_block) : arch.max_threads_per_block;
}

uint64_t max_dynamic_shared_of(const Function& function, const Arch& arch) {
  if (function.max_dynamic_shared >= 0) return static_cast<uint64_t>(function.max_dynamic_shared);
  const auto limit = static_cast<uint64_t>(arch.shared_per_block);
  return limit - std::min<uint64_t>(limit, function.code().shared_bytes);
}

Occupancy occupancy_of(const Function& function, const Arch& arch, int threads,
                       uint64_t dynamic_shared_bytes) {
  require(threads > 0, "The block size is not positive.");
  if (threads > max_threads_of(function, arch)) return {0, "threads"};
  const uint64_t shared = function.code().shared_bytes + dynamic_shared_bytes;
  if (dynamic_shared_bytes > max_dynamic_shared_of(function, arch)) return {0, "shared memory"};
  return gpu_emulator::occupancy_of(arch, threads, exec::estimated_registers(arch, function.code()),
                                    shared);
}

int get_attribute(const Function& function, const Arch& arch, CUfunction_attribute attribute) {
  const exec::Function& code = function.code();
  const bool needs_cluster = code.cluster[0] > 0 || code.explicit_cluster;
  const auto cluster = [&](int i) {
    return code.cluster[0] > 0 ? code.cluster[i] : function.cluster[i];
  };
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return max_threads_of(function, arch);
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      return static_cast<int>(code.shared_bytes);
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
      return 0;  // .const variables are the module's, not the function's
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      return static_cast<int>(code.local_bytes);
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      return exec::estimated_registers(arch, code);
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      return 10 * arch.major + arch.minor;
    case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA:
      return 0;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      return static_cast<int>(max_dynamic_shared_of(function, arch));
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      return function.carveout;
    case CU_FUNC_ATTRIBUTE_CLUSTER_SIZE_MUST_BE_SET:
      return needs_cluster && code.cluster[0] == 0;
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH:
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT:
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH:
      return cluster(attribute - CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH);
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      return function.non_portable_cluster;
    case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
      return function.cluster_policy;
    default:
      fail(CUDA_ERROR_INVALID_VALUE, "No such function attribute.");
  }
}

void set_attribute(Function& function, const Arch& arch, CUfunction_attribute attribute,
                   int value) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: {
      const int64_t all = int64_t{value} + static_cast<int64_t>(function.code().shared_bytes);
      if (value < 0 || all > arch.shared_per_block_optin) {
        fail(CUDA_ERROR_INVALID_VALUE,
             std::to_string(value) + " bytes of dynamic shared memory: with the static " +
                 std::to_string(function.code().shared_bytes) + " the limit is " +
                 std::to_string(arch.shared_per_block_optin) + ".");
      }
      function.max_dynamic_shared = value;
      return;
    }
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      require(value >= -1 && value <= 100, "The carveout is a percentage, or -1.");
      function.carveout = value;
      return;
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH:
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT:
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH:
      require(value >= 0, "A cluster dimension is negative.");
      require(function.code().cluster[0] == 0, "The kernel was compiled with its cluster size.");
      function.cluster[attribute - CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH] = value;
      return;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      require(value == 0 || value == 1, "The attribute is 0 or 1.");
      function.non_portable_cluster = value == 1;
      return;
    case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
      require(value >= 0 && value <= 2, "No such cluster scheduling policy.");
      function.cluster_policy = value;
      return;
    default:
      fail(CUDA_ERROR_INVALID_VALUE, "The attribute is read-only or does not exist.");
  }
}

}  // namespace gpu_emulator::driver
