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
#include <string>
#include <utility>

#include "common/api_check_tensor.h"

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

// The value of an environment variable; nullptr if it is not set, or empty.
const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

constexpr const char* kIsaVariable = "FLASH_ATTENTION_CPU_ISA";

[[noreturn]] void fail_isa(const char* wanted) {
  std::string all, here;
  bool known = false;
  for (const char* isa : {"baseline", "avx2", "avx512", "avx512bf16", "amx"}) {
    known = known || std::strcmp(isa, wanted) == 0;
    all = all + " " + isa;
    if (isas().find(isa) != nullptr) here = here + " " + isa;
  }
  require(known, kIsaVariable, " is \"", wanted, "\": it must be one of", all);
  fail(kIsaVariable, " is \"", wanted, "\", which this machine or this build lacks; it has", here);
}

const Kernels* default_kernels() {
  const char* wanted = environment(kIsaVariable);
  if (wanted == nullptr) return isas().list[isas().count - 1];
  const Kernels* found = isas().find(wanted);
  if (found == nullptr) fail_isa(wanted);
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

// Unless another thread has chosen meanwhile.
const Kernels& choose_default() {
  fp32_products();
  const Kernels* none = nullptr;
  chosen.compare_exchange_strong(none, default_kernels(), std::memory_order_relaxed);
  return *chosen.load(std::memory_order_relaxed);
}

}  // namespace

const Kernels* const* available(int* count) {
  *count = isas().count;
  return isas().list;
}

int fp32_products() {
  static const int products = [] {
    constexpr const char* kVariable = "FLASH_ATTENTION_CPU_FP32_PRODUCTS";
    const char* wanted = environment(kVariable);
    if (wanted == nullptr || std::strcmp(wanted, "6") == 0) return 6;
    require(std::strcmp(wanted, "3") == 0, kVariable, " is \"", wanted, "\": it must be 3 or 6");
    return 3;
  }();
  return products;
}

const Kernels& current() {
  const Kernels* kernels = chosen.load(std::memory_order_relaxed);
  return kernels != nullptr ? *kernels : choose_default();
}

bool set_current(const char* isa) {
  fp32_products();
  const Kernels* kernels = isa ? isas().find(isa) : default_kernels();
  if (kernels) chosen.store(kernels, std::memory_order_relaxed);
  return kernels != nullptr;
}

}  // namespace flash::cpu
