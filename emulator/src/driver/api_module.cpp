// Modules, libraries, and the kernels and variables in them.

#include <algorithm>

#include "arguments.h"
#include "modules.h"

using namespace gpu_emulator::driver;

namespace {

void load(CUmodule* out, const void* image) {
  Driver& state = driver();
  require_pointer(out, "module");
  state.require_context();
  give(out, state.modules.add(load_module(state, fetch_image(image))), "module");
}

void forget(Driver& state, const std::shared_ptr<Module>& module) {
  state.functions.remove_if([&](const Function& function) { return function.module == module; });
  const std::unique_lock idle(state.running);
  if (module->base != 0) state.allocations.remove(module->base);
}

void give_global(const Module& module, const std::string& name, CUdeviceptr* address,
                 size_t* bytes) {
  const auto& program = *module.program;
  const auto it = std::find(program.variable_names.begin(), program.variable_names.end(), name);
  const auto index = static_cast<size_t>(it - program.variable_names.begin());
  if (it == program.variable_names.end() || program.variable_offsets[index] < 0) {
    fail(CUDA_ERROR_NOT_FOUND, "The module has no variable '" + name.substr(0, 200) + "'.");
  }
  give_optional(address, module.base + static_cast<uint64_t>(program.variable_offsets[index]),
                "dptr");
  give_optional(bytes, program.variable_bytes[index], "bytes");
}

// Where the caller wants error messages: CU_JIT_ERROR_LOG_BUFFER and its size, both or none.
struct ErrorLog {
  char* buffer = nullptr;
  size_t bytes = 0;
};

ErrorLog error_log(unsigned count, const CUjit_option* options, void* const* values) {
  ErrorLog log;
  for (unsigned i = 0; i < count; ++i) {
    const CUjit_option option = take(options + i, "options");
    void* const value = take(values + i, "optionValues");
    if (option == CU_JIT_ERROR_LOG_BUFFER) log.buffer = static_cast<char*>(value);
    if (option == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES) log.bytes = reinterpret_cast<size_t>(value);
  }
  return log;
}

void write_log(const ErrorLog& log, const std::string& text) {
  if (!log.buffer || log.bytes == 0) return;
  const size_t length = std::min(text.size(), log.bytes - 1);
  safe_copy(log.buffer, std::string(text, 0, length).c_str(), length + 1);
}

void load_library(CUlibrary* out, std::vector<std::byte> image) {
  Driver& state = driver();
  require_pointer(out, "library");
  auto library = std::make_shared<Library>();
  library->image = std::move(image);
  // Loaded for the current context at once, so that a bad image is noticed here; for others later.
  if (state.current_context()) {
    const auto context = reinterpret_cast<uint64_t>(state.current_context());
    library->modules[context] = load_module(state, library->image);
  }
  give(out, state.libraries.add(library), "library");
}

}  // namespace

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return guarded([&](Driver&) { load(module, image); });
}

CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) {
  return guarded([&](Driver&) { load(module, image); });
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int count,
                            CUjit_option* options, void** values) {
  return guarded([&](Driver&) {
    const ErrorLog log = error_log(count, options, values);
    try {
      load(module, image);
    } catch (const ApiError& error) {
      write_log(log, error.text);
      throw;
    }
  });
}

CUresult cuModuleUnload(CUmodule handle) {
  return guarded([&](Driver& state) {
    const auto module = require_object(state.modules, handle);
    state.modules.remove(handle);
    forget(state, module);
  });
}

CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
  return guarded([&](Driver&) { give(mode, CU_MODULE_EAGER_LOADING, "mode"); });
}

CUresult cuModuleGetFunction(CUfunction* out, CUmodule handle, const char* name) {
  return guarded([&](Driver& state) {
    require_pointer(out, "hfunc");
    const auto module = require_object(state.modules, handle);
    const std::string key = take_string(name, "name");
    CUfunction& known = module->functions[key];
    if (!known || !state.functions.find(known)) {
      auto function = std::make_shared<Function>();
      function->module = module;
      function->module_handle = handle;
      function->index = find_kernel(*module, key);
      known = state.functions.add(std::move(function));
    }
    give(out, known, "hfunc");
  });
}

