#include "base/cuda_driver/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

namespace flash::cuda {
namespace {

[[noreturn]] void fail_device(const std::string& sentence) {
  throw ApiError(FLASH_ATTN_DEVICE_ERROR, sentence);
}

template <typename Function>
void find_optional(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
}

template <typename Function>
void find(void* handle, const std::string& library, const char* name, Function& function) {
  find_optional(handle, name, function);
  if (function == nullptr)
    fail_device(library + " has no function " + name + ": the CUDA driver is too old");
}

// cuda.h renames functions by macros (cuCtxPushCurrent is cuCtxPushCurrent_v2): the name after
// that.
#define FLASH_DRIVER_TEXT(x) #x
#define FLASH_DRIVER_NAME(x) FLASH_DRIVER_TEXT(x)

DriverApi find_all(void* handle, const std::string& library) {
  DriverApi api{};
  const auto get = [&](const char* name, auto& function) { find(handle, library, name, function); };
  get(FLASH_DRIVER_NAME(cuInit), api.init);
  get(FLASH_DRIVER_NAME(cuGetErrorName), api.get_error_name);
  get(FLASH_DRIVER_NAME(cuGetErrorString), api.get_error_string);
  get(FLASH_DRIVER_NAME(cuDeviceGetCount), api.device_get_count);
  get(FLASH_DRIVER_NAME(cuDeviceGet), api.device_get);
  get(FLASH_DRIVER_NAME(cuDeviceGetAttribute), api.device_get_attribute);
  get(FLASH_DRIVER_NAME(cuDevicePrimaryCtxRetain), api.device_primary_ctx_retain);
  get(FLASH_DRIVER_NAME(cuCtxPushCurrent), api.ctx_push_current);
  get(FLASH_DRIVER_NAME(cuCtxPopCurrent), api.ctx_pop_current);
  get(FLASH_DRIVER_NAME(cuModuleLoadData), api.module_load_data);
  get(FLASH_DRIVER_NAME(cuModuleGetFunction), api.module_get_function);
  get(FLASH_DRIVER_NAME(cuFuncSetAttribute), api.func_set_attribute);
  get(FLASH_DRIVER_NAME(cuLaunchKernel), api.launch_kernel);
  get(FLASH_DRIVER_NAME(cuMemHostAlloc), api.mem_host_alloc);
  get(FLASH_DRIVER_NAME(cuMemsetD32Async), api.memset_d32_async);
  get(FLASH_DRIVER_NAME(cuMemHostRegister), api.mem_host_register);
  get(FLASH_DRIVER_NAME(cuMemHostUnregister), api.mem_host_unregister);
  get(FLASH_DRIVER_NAME(cuStreamSynchronize), api.stream_synchronize);
  get(FLASH_DRIVER_NAME(cuThreadExchangeStreamCaptureMode),
      api.thread_exchange_stream_capture_mode);
  find_optional(handle, FLASH_DRIVER_NAME(cuTensorMapEncodeTiled), api.tensor_map_encode_tiled);
  return api;
}

}  // namespace

Driver::Driver(const std::string& library, const char* what)
    : library_(library), handle_(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) fail_device(std::string(what) + " cannot be loaded: " + dlerror());
  api_ = find_all(handle_, library_);
  check(api_.init(0), "cuInit", "the driver " + library_);
}

const Driver& Driver::load(const std::string& library, const char* what) {
  // Never destroyed: other threads may still be using them when the process ends.
  static auto& mutex = *new std::mutex;
  static auto& drivers = *new std::map<std::string, std::unique_ptr<Driver>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Driver>& driver = drivers[library];
  if (driver == nullptr) driver.reset(new Driver(library, what));
  return *driver;
}

const Driver& Driver::machine() {
  static const Driver& driver = []() -> const Driver& {
    const char* library = std::getenv("FLASH_ATTENTION_CUDA_DRIVER");
    return load(library != nullptr && *library != '\0' ? library : "libcuda.so.1",
                "CUDA tensors need NVIDIA's driver, which");
  }();
  return driver;
}

void* Driver::symbol(const char* name) const { return dlsym(handle_, name); }

void Driver::fail(CUresult result, const char* call, const std::string& what) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (api_.get_error_name(result, &name) != CUDA_SUCCESS || name == nullptr)
    name = "unknown CUDA error";
  if (api_.get_error_string(result, &text) != CUDA_SUCCESS || text == nullptr) text = "";
  std::ostringstream sentence;
  sentence << call << " failed for " << what << ": " << name << " (" << static_cast<int>(result);
  if (*text != '\0') sentence << ", " << text;
  sentence << ")";
  fail_device(sentence.str());
}

}  // namespace flash::cuda
