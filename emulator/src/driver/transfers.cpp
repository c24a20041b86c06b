#include "transfers.h"

#include <cstring>

#include "host_memory.h"

namespace gpu_emulator::driver {
namespace {

// Bytes from the first to the last of `height` rows. Fails if a row is longer than the pitch or the
// sum overflows.
uint64_t extent(uint64_t width, uint64_t height, uint64_t pitch) {
  if (width == 0 || height == 0) return 0;
  if (height == 1) return width;
  require(width <= pitch, "A row is longer than the pitch.");
  require(pitch <= (UINT64_MAX - width) / (height - 1), "The rows reach beyond the address space.");
  return (height - 1) * pitch + width;
}

void check(Driver& state, const Copy& copy) {
  check_range(state, copy.destination_side, copy.destination,
              extent(copy.width, copy.height, copy.destination_pitch), "destination");
  check_range(state, copy.source_side, copy.source,
              extent(copy.width, copy.height, copy.source_pitch), "source");
}

// What is written, for the checks of values.
void mark_copied(Driver& state, uint64_t destination, uint64_t source, uint64_t bytes) {
  const Allocation* to = state.allocations.find(destination);
  if (!to || !to->defined) return;
  const Allocation* from = state.allocations.find(source);
  to->defined->copy(destination, bytes, from ? from->defined.get() : nullptr, source);
}

void mark_filled(Driver& state, uint64_t destination, uint64_t bytes) {
  const Allocation* to = state.allocations.find(destination);
  if (to && to->defined) to->defined->set(destination, bytes);
}

void perform(const Copy& copy) {
  Driver& state = driver();
  check(state, copy);
  // Memory that the driver holds is copied at once; that of the caller may not be there.
  const bool is_known = state.allocations.find(copy.destination) != nullptr &&
                        state.allocations.find(copy.source) != nullptr;
  for (uint64_t row = 0; row < copy.height && copy.width > 0; ++row) {
    auto* to = reinterpret_cast<void*>(copy.destination + row * copy.destination_pitch);
    auto* from = reinterpret_cast<const void*>(copy.source + row * copy.source_pitch);
    if (is_known) {
      std::memmove(to, from, copy.width);
    } else if (!safe_copy(to, from, copy.width)) {
      fail(CUDA_ERROR_INVALID_VALUE, "The host range of the copy is not accessible.");
    }
    mark_copied(state, copy.destination + row * copy.destination_pitch,
                copy.source + row * copy.source_pitch, copy.width);
  }
}

void perform(const Fill& fill) {
  Driver& state = driver();
  const uint64_t row_bytes = fill.width * static_cast<uint64_t>(fill.element_bytes);
  check_range(state, Side::kDevice, fill.destination, extent(row_bytes, fill.height, fill.pitch),
              "destination");
  const auto element = static_cast<size_t>(fill.element_bytes);
  for (uint64_t row = 0; row < fill.height && fill.width > 0; ++row) {
    auto* to = reinterpret_cast<std::byte*>(fill.destination + row * fill.pitch);
    for (uint64_t i = 0; i < fill.width; ++i) std::memcpy(to + i * element, &fill.value, element);
    mark_filled(state, fill.destination + row * fill.pitch, row_bytes);
  }
}

}  // namespace

void check_range(Driver& state, Side side, uint64_t address, uint64_t bytes, const char* what) {
  if (bytes == 0) return;
  const Allocation* allocation = state.allocations.find(address);
  const bool may_be_unknown = side != Side::kDevice;
  if (!allocation && may_be_unknown && address != 0) return;
  if (allocation && state.allocations.find(address, bytes)) return;
  fail(CUDA_ERROR_INVALID_VALUE, std::string("The ") + what + " of " + std::to_string(bytes) +
                                     " bytes " +
                                     (allocation ? "reaches beyond the end of its allocation of " +
                                                       std::to_string(allocation->bytes) + " bytes."
                                                 : "is not device memory."));
}

void submit_copy(Driver& state, const Copy& copy, CUstream stream) {
  check(state, copy);
  state.submit(stream, [copy] { perform(copy); });
}

void submit_fill(Driver& state, const Fill& fill, CUstream stream) {
  const auto element = static_cast<uint64_t>(fill.element_bytes);
  require(fill.destination % element == 0 && (fill.height <= 1 || fill.pitch % element == 0),
          "The destination or its pitch is not aligned to the element.");
  require(fill.width <= UINT64_MAX / element, "The range reaches beyond the address space.");
  check_range(state, Side::kDevice, fill.destination,
              extent(fill.width * element, fill.height, fill.pitch), "destination");
  state.submit(stream, [fill] { perform(fill); });
}

}  // namespace gpu_emulator::driver
