// Chooses an instruction set at run time. Compiled without ISA flags.
#include "cpu/isa.h"

#if defined(FLASH_ATTN_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace flash::cpu {
namespace {

#if defined(FLASH_ATTN_HAVE_AMX)
// The CPU has AMX-BF16, the operating system saves the tiles, and lets this process use them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kOsxsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((a & kTileState) != kTileState) return false;
  // Linux gives tiles to processes that ask: arch/x86/include/uapi/asm/prctl.h. The permission is
  // the process's, threads that exist included.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Available {
  const Kernels* list[5];
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
      add_avx512();
#endif
  }
  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; ++i)
      if (std::strcmp(list[i]->isa, name) == 0) return list[i];
    return nullptr;
  }

 private:
#if defined(FLASH_ATTN_HAVE_AVX512)
  void add_avx512() {
    list[count++] = &kernels_avx512;
#if defined(FLASH_ATTN_HAVE_AVX512BF16)
    if (__builtin_cpu_supports("avx512bf16")) {
      list[count++] = &kernels_avx512bf16;
      // Intel's cores start a product of pairs every other cycle: FMA on widened numbers is faster.
      if (!__builtin_cpu_is("amd")) std::swap(list[count - 1], list[count - 2]);
    }
#endif
#if defined(FLASH_ATTN_HAVE_AMX)
    if (__builtin_cpu_supports("avx512bf16") && has_amx()) list[count++] = &kernels_amx;
#endif
  }
#endif
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

int fp32_products() {
  static const char* const wanted = std::getenv("FLASH_ATTENTION_CPU_FP32_PRODUCTS");
  return wanted && std::strcmp(wanted, "3") == 0 ? 3 : 6;
}

const Kernels& current() { return *chosen().load(std::memory_order_relaxed); }

bool set_current(const char* isa) {
  const Kernels* kernels = isa ? isas().find(isa) : default_kernels();
  if (kernels) chosen().store(kernels, std::memory_order_relaxed);
  return kernels != nullptr;
}

}  // namespace flash::cpu
