// Loops over independent tasks on OpenMP's threads.
#pragma once

#include <omp.h>

#include <cfenv>
#include <cstdint>

#include "base/cpu/simd.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Rounding to nearest, and subnormal numbers kept, while this lives: results must not depend on
// what a thread was left with (torch.set_flush_denormal, libraries built with -ffast-math), least
// of all when the caller's and the workers' settings differ.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&callers_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::fenv_t callers_;
};

// f(task, thread) for tasks 0 .. count - 1, handed out in order to `threads` threads. f must not
// throw.
template <class F>
inline void parallel_for(int64_t count, int threads, F f) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    const DefaultFloats floats;
    for (int64_t i = 0; i < count; ++i) f(i, 0);
    return;
  }
  int64_t next = 0;
#pragma omp parallel num_threads(threads) default(none) shared(next, f, count)
  {
    const DefaultFloats floats;
    const int thread = omp_get_thread_num();
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) f(i, thread);
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
