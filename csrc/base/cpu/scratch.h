// Scratch memory and threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"

namespace flash::cpu {

// At least `bytes` of memory for one call of this thread, 64-byte aligned, contents undefined. Kept
// between calls up to a limit, so that small calls do not pay for page faults. Throws
// std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  FLASH_INLINE char* data() const { return data_; }

 private:
  char* data_;
  size_t bytes_;
};

// Threads of the next parallel region of this thread: OpenMP's maximum; 1 after fork().
int num_threads();
// Threads for work of this many floating-point operations.
int threads_for(double flops);

// Hands out pieces of a buffer; with a null base it only measures.
class Carver {
 public:
  FLASH_INLINE explicit Carver(char* base) : base_(base) {}
  template <class T>
  FLASH_INLINE T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  FLASH_INLINE size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace flash::cpu
