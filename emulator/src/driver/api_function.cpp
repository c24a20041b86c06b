// Attributes of functions and occupancy.

#include "arguments.h"
#include "functions.h"
#include "launch.h"
#include "modules.h"

using namespace gpu_emulator::driver;

namespace {

constexpr unsigned kOccupancyFlags = CU_OCCUPANCY_DISABLE_CACHING_OVERRIDE;

const gpu_emulator::Arch& arch_of(Driver& state, const Function& function) {
  return *state.devices[function.module->device].arch;
}

// A kernel of a library on one device: in that device's primary context, or in the current one.
std::shared_ptr<Function> kernel_function(Driver& state, CUkernel kernel, CUdevice device) {
  state.device(device);
  require(state.require_context().device == device,
          "The current context is not one of this device.");
  return state.function(function_of_kernel(state, kernel));
}

int max_blocks(Driver& state, CUfunction handle, int threads, size_t shared) {
  const auto function = state.function(handle);
  return occupancy_of(*function, arch_of(state, *function), threads, shared).ctas_per_sm;
}

struct BlockSize {
  int threads = 0, ctas_per_sm = 0;
};

// The block size with the most threads on a multiprocessor; the largest of those.
BlockSize best_block_size(Driver& state, CUfunction handle, CUoccupancyB2DSize shared_of,
                          size_t shared, int limit) {
  const auto function = state.function(handle);
  const auto& arch = arch_of(state, *function);
  const int most = max_threads_of(*function, arch);
  BlockSize best;
  constexpr int kWarp = 32;
  for (int threads = limit > 0 ? std::min(limit, most) : most; threads > 0;
       threads = (threads - 1) / kWarp * kWarp) {
    const size_t bytes = shared_of ? shared_of(threads) : shared;
    const int ctas = occupancy_of(*function, arch, threads, bytes).ctas_per_sm;
    if (ctas * threads > best.ctas_per_sm * best.threads) best = {threads, ctas};
  }
  return best;
}

}  // namespace

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
  return guarded([&](Driver& state) {
    const auto function = state.function(handle);
    give(value, get_attribute(*function, arch_of(state, *function), attribute), "pi");
  });
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  return guarded([&](Driver& state) {
    const auto function = state.function(handle);
    set_attribute(*function, arch_of(state, *function), attribute, value);
  });
}

CUresult cuKernelGetAttribute(int* value, CUfunction_attribute attribute, CUkernel kernel,
                              CUdevice device) {
  return guarded([&](Driver& state) {
    const auto function = kernel_function(state, kernel, device);
    give(value, get_attribute(*function, arch_of(state, *function), attribute), "pi");
  });
}

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel,
                              CUdevice device) {
  return guarded([&](Driver& state) {
    const auto function = kernel_function(state, kernel, device);
    set_attribute(*function, arch_of(state, *function), attribute, value);
  });
}

CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache config) {
  return guarded([&](Driver& state) {
    state.function(handle);
    require(config >= CU_FUNC_CACHE_PREFER_NONE && config <= CU_FUNC_CACHE_PREFER_EQUAL,
            "No such cache configuration.");
  });
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads,
                                                     size_t shared) {
  return guarded([&](Driver& state) {
    give(blocks, max_blocks(state, function, threads, shared), "numBlocks");
  });
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function,
                                                              int threads, size_t shared,
                                                              unsigned int flags) {
  return guarded([&](Driver& state) {
    require((flags & ~kOccupancyFlags) == 0, "Unknown flags.");
    give(blocks, max_blocks(state, function, threads, shared), "numBlocks");
  });
}

CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction function,
                                          CUoccupancyB2DSize shared_of, size_t shared, int limit) {
  return cuOccupancyMaxPotentialBlockSizeWithFlags(grid, block, function, shared_of, shared, limit,
                                                   0);
}

CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, CUfunction function,
                                                   CUoccupancyB2DSize shared_of, size_t shared,
                                                   int limit, unsigned int flags) {
  return guarded([&](Driver& state) {
    require((flags & ~kOccupancyFlags) == 0, "Unknown flags.");
    require(limit >= 0, "The limit of the block size is negative.");
    const BlockSize best = best_block_size(state, function, shared_of, shared, limit);
    const auto& arch = arch_of(state, *state.function(function));
    give(grid, best.ctas_per_sm * arch.sm_count, "minGridSize");
    give(block, best.threads, "blockSize");
  });
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction handle,
                                      const CUlaunchConfig* config) {
  return guarded([&](Driver& state) {
    const auto function = state.function(handle);
    const auto& arch = arch_of(state, *function);
    const LaunchShape shape = shape_of(take(config, "config"), *function, arch);
    const int ctas =
        occupancy_of(*function, arch, static_cast<int>(shape.threads()), shape.dynamic_shared)
            .ctas_per_sm;
    give(clusters, ctas * arch.sm_count / static_cast<int>(shape.cluster_ctas()), "numClusters");
  });
}

CUresult cuOccupancyMaxPotentialClusterSize(int* size, CUfunction handle,
                                            const CUlaunchConfig* config) {
  return guarded([&](Driver& state) {
    const auto function = state.function(handle);
    take(config, "config");
    give(size, max_cluster_of(*function, arch_of(state, *function)), "clusterSize");
  });
}
