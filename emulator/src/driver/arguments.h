#pragma once

// Pointers among an entry point's arguments: read and written so that a null or wild one is
// CUDA_ERROR_INVALID_VALUE.

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "driver.h"
#include "host_memory.h"

namespace gpu_emulator::driver {

template <typename T>
void give(T* out, const std::type_identity_t<T>& value, const char* name) {
  require_pointer(out, name);
  if (!safe_copy(out, &value, sizeof(T))) {
    fail(CUDA_ERROR_INVALID_VALUE, std::string(name) + " does not point to writable memory.");
  }
}

template <typename T>
void give_optional(T* out, const std::type_identity_t<T>& value, const char* name) {
  if (out) give(out, value, name);
}

template <typename T>
T take(const T* in, const char* name) {
  require_pointer(in, name);
  T value;
  if (!safe_read(value, in)) {
    fail(CUDA_ERROR_INVALID_VALUE, std::string(name) + " does not point to readable memory.");
  }
  return value;
}

// A C string.
inline std::string take_string(const char* text, const char* name) {
  require_pointer(text, name);
  constexpr size_t kMaxLength = 1 << 16;
  const std::vector<std::byte> bytes = read_up_to(text, kMaxLength);
  const auto end = std::find(bytes.begin(), bytes.end(), std::byte{0});
  if (end == bytes.end()) {
    fail(CUDA_ERROR_INVALID_VALUE, std::string(name) + " is not a readable C string.");
  }
  return std::string(reinterpret_cast<const char*>(bytes.data()),
                     static_cast<size_t>(end - bytes.begin()));
}

}  // namespace gpu_emulator::driver
