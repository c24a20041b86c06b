#pragma once

// Reads and writes of pointers that a caller of the driver API passed in and that may point
// anywhere: the kernel copies, so that a wild pointer is an answer and not a signal.

#include <cstddef>
#include <vector>

namespace gpu_emulator::driver {

// As memmove of ranges that do not overlap; false if not all of it could be read and written.
bool safe_copy(void* destination, const void* source, size_t bytes);

// Whether every page of the range can be read.
bool is_readable(const void* begin, size_t bytes);

// The bytes from `begin` on that can be read, at most `bytes`; shorter only at an unreadable page.
std::vector<std::byte> read_up_to(const void* begin, size_t bytes);

// Reads a T; false for a wild pointer.
template <typename T>
bool safe_read(T& value, const void* source) {
  return safe_copy(&value, source, sizeof(T));
}

}  // namespace gpu_emulator::driver
