// The emulated GPU as the device of CPU tensors: kernels of the CUDA backend run on a driver
// library whose device memory is host memory. Chosen for the calling thread by use_emulator, for
// the whole process by the environment variable FLASH_ATTENTION_EMULATOR, in the same words.
#pragma once

#include <string>
#include <vector>

#include "base/cuda_driver/device.h"

namespace flash::cuda {

// The emulated device that CPU tensors of this thread's calls go to; null: none, they stay on the
// CPU backend.
Device* emulated_device();

// Sends this thread's CPU tensors to the emulated device that `description` tells: an architecture
// and options of the emulator (gpu_emulator.h), "sm_80,mode=late,seed=3,checks=all,-init_fence"; ""
// to none. `library`: the emulator's; "" for libgpu_emulator.so beside this library. Options are
// the device's, for all threads. Throws ApiError.
void use_emulator(const std::string& description, const std::string& library);

// What the emulator tells of its launches since the last use_emulator in any thread: JSON, an
// object for each kernel name. "" without an emulator.
std::string emulator_counters();

// Host memory [begin, end).
struct HostRange {
  const char* begin;
  const char* end;
};

// One call on the emulated device: the ranges are visible to kernels while this lives. They may
// overlap, as those of views of one tensor do. Calls exclude each other: two threads may use the
// same tensors.
class EmulatedCall {
 public:
  EmulatedCall(Device& device, std::vector<HostRange> ranges);
  ~EmulatedCall();
  EmulatedCall(const EmulatedCall&) = delete;
  EmulatedCall& operator=(const EmulatedCall&) = delete;

  // Waits for the launches and throws ApiError(FLASH_ATTN_DEVICE_ERROR) with the emulator's report
  // if one went wrong.
  template <typename Launches>
  void run(const Launches& launches) {
    try {
      launches();
      device_.synchronise(nullptr);
    } catch (const ApiError& error) {
      rethrow_with_report(error);
    }
  }

 private:
  void unregister() noexcept;
  [[noreturn]] void rethrow_with_report(const ApiError& error) const;

  Device& device_;
  std::vector<HostRange> registered_;
};

}  // namespace flash::cuda
