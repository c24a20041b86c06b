// The CUDA driver API of a library found at run time: the machine's driver, libcuda.so.1, or a
// library with the same functions such as the emulated GPU's. Nothing links against CUDA.
#pragma once

#include <cuda.h>

#include <string>

#include "base/error.h"

namespace flash::cuda {

// The functions in use; names and meaning are those of cuda.h.
struct DriverApi {
  decltype(&::cuInit) init;
  decltype(&::cuGetErrorName) get_error_name;
  decltype(&::cuGetErrorString) get_error_string;
  decltype(&::cuDeviceGetCount) device_get_count;
  decltype(&::cuDeviceGet) device_get;
  decltype(&::cuDeviceGetAttribute) device_get_attribute;
  decltype(&::cuDevicePrimaryCtxRetain) device_primary_ctx_retain;
  decltype(&::cuCtxPushCurrent) ctx_push_current;
  decltype(&::cuCtxPopCurrent) ctx_pop_current;
  decltype(&::cuModuleLoadData) module_load_data;
  decltype(&::cuModuleGetFunction) module_get_function;
  decltype(&::cuFuncSetAttribute) func_set_attribute;
  decltype(&::cuLaunchKernel) launch_kernel;
  decltype(&::cuMemHostAlloc) mem_host_alloc;
  decltype(&::cuMemsetD32Async) memset_d32_async;
  decltype(&::cuMemHostRegister) mem_host_register;
  decltype(&::cuMemHostUnregister) mem_host_unregister;
  decltype(&::cuStreamSynchronize) stream_synchronize;
  decltype(&::cuThreadExchangeStreamCaptureMode) thread_exchange_stream_capture_mode;
  // Null in drivers before CUDA 12.0, which do without it: see tensor_map.h.
  decltype(&::cuTensorMapEncodeTiled) tensor_map_encode_tiled;
};

class Driver {
 public:
  // Loads `library` at the first call, with dlopen, for the rest of the process. Throws
  // ApiError(FLASH_ATTN_DEVICE_ERROR) if that fails, with a sentence that begins with `what` it is,
  // or if its cuInit does.
  static const Driver& load(const std::string& library, const char* what);

  // Of $FLASH_ATTENTION_CUDA_DRIVER, or libcuda.so.1.
  static const Driver& machine();

  const DriverApi* operator->() const { return &api_; }
  const std::string& library() const { return library_; }
  // A function beyond the driver API, or null.
  void* symbol(const char* name) const;

  // Throws ApiError(FLASH_ATTN_DEVICE_ERROR) with a sentence that names `call`, the error and
  // `what` it was done for, unless `result` is CUDA_SUCCESS.
  void check(CUresult result, const char* call, const std::string& what) const {
    if (result != CUDA_SUCCESS) [[unlikely]] {
      fail(result, call, what);
    }
  }

 private:
  Driver(const std::string& library, const char* what);
  [[noreturn]] void fail(CUresult result, const char* call, const std::string& what) const;

  std::string library_;
  void* handle_;
  DriverApi api_{};
};

}  // namespace flash::cuda
