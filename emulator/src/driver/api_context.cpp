// Primary contexts, contexts and each thread's stack of them.

#include "arguments.h"

using namespace gpu_emulator::driver;

namespace {

Context& require_handle(Driver& state, CUcontext handle) {
  const auto context = state.contexts.find(handle);
  if (!context) {
    fail(CUDA_ERROR_INVALID_CONTEXT,
         "The context handle is not one that this driver gave, or the context has been destroyed.");
  }
  return *context;
}

void reset_primary(Driver& state, Device& device) {
  device.primary_references = 0;
  device.primary_flags = 0;
  state.destroy_context_objects(device.primary);
}

}  // namespace

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return guarded([&](Driver& state) {
    Device& owner = state.device(device);
    give(context, owner.primary, "pctx");
    ++owner.primary_references;
  });
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  return guarded([&](Driver& state) {
    Device& owner = state.device(device);
    if (owner.primary_references == 0) {
      fail(CUDA_ERROR_INVALID_CONTEXT, "The primary context is not retained.");
    }
    if (--owner.primary_references == 0) reset_primary(state, owner);
  });
}

CUresult cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned int flags) {
  return guarded([&](Driver& state) { state.device(device).primary_flags = flags; });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int* flags, int* active) {
  return guarded([&](Driver& state) {
    const Device& owner = state.device(device);
    give(flags, owner.primary_flags, "flags");
    give(active, owner.primary_references > 0, "active");
  });
}

CUresult cuDevicePrimaryCtxReset(CUdevice device) {
  return guarded([&](Driver& state) {
    Device& owner = state.device(device);
    const int references = owner.primary_references;
    reset_primary(state, owner);
    owner.primary_references = references;  // holders may go on to use it, empty
  });
}

CUresult cuCtxCreate(CUcontext* context, CUctxCreateParams* params, unsigned int flags,
                     CUdevice device) {
  return guarded([&](Driver& state) {
    if (params) fail(CUDA_ERROR_NOT_SUPPORTED, "Context parameters are not supported.");
    state.device(device);
    require_pointer(context, "pctx");
    const CUcontext handle =
        state.contexts.add(std::make_shared<Context>(Context{device, false, flags}));
    give(context, handle, "pctx");
    state.context_stack().push_back(handle);
  });
}

CUresult cuCtxDestroy(CUcontext handle) {
  return guarded([&](Driver& state) {
    if (require_handle(state, handle).is_primary) {
      fail(CUDA_ERROR_INVALID_CONTEXT, "A primary context is released, not destroyed.");
    }
    state.destroy_context_objects(handle);
    state.contexts.remove(handle);
    auto& stack = state.context_stack();
    if (!stack.empty() && stack.back() == handle) stack.pop_back();
  });
}

CUresult cuCtxPushCurrent(CUcontext handle) {
  return guarded([&](Driver& state) {
    require_handle(state, handle);
    state.context_stack().push_back(handle);
  });
}

CUresult cuCtxPopCurrent(CUcontext* handle) {
  return guarded([&](Driver& state) {
    auto& stack = state.context_stack();
    if (stack.empty()) fail(CUDA_ERROR_INVALID_CONTEXT, "This thread has no current context.");
    give_optional(handle, stack.back(), "pctx");
    stack.pop_back();
  });
}

CUresult cuCtxSetCurrent(CUcontext handle) {
  return guarded([&](Driver& state) {
    if (handle) require_handle(state, handle);
    auto& stack = state.context_stack();
    if (!stack.empty()) stack.pop_back();
    if (handle) stack.push_back(handle);
  });
}

CUresult cuCtxGetCurrent(CUcontext* handle) {
  return guarded([&](Driver& state) { give(handle, state.current_context(), "pctx"); });
}

CUresult cuCtxGetDevice(CUdevice* device) {
  return guarded([&](Driver& state) { give(device, state.require_context().device, "device"); });
}

CUresult cuCtxGetFlags(unsigned int* flags) {
  return guarded([&](Driver& state) {
    const Context& context = state.require_context();
    const unsigned of_primary = state.devices[context.device].primary_flags;
    give(flags, context.is_primary ? of_primary : context.flags, "flags");
  });
}

CUresult cuCtxGetId(CUcontext handle, unsigned long long* id) {
  return guarded([&](Driver& state) {
    const CUcontext context = handle ? handle : state.current_context();
    require_handle(state, context);
    give(id, reinterpret_cast<unsigned long long>(context), "ctxId");
  });
}

CUresult cuCtxGetApiVersion(CUcontext handle, unsigned int* version) {
  return guarded([&](Driver& state) {
    if (handle) require_handle(state, handle);
    give(version, 3020u, "version");
  });
}

// Work is done when the call that asked for it returns: nothing is ever waited for.
CUresult cuCtxSynchronize() {
  return guarded([&](Driver& state) { state.require_context(); });
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return guarded([&](Driver& state) {
    state.require_context();
    give_optional(least, 0, "leastPriority");
    give_optional(greatest, kGreatestPriority, "greatestPriority");
  });
}
