#include "launch.h"

#include <algorithm>

#include "arguments.h"
#include "functions.h"

namespace gpu_emulator::driver {
namespace {

constexpr int kPortableCluster = 8;  // CUDA C++ Programming Guide, "Thread Block Clusters"
constexpr unsigned kMaxAttributes = 64;

std::string text_of(const std::array<uint32_t, 3>& size) {
  return "(" + std::to_string(size[0]) + ", " + std::to_string(size[1]) + ", " +
         std::to_string(size[2]) + ")";
}

std::array<uint32_t, 3> default_cluster(const Function& function) {
  const exec::Function& code = function.code();
  std::array<uint32_t, 3> cluster{1, 1, 1};
  for (size_t i = 0; i < 3; ++i) {
    const int given = code.cluster[0] > 0 ? code.cluster[i] : function.cluster[i];
    if (given > 0) cluster[i] = static_cast<uint32_t>(given);
  }
  return cluster;
}

void apply(const CUlaunchAttribute& attribute, const Function& function, LaunchShape& shape) {
  switch (attribute.id) {
    case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: {
      const auto& size = attribute.value.clusterDim;
      const std::array<uint32_t, 3> cluster{size.x, size.y, size.z};
      if (function.code().cluster[0] > 0 && cluster != shape.cluster) {
        fail(CUDA_ERROR_INVALID_CLUSTER_SIZE, "The launch asks for clusters of " +
                                                  text_of(cluster) +
                                                  ", the kernel was compiled "
                                                  "for " +
                                                  text_of(shape.cluster) + ".");
      }
      shape.cluster = cluster;
      return;
    }
    case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
      shape.cooperative = attribute.value.cooperative != 0;
      return;
    // Hints, and orders that hold anyway where each launch ends before the next one begins.
    case CU_LAUNCH_ATTRIBUTE_IGNORE:
    case CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW:
    case CU_LAUNCH_ATTRIBUTE_SYNCHRONIZATION_POLICY:
    case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
    case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
    case CU_LAUNCH_ATTRIBUTE_PRIORITY:
    case CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN_MAP:
    case CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN:
    case CU_LAUNCH_ATTRIBUTE_PREFERRED_CLUSTER_DIMENSION:
    case CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      return;
    default:
      fail(CUDA_ERROR_NOT_SUPPORTED, "Launch attribute " +
                                         std::to_string(static_cast<int>(attribute.id)) +
                                         " is not supported.");
  }
}

void check_grid(const LaunchShape& shape, const Arch& arch) {
  for (size_t i = 0; i < 3; ++i) {
    const auto max_grid = static_cast<uint32_t>(arch.max_grid[i]);
    const auto max_block = static_cast<uint32_t>(arch.max_block[i]);
    if (shape.grid[i] == 0 || shape.grid[i] > max_grid) {
      fail(CUDA_ERROR_INVALID_VALUE, "A grid of " + text_of(shape.grid) + ": dimension " +
                                         std::to_string(i) + " must be from 1 to " +
                                         std::to_string(max_grid) + ".");
    }
    if (shape.block[i] == 0 || shape.block[i] > max_block) {
      fail(CUDA_ERROR_INVALID_VALUE, "A block of " + text_of(shape.block) + ": dimension " +
                                         std::to_string(i) + " must be from 1 to " +
                                         std::to_string(max_block) + ".");
    }
  }
}

void check_threads(const LaunchShape& shape, const Function& function, const Arch& arch) {
  const exec::Function& code = function.code();
  if (shape.threads() > static_cast<uint64_t>(arch.max_threads_per_block)) {
    fail(CUDA_ERROR_INVALID_VALUE, "A block of " + std::to_string(shape.threads()) +
                                       " threads; the device's limit is " +
                                       std::to_string(arch.max_threads_per_block) + ".");
  }
  const int required = code.required_threads[0];
  for (size_t i = 0; required > 0 && i < 3; ++i) {
    if (shape.block[i] != static_cast<uint32_t>(std::max(code.required_threads[i], 1))) {
      fail(CUDA_ERROR_INVALID_VALUE, "Kernel " + code.name +
                                         " was compiled for another block "
                                         "size than " +
                                         text_of(shape.block) + " (.reqntid).");
    }
  }
  const int limit = max_threads_of(function, arch);
  if (shape.threads() > static_cast<uint64_t>(limit)) {
    fail(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
         "A block of " + std::to_string(shape.threads()) + " threads; kernel " + code.name +
             " was compiled for at most " + std::to_string(limit) + " (.maxntid).");
  }
}

void check_shared(const LaunchShape& shape, const Function& function, const Arch& arch) {
  const uint64_t limit = max_dynamic_shared_of(function, arch);
  if (shape.dynamic_shared <= limit) return;
  fail(CUDA_ERROR_INVALID_VALUE,
       std::to_string(shape.dynamic_shared) + " bytes of dynamic shared memory; kernel " +
           function.code().name + " may have " + std::to_string(limit) +
           ". CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES raises the limit.");
}

void check_cluster(const LaunchShape& shape, const Function& function, const Arch& arch) {
  const uint64_t ctas = shape.cluster_ctas();
  if (ctas == 1) return;
  const int limit = max_cluster_of(function, arch);
  bool divides = true;
  for (size_t i = 0; i < 3; ++i) {
    divides = divides && shape.cluster[i] > 0 && shape.grid[i] % shape.cluster[i] == 0;
  }
  if (divides && ctas <= static_cast<uint64_t>(limit)) return;
  fail(CUDA_ERROR_INVALID_CLUSTER_SIZE, "Clusters of " + text_of(shape.cluster) + " in a grid of " +
                                            text_of(shape.grid) +
                                            ": they must divide the grid and have at most " +
                                            std::to_string(limit) + " CTAs on " + arch.name + ".");
}

void check_cooperative(const LaunchShape& shape, const Function& function, const Arch& arch) {
  const int per_sm =
      occupancy_of(function, arch, static_cast<int>(shape.threads()), shape.dynamic_shared)
          .ctas_per_sm;
  const uint64_t ctas = uint64_t{shape.grid[0]} * shape.grid[1] * shape.grid[2];
  if (ctas <= static_cast<uint64_t>(per_sm) * static_cast<uint64_t>(arch.sm_count)) return;
  fail(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
       "A cooperative launch of " + std::to_string(ctas) + " CTAs; " + std::to_string(per_sm) +
           " fit on each of " + std::to_string(arch.sm_count) + " multiprocessors.");
}

std::vector<std::byte> parameters_from_extra(const exec::Function& code, void** extra) {
  const void* buffer = nullptr;
  size_t bytes = 0;
  constexpr int kMaxPairs = 4;
  for (int i = 0; i < kMaxPairs; ++i) {
    void* const key = take(extra + 2 * i, "extra");
    if (key == CU_LAUNCH_PARAM_END) break;
    void* const value = take(extra + 2 * i + 1, "extra");
    if (key == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = value;
    if (key == CU_LAUNCH_PARAM_BUFFER_SIZE) bytes = take(static_cast<size_t*>(value), "extra");
  }
  if (bytes < code.param_bytes) {
    fail(CUDA_ERROR_INVALID_VALUE, "A parameter buffer of " + std::to_string(bytes) +
                                       " bytes; kernel " + code.name + " takes " +
                                       std::to_string(code.param_bytes) + ".");
  }
  std::vector<std::byte> block(code.param_bytes);
  require(safe_copy(block.data(), buffer, block.size()), "The parameter buffer is not readable.");
  return block;
}

// The kernel, ready to run any number of times.
struct Prepared {
  std::shared_ptr<Module> module;
  Launch launch;
};

void run_prepared(const Prepared& prepared) {
  Driver& state = driver();
  Device& device = state.devices[prepared.module->device];
  const Options options = device.options;
  Counters counters;
  const Report report = state.run_unlocked(
      [&] { return run(*device.arch, options, device.memory, prepared.launch, &counters); });
  device.counters.add(counters);
  device.report = report.text;
  if (report.cuda_error != 0) {
    fail(static_cast<CUresult>(report.cuda_error), report.text);
  }
}

}  // namespace

int max_cluster_of(const Function& function, const Arch& arch) {
  return function.non_portable_cluster ? arch.max_cluster
                                       : std::min(arch.max_cluster, kPortableCluster);
}

LaunchShape shape_of(const CUlaunchConfig& config, const Function& function, const Arch& arch) {
  LaunchShape shape;
  shape.grid = {config.gridDimX, config.gridDimY, config.gridDimZ};
  shape.block = {config.blockDimX, config.blockDimY, config.blockDimZ};
  shape.dynamic_shared = config.sharedMemBytes;
  shape.cluster = default_cluster(function);
  require(config.numAttrs <= kMaxAttributes, "Too many launch attributes.");
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    apply(take(config.attrs + i, "attrs"), function, shape);
  }
  check_grid(shape, arch);
  check_threads(shape, function, arch);
  check_shared(shape, function, arch);
  check_cluster(shape, function, arch);
  if (shape.cooperative) check_cooperative(shape, function, arch);
  return shape;
}

std::vector<std::byte> parameters_of(const exec::Function& code, void** params, void** extra) {
  require(!params || !extra, "Both kernelParams and extra are given.");
  if (extra) return parameters_from_extra(code, extra);
  std::vector<std::byte> block(code.param_bytes);
  if (code.params.empty()) return block;
  require_pointer(params, "kernelParams");
  for (size_t i = 0; i < code.params.size(); ++i) {
    const void* value = take(params + i, "kernelParams");
    const exec::ParamLayout& layout = code.params[i];
    if (!value || !safe_copy(block.data() + layout.offset, value, layout.bytes)) {
      fail(CUDA_ERROR_INVALID_VALUE, "kernelParams[" + std::to_string(i) + "] does not point to " +
                                         std::to_string(layout.bytes) + " readable bytes.");
    }
  }
  return block;
}

void launch(Driver& state, const CUlaunchConfig& config, CUfunction handle, void** params,
            void** extra) {
  const Context& context = state.require_context();
  const auto function = state.function(handle);
  if (function->module->device != context.device) {
    fail(CUDA_ERROR_INVALID_HANDLE, "The kernel was loaded on another device than the current.");
  }
  const Arch& arch = *state.devices[context.device].arch;
  const LaunchShape shape = shape_of(config, *function, arch);
  Prepared prepared;
  prepared.module = function->module;
  prepared.launch = {prepared.module->program.get(),
                     function->index,
                     shape.grid,
                     shape.block,
                     shape.cluster,
                     shape.dynamic_shared,
                     parameters_of(function->code(), params, extra),
                     prepared.module->base};
  state.submit(config.hStream, [prepared] { run_prepared(prepared); });
}

}  // namespace gpu_emulator::driver

