// Chooses an instruction set at run time. Compiled without ISA flags.
#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace flash::cpu {
namespace {

struct Available {
  const Kernels* list[3];
  int count = 0;
  Available() {
    list[count++] = &kernels_baseline;
#if defined(FLASH_ATTN_HAVE_AVX2)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      list[count++] = &kernels_avx2;
#endif
#if defined(FLASH_ATTN_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      list[count++] = &kernels_avx512;
#endif
  }
  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; ++i)
      if (std::strcmp(list[i]->isa, name) == 0) return list[i];
    return nullptr;
  }
};

const Available& isas() {
  static const Available available;
  return available;
}

const Kernels* default_kernels() {
  const char* wanted = std::getenv("FLASH_ATTENTION_CPU_ISA");
  const Kernels* found = wanted ? isas().find(wanted) : nullptr;
  return found ? found : isas().list[isas().count - 1];
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{default_kernels()};
  return kernels;
}

}  // namespace

const Kernels* const* available(int* count) {
  *count = isas().count;
  return isas().list;
}

const Kernels& current() { return *chosen().load(std::memory_order_relaxed); }

bool set_current(const char* isa) {
  const Kernels* kernels = isa ? isas().find(isa) : default_kernels();
  if (kernels) chosen().store(kernels, std::memory_order_relaxed);
  return kernels != nullptr;
}

}  // namespace flash::cpu
