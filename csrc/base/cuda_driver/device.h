// A CUDA device: its primary context, the kernels loaded into it, launches.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/cuda_driver/driver.h"

namespace flash::cuda {

// A kernel of this library: the name of its entry and the fatbin that the build has embedded. Its
// address identifies it.
struct KernelImage {
  const char* name;
  const void* fatbin;
};

struct LaunchShape {
  unsigned ctas, threads, shared_bytes;
};

class Device {
 public:
  // Device `ordinal` of `driver`; created at the first call, lives as long as the process. Throws
  // ApiError(FLASH_ATTN_DEVICE_ERROR) if there is none.
  static Device& get(const Driver& driver, int ordinal);

  const Driver& driver() const { return driver_; }
  int ordinal() const { return ordinal_; }
  int compute_capability() const { return compute_capability_; }  // 80, 90, ...
  int64_t l2_cache_bytes() const { return l2_cache_bytes_; }
  // Of a CTA at most.
  int64_t max_shared_bytes() const { return shared_bytes_of_sm_ - reserved_shared_bytes_; }
  // CTAs that run at a time where an SM's registers have room for `ctas_per_sm` of them and each
  // takes `shared_bytes` of shared memory; at least one.
  int64_t cta_slots(int ctas_per_sm, int64_t shared_bytes) const;

  // Words of host memory that kernels can write to, 0 at first.
  static constexpr int kMailboxWords = 16;
  uint32_t* mailbox() const { return mailbox_; }

  // Enqueues a kernel of one-dimensional CTAs into `stream`. Loads the kernel at its first launch;
  // later launches neither allocate nor wait, and can be captured into a CUDA graph. The calling
  // thread needs no current context. Throws ApiError(FLASH_ATTN_DEVICE_ERROR).
  void launch(const KernelImage& kernel, const LaunchShape& shape, void* stream, void** args);

  // Enqueues zeros for `count` words of device memory; like a launch, can be captured.
  void clear(uint32_t* words, size_t count, void* stream);

  // Waits for `stream`.
  void synchronise(void* stream);

  // The device's primary context, current while this lives.
  class CurrentContext {
   public:
    explicit CurrentContext(const Device& device);
    ~CurrentContext();
    CurrentContext(const CurrentContext&) = delete;
    CurrentContext& operator=(const CurrentContext&) = delete;

   private:
    const Device& device_;
  };

  // Makes host memory visible to kernels at its own address, until it is unregistered.
  void register_host(const void* begin, size_t bytes);
  void unregister_host(const void* begin) noexcept;

 private:
  // Makes loading a module legal while some stream is being captured.
  class RelaxedCapture;

  Device(const Driver& driver, int ordinal);
  void allocate_mailbox();
  int attribute(CUdevice_attribute which, const char* name) const;
  CUfunction function_of(const KernelImage& kernel, unsigned shared_bytes);
  CUfunction load(const KernelImage& kernel, unsigned shared_bytes);

  const Driver& driver_;
  int ordinal_;
  CUdevice handle_{};
  CUcontext context_{};
  int compute_capability_ = 0;
  int64_t l2_cache_bytes_ = 0;
  uint32_t* mailbox_ = nullptr;
  int sms_ = 0;
  int64_t shared_bytes_of_sm_ = 0, reserved_shared_bytes_ = 0;  // the latter by each CTA

  struct Loaded {
    const KernelImage* kernel;
    CUfunction function;
    Loaded* next;
  };
  std::mutex load_mutex_;
  std::vector<std::unique_ptr<Loaded>> nodes_;
  std::atomic<Loaded*> loaded_{nullptr};  // a list that only grows: read without the mutex
};

}  // namespace flash::cuda
