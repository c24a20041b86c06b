#include "base/cuda_driver/device.h"

#include <algorithm>
#include <map>
#include <memory>
#include <utility>

namespace flash::cuda {

Device& Device::get(const Driver& driver, int ordinal) {
  // Never destroyed: other threads may still be launching when the process ends.
  static auto& mutex = *new std::mutex;
  static auto& devices = *new std::map<std::pair<const Driver*, int>, std::unique_ptr<Device>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Device>& device = devices[{&driver, ordinal}];
  if (device == nullptr) device.reset(new Device(driver, ordinal));
  return *device;
}

Device::Device(const Driver& driver, int ordinal) : driver_(driver), ordinal_(ordinal) {
  const std::string name = "device " + std::to_string(ordinal);
  int count = 0;
  driver->device_get_count(&count);
  if (ordinal < 0 || ordinal >= count)
    throw ApiError(FLASH_ATTN_DEVICE_ERROR, "there is no CUDA " + name + ": " + driver.library() +
                                                " has " + std::to_string(count));
  driver.check(driver->device_get(&handle_, ordinal), "cuDeviceGet", name);
  compute_capability_ =
      10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, "compute capability") +
      attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, "compute capability");
  l2_cache_bytes_ = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, "L2 cache size");
  sms_ = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, "number of SMs");
  shared_bytes_of_sm_ =
      attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, "shared memory");
  reserved_shared_bytes_ =
      attribute(CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, "reserved shared memory");
  driver.check(driver->device_primary_ctx_retain(&context_, handle_), "cuDevicePrimaryCtxRetain",
               name);
  allocate_mailbox();
}

int Device::attribute(CUdevice_attribute which, const char* name) const {
  int value = 0;
  driver_.check(driver_->device_get_attribute(&value, which, handle_), "cuDeviceGetAttribute",
                name);
  return value;
}

int64_t Device::cta_slots(int ctas_per_sm, int64_t shared_bytes) const {
  const int64_t in_shared = shared_bytes_of_sm_ / (shared_bytes + reserved_shared_bytes_);
  return std::max<int64_t>(sms_ * std::min<int64_t>(ctas_per_sm, in_shared), 1);
}

Device::CurrentContext::CurrentContext(const Device& device) : device_(device) {
  device.driver_.check(device.driver_->ctx_push_current(device.context_), "cuCtxPushCurrent",
                       "the primary context");
}

Device::CurrentContext::~CurrentContext() {
  CUcontext popped;
  device_.driver_->ctx_pop_current(&popped);
}

class Device::RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    driver_->thread_exchange_stream_capture_mode(&mode_);
  }
  ~RelaxedCapture() { driver_->thread_exchange_stream_capture_mode(&mode_); }

 private:
  const Driver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

void Device::allocate_mailbox() {
  const CurrentContext current(*this);
  const RelaxedCapture relaxed(driver_);
  constexpr size_t kBytes = kMailboxWords * sizeof(uint32_t);
  void* memory = nullptr;
  driver_.check(driver_->mem_host_alloc(&memory, kBytes,
                                        CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
                "cuMemHostAlloc", "device " + std::to_string(ordinal_));
  mailbox_ = static_cast<uint32_t*>(memory);
  std::fill_n(mailbox_, kMailboxWords, 0);
}

CUfunction Device::load(const KernelImage& kernel, unsigned shared_bytes) {
  const RelaxedCapture relaxed(driver_);
  const std::string what = std::string("kernel ") + kernel.name;
  CUmodule module;
  driver_.check(driver_->module_load_data(&module, kernel.fatbin), "cuModuleLoadData", what);
  CUfunction function;
  driver_.check(driver_->module_get_function(&function, module, kernel.name), "cuModuleGetFunction",
                what);
  driver_.check(
      driver_->func_set_attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                  static_cast<int>(shared_bytes)),
      "cuFuncSetAttribute", what);
  return function;
}

CUfunction Device::function_of(const KernelImage& kernel, unsigned shared_bytes) {
  const auto find = [&](Loaded* list) {
    while (list != nullptr && list->kernel != &kernel) list = list->next;
    return list;
  };
  if (const Loaded* found = find(loaded_.load(std::memory_order_acquire))) return found->function;
  const std::lock_guard<std::mutex> lock(load_mutex_);
  Loaded* const head = loaded_.load(std::memory_order_relaxed);
  if (const Loaded* found = find(head)) return found->function;
  const CUfunction function = load(kernel, shared_bytes);
  nodes_.push_back(std::make_unique<Loaded>(Loaded{&kernel, function, head}));
  loaded_.store(nodes_.back().get(), std::memory_order_release);
  return function;
}

void Device::launch(const KernelImage& kernel, const LaunchShape& shape, void* stream,
                    void** args) {
  const CurrentContext current(*this);
  const CUfunction function = function_of(kernel, shape.shared_bytes);
  const CUresult result =
      driver_->launch_kernel(function, shape.ctas, 1, 1, shape.threads, 1, 1, shape.shared_bytes,
                             static_cast<CUstream>(stream), args, nullptr);
  if (result != CUDA_SUCCESS) [[unlikely]] {
    driver_.check(result, "cuLaunchKernel", std::string("kernel ") + kernel.name);
  }
}

void Device::clear(uint32_t* words, size_t count, void* stream) {
  const CurrentContext current(*this);
  driver_.check(driver_->memset_d32_async(reinterpret_cast<CUdeviceptr>(words), 0, count,
                                          static_cast<CUstream>(stream)),
                "cuMemsetD32Async", "the workspace");
}

void Device::synchronise(void* stream) {
  const CurrentContext current(*this);
  driver_.check(driver_->stream_synchronize(static_cast<CUstream>(stream)), "cuStreamSynchronize",
                "device " + std::to_string(ordinal_));
}

void Device::register_host(const void* begin, size_t bytes) {
  const CurrentContext current(*this);
  driver_.check(driver_->mem_host_register(const_cast<void*>(begin), bytes, 0), "cuMemHostRegister",
                "a tensor");
}

void Device::unregister_host(const void* begin) noexcept {
  driver_->ctx_push_current(context_);
  driver_->mem_host_unregister(const_cast<void*>(begin));
  CUcontext popped;
  driver_->ctx_pop_current(&popped);
}

}  // namespace flash::cuda
