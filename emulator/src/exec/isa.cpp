#include "isa.h"

#include "isa_variants.h"

namespace gpu_emulator::exec {

std::vector<const Isa*> available_isas() {
  std::vector<const Isa*> list = {&isa_baseline::isa()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    list.push_back(&isa_avx2::isa());
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    list.push_back(&isa_avx512::isa());
  }
#endif
  return list;
}

const Isa& best_isa() { return *available_isas().back(); }

}  // namespace gpu_emulator::exec