CUresult cuModuleGetGlobal(CUdeviceptr* address, size_t* bytes, CUmodule handle, const char* name) {
  return guarded([&](Driver& state) {
    const auto module = require_object(state.modules, handle);
    give_global(*module, take_string(name, "name"), address, bytes);
  });
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* image, CUjit_option*, void**,
                           unsigned int, CUlibraryOption*, void**, unsigned int) {
  return guarded([&](Driver&) { load_library(library, fetch_image(image)); });
}

CUresult cuLibraryUnload(CUlibrary handle) {
  return guarded([&](Driver& state) {
    const auto library = require_object(state.libraries, handle);
    state.kernels.remove_if([&](const Kernel& kernel) { return kernel.library == handle; });
    for (const auto& [context, module] : library->modules) {
      if (module) forget(state, module);
    }
    state.libraries.remove(handle);
  });
}

CUresult cuLibraryGetKernel(CUkernel* out, CUlibrary handle, const char* name) {
  return guarded([&](Driver& state) {
    require_pointer(out, "pKernel");
    const auto library = require_object(state.libraries, handle);
    const std::string key = take_string(name, "name");
    for (const auto& [context, module] : library->modules) {
      if (module) find_kernel(*module, key);
    }
    CUkernel& known = library->kernels[key];
    if (!known) {
      auto kernel = std::make_shared<Kernel>();
      kernel->library = handle;
      kernel->name = key;
      known = state.kernels.add(std::move(kernel));
    }
    give(out, known, "pKernel");
  });
}

CUresult cuLibraryGetGlobal(CUdeviceptr* address, size_t* bytes, CUlibrary handle,
                            const char* name) {
  return guarded([&](Driver& state) {
    state.require_context();
    const auto library = require_object(state.libraries, handle);
    auto& module = library->modules[reinterpret_cast<uint64_t>(state.current_context())];
    if (!module) module = load_module(state, library->image);
    give_global(*module, take_string(name, "name"), address, bytes);
  });
}

CUresult cuKernelGetFunction(CUfunction* out, CUkernel handle) {
  return guarded([&](Driver& state) {
    require_pointer(out, "pFunc");
    give(out, function_of_kernel(state, handle), "pFunc");
  });
}

CUresult cuKernelGetLibrary(CUlibrary* out, CUkernel handle) {
  return guarded(
      [&](Driver& state) { give(out, require_object(state.kernels, handle)->library, "pLib"); });
}

CUresult cuKernelGetName(const char** name, CUkernel handle) {
  return guarded([&](Driver& state) {
    give(name, require_object(state.kernels, handle)->name.c_str(), "name");
  });
}

CUresult cuFuncGetModule(CUmodule* out, CUfunction handle) {
  return guarded([&](Driver& state) {
    const auto function = state.function(handle);
    if (!function->module_handle) {
      fail(CUDA_ERROR_INVALID_HANDLE, "The function belongs to a library, not to a module.");
    }
    give(out, function->module_handle, "hmod");
  });
}

CUresult cuFuncGetName(const char** name, CUfunction handle) {
  return guarded(
      [&](Driver& state) { give(name, state.function(handle)->code().name.c_str(), "name"); });
}

CUresult cuFuncGetParamInfo(CUfunction handle, size_t index, size_t* offset, size_t* bytes) {
  return guarded([&](Driver& state) {
    const auto function = state.function(handle);
    const auto& params = function->code().params;
    require(index < params.size(), "The kernel has fewer parameters.");
    give(offset, params[index].offset, "paramOffset");
    give_optional(bytes, params[index].bytes, "paramSize");
  });
}