using namespace gpu_emulator::driver;

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                        unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                        unsigned int block_z, unsigned int shared, CUstream stream, void** params,
                        void** extra) {
  return guarded([&](Driver& state) {
    CUlaunchConfig config = {};
    config.gridDimX = grid_x, config.gridDimY = grid_y, config.gridDimZ = grid_z;
    config.blockDimX = block_x, config.blockDimY = block_y, config.blockDimZ = block_z;
    config.sharedMemBytes = shared;
    config.hStream = stream;
    launch(state, config, function, params, extra);
  });
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params,
                          void** extra) {
  return guarded(
      [&](Driver& state) { launch(state, take(config, "config"), function, params, extra); });
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                                   unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                                   unsigned int block_z, unsigned int shared, CUstream stream,
                                   void** params) {
  return guarded([&](Driver& state) {
    CUlaunchAttribute cooperative = {};
    cooperative.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    cooperative.value.cooperative = 1;
    CUlaunchConfig config = {};
    config.gridDimX = grid_x, config.gridDimY = grid_y, config.gridDimZ = grid_z;
    config.blockDimX = block_x, config.blockDimY = block_y, config.blockDimZ = block_z;
    config.sharedMemBytes = shared;
    config.hStream = stream;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    launch(state, config, function, params, nullptr);
  });
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  return guarded([&](Driver& state) {
    require_pointer(reinterpret_cast<const void*>(function), "fn");
    state.submit(stream, [=] {
      driver().run_unlocked([=] {
        function(data);
        return 0;
      });
    });
  });
}
