#include "base/call/target.h"

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(FLASH_ATTN_HAVE_CUDA)
#include "base/cuda_driver/emulated.h"
#include "base/index_tensors.h"
#endif

namespace flash {

#if defined(FLASH_ATTN_HAVE_CUDA)

namespace {

// Raises, once, what kernels of earlier calls found in index tensors.
void raise_index_faults(cuda::Device& device) {
  static_assert(kIndexTensors <= cuda::Device::kMailboxWords);
  std::string names;
  for (int i = 0; i < kIndexTensors; ++i) {
    std::atomic_ref<uint32_t> word(device.mailbox()[i]);
    if (word.load(std::memory_order_relaxed) == 0) [[likely]]
      continue;
    word.store(0, std::memory_order_relaxed);
    names += (names.empty() ? "" : ", ") + std::string(kIndexTensorNames[i]);
  }
  require(names.empty(), "an earlier call on CUDA device ", device.ordinal(),
          " was given values out of range in ", names, ": what they do not name was left out");
}

Target cuda_target(cuda::Device& device, void* stream, bool is_emulated) {
  raise_index_faults(device);
  return {.device_type = FLASH_ATTN_CUDA,
          .device_id = device.ordinal(),
          .compute_capability = device.compute_capability(),
          .device = &device,
          .stream = stream,
          .is_emulated = is_emulated};
}

cuda::HostRange range_of(const Region& x) {
  return {reinterpret_cast<const char*>(x.begin), reinterpret_cast<const char*>(x.end)};
}

}  // namespace

Target target_of(const flash_attn_tensor& x, void* stream) {
  if (x.device_type == FLASH_ATTN_CUDA)
    return cuda_target(cuda::Device::get(cuda::Driver::machine(), x.device_id), stream, false);
  cuda::Device* emulated = cuda::emulated_device();
  return emulated == nullptr ? Target{} : cuda_target(*emulated, nullptr, true);
}

void require_cuda_kernels(const Target& target) {
  constexpr int kOldest = 80;
  if (target.compute_capability >= kOldest) return;
  const int capability = target.compute_capability;
  throw ApiError(FLASH_ATTN_UNSUPPORTED,
                 "the CUDA kernels need a GPU of compute capability 8.0 or newer, this one has " +
                     std::to_string(capability / 10) + "." + std::to_string(capability % 10));
}

void run_emulated(const Target& target, std::span<const Region> written,
                  std::span<const Region> read, const Workspace& workspace,
                  const std::function<void()>& kernels) {
  const char* memory = static_cast<const char*>(workspace.ptr);
  std::vector<cuda::HostRange> ranges = {{memory, memory + workspace.bytes}};
  for (const Region& x : written) ranges.push_back(range_of(x));
  for (const Region& x : read) ranges.push_back(range_of(x));
  cuda::EmulatedCall(*target.device, std::move(ranges)).run(kernels);
}

void use_emulator(const char* description, const char* library) {
  cuda::use_emulator(description != nullptr ? description : "", library != nullptr ? library : "");
}

std::string emulator_counters() { return cuda::emulator_counters(); }

#else

namespace {

void require_nothing_to_emulate(const char* description) {
  if (description != nullptr && *description != '\0')
    throw ApiError(FLASH_ATTN_UNSUPPORTED,
                   std::string(kNoCudaKernels) + ": there is nothing to emulate");
}

}  // namespace

Target target_of(const flash_attn_tensor& x, void* stream) {
  static const char* const description = std::getenv("FLASH_ATTENTION_EMULATOR");
  require_nothing_to_emulate(description);
  return {.device_type = x.device_type, .stream = stream};
}

void require_cuda_kernels(const Target&) { throw ApiError(FLASH_ATTN_UNSUPPORTED, kNoCudaKernels); }

// No target is emulated.
void run_emulated(const Target&, std::span<const Region>, std::span<const Region>, const Workspace&,
                  const std::function<void()>&) {}

void use_emulator(const char* description, const char*) { require_nothing_to_emulate(description); }

std::string emulator_counters() { return ""; }

#endif

}  // namespace flash
