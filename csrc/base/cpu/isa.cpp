// Chooses an instruction set at run time. Compiled without ISA flags.
#include "base/cpu/isa.h"

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

#include "base/error.h"

namespace flash::cpu {
namespace {

#if defined(FLASH_ATTN_HAVE_SOFT_TILES)
constexpr int kBuiltIsas = kIsas;
#else
constexpr int kBuiltIsas = kCpuIsas;
#endif

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

IsaList find_isas() {
  IsaList list{{Isa::kBaseline}, 1};
#if defined(FLASH_ATTN_HAVE_AVX2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    for (int i = kCpuIsas; i < kBuiltIsas; ++i) list.isas[list.count++] = static_cast<Isa>(i);
    list.isas[list.count++] = Isa::kAvx2;
  }
#endif
#if defined(FLASH_ATTN_HAVE_AVX512)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return list;
  list.isas[list.count++] = Isa::kAvx512;
#endif
#if defined(FLASH_ATTN_HAVE_AVX512BF16)
  if (!__builtin_cpu_supports("avx512bf16")) return list;
  list.isas[list.count++] = Isa::kAvx512Bf16;
  // Intel's cores start a product of pairs every other cycle: FMA on widened numbers is faster.
  if (!__builtin_cpu_is("amd")) std::swap(list.isas[list.count - 1], list.isas[list.count - 2]);
#endif
#if defined(FLASH_ATTN_HAVE_AMX)
  if (has_amx()) list.isas[list.count++] = Isa::kAmx;
#endif
  return list;
}

constexpr const char* kNames[kIsas] = {"baseline", "avx2",   "avx512",   "avx512bf16",
                                       "amx",      "wide16", "soft_dot", "soft_tiles"};

// The value of an environment variable; nullptr if it is not set, or empty.
const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

constexpr const char* kIsaVariable = "FLASH_ATTENTION_CPU_ISA";

[[noreturn]] void fail_isa(const char* wanted) {
  std::string all, here;
  bool known = false;
  for (int i = 0; i < kBuiltIsas; ++i) {
    known = known || std::strcmp(kNames[i], wanted) == 0;
    all = all + " " + kNames[i];
  }
  for (const Isa isa : available_isas()) here = here + " " + isa_name(isa);
  require(known, kIsaVariable, " is \"", wanted, "\": it must be one of", all);
  fail(kIsaVariable, " is \"", wanted, "\", which this machine or this build lacks; it has", here);
}

// nullptr if it is not available.
const Isa* find(const char* name) {
  for (const Isa& isa : available_isas())
    if (std::strcmp(isa_name(isa), name) == 0) return &isa;
  return nullptr;
}

Isa default_isa() {
  const char* wanted = environment(kIsaVariable);
  if (wanted == nullptr) return available_isas().end()[-1];
  const Isa* found = find(wanted);
  if (found == nullptr) fail_isa(wanted);
  return *found;
}

constexpr int kNone = -1;
std::atomic<int> chosen{kNone};

// Unless another thread has chosen meanwhile.
int choose_default() {
  fp32_products();
  int none = kNone;
  chosen.compare_exchange_strong(none, static_cast<int>(default_isa()), std::memory_order_relaxed);
  return chosen.load(std::memory_order_relaxed);
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

const IsaList& available_isas() {
  static const IsaList list = find_isas();
  return list;
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

Isa current_isa() {
  const int isa = chosen.load(std::memory_order_relaxed);
  return static_cast<Isa>(isa != kNone ? isa : choose_default());
}

bool set_current_isa(const char* name) {
  fp32_products();
  if (name == nullptr) {
    chosen.store(static_cast<int>(default_isa()), std::memory_order_relaxed);
    return true;
  }
  const Isa* isa = find(name);
  if (isa != nullptr) chosen.store(static_cast<int>(*isa), std::memory_order_relaxed);
  return isa != nullptr;
}

}  // namespace flash::cpu
