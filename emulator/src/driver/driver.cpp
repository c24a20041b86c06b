#include "driver.h"

#include <new>

#include "modules.h"

namespace gpu_emulator::driver {

void fail(CUresult code, const std::string& text) { throw ApiError(code, text); }

Driver& driver() {
  static Driver& instance = *new Driver;
  return instance;
}

namespace {

template <size_t n>
std::vector<MemoryMap*> memories(std::array<Device, n>& devices) {
  std::vector<MemoryMap*> result;
  for (Device& device : devices) result.push_back(&device.memory);
  return result;
}

std::string names_of_devices() {
  std::string names;
  for (int i = 0; i < Driver::kDevices; ++i)
    names += (i == 0 ? "" : ", ") + std::to_string(i) + " is an " + boards()[i].name;
  return names;
}

}  // namespace

Driver::Driver() : allocations(memories(devices)) {
  for (int i = 0; i < kDevices; ++i) {
    devices[i].arch = &boards()[i];
    devices[i].primary = contexts.add(std::make_shared<Context>(Context{i, true, 0}));
  }
}

Device& Driver::device(CUdevice number) {
  if (number < 0 || number >= kDevices) {
    fail(CUDA_ERROR_INVALID_DEVICE,
         "There is no device " + std::to_string(number) + ": " + names_of_devices() + ".");
  }
  return devices[number];
}

std::vector<CUcontext>& Driver::context_stack() {
  thread_local std::vector<CUcontext> stack;
  return stack;
}

CUcontext Driver::current_context() const {
  const auto& stack = context_stack();
  return stack.empty() ? nullptr : stack.back();
}

Context& Driver::require_context() {
  const CUcontext current = current_context();
  if (!current) {
    fail(CUDA_ERROR_INVALID_CONTEXT,
         "This thread has no current context: call cuCtxSetCurrent with a retained primary "
         "context first.");
  }
  const auto context = contexts.find(current);
  const bool is_alive =
      context && (!context->is_primary || devices[context->device].primary_references > 0);
  if (!is_alive) {
    fail(CUDA_ERROR_CONTEXT_IS_DESTROYED, "This thread's current context has been destroyed.");
  }
  return *context;
}

void Driver::destroy_context_objects(CUcontext context) {
  const auto key = reinterpret_cast<uint64_t>(context);
  const auto belongs = [&](const auto& object) { return object.context == context; };
  functions.remove_if(
      [&](const Function& function) { return function.module->context == context; });
  modules.remove_if(belongs);
  streams.remove_if(belongs);
  events.remove_if(belongs);
  libraries.for_each([&](Library& library) { library.modules.erase(key); });
  kernels.for_each([&](Kernel& kernel) { kernel.functions.erase(key); });
  std::unique_lock idle(running);
  allocations.remove_of_context(key);
}

std::shared_ptr<Function> Driver::function(CUfunction handle) {
  if (auto function = functions.find(handle)) return function;
  const auto kernel = reinterpret_cast<CUkernel>(handle);
  if (kernels.find(kernel)) return functions.find(function_of_kernel(*this, kernel));
  return require_object(functions, handle);
}

std::shared_ptr<Stream> Driver::stream(CUstream handle) {
  require_context();
  if (!handle || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) return nullptr;
  return require_object(streams, handle);
}

void Driver::submit(CUstream handle, std::function<void()> work) {
  const auto found = stream(handle);
  if (!found || !found->capture) {
    work();
  } else if (found->capture_is_broken) {
    fail(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "The stream's capture has failed before.");
  } else {
    found->capture->nodes.push_back(std::move(work));
  }
}

void Driver::require_not_capturing(CUstream handle) {
  const auto found = stream(handle);
  if (!found || !found->capture) return;
  found->capture_is_broken = true;
  fail(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
       "The stream is capturing: it cannot be waited for, and the capture is now invalid.");
}

void Driver::report(const std::string& text) {
  const auto context = contexts.find(current_context());
  for (int i = 0; i < kDevices; ++i) {
    if (!context || context->device == i) devices[i].report = text;
  }
}

CUresult guarded_uninitialised(const std::function<void(Driver&)>& body) {
  Driver& state = driver();
  const std::lock_guard lock(state.mutex);
  try {
    body(state);
    return CUDA_SUCCESS;
  } catch (const ApiError& error) {
    state.report(error.text);
    return error.code;
  } catch (const std::bad_alloc&) {
    state.report("The host has not enough memory for this.");
    return CUDA_ERROR_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    state.report(std::string("Internal error of the emulator: ") + error.what());
    return CUDA_ERROR_UNKNOWN;
  }
}

CUresult guarded(const std::function<void(Driver&)>& body) {
  return guarded_uninitialised([&](Driver& state) {
    if (!state.is_initialised) {
      fail(CUDA_ERROR_NOT_INITIALIZED, "cuInit has not been called.");
    }
    body(state);
  });
}

}  // namespace gpu_emulator::driver
