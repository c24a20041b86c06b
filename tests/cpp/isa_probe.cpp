#include "isa_probe.h"

#include <cstdlib>
#include <cstring>

namespace flash_test {
namespace {

std::vector<const flash::cpu::Kernels*> library_kernels() {
  std::vector<const flash::cpu::Kernels*> kernels;
  for (const flash::cpu::Isa isa : flash::cpu::available_isas())
    kernels.push_back(&flash::cpu::kernels_of(isa));
  return kernels;
}

bool runs(const char* isa) {
  for (const flash::cpu::Kernels* kernels : library_kernels())
    if (std::strcmp(kernels->isa, isa) == 0) return true;
  return false;
}

std::vector<const IsaProbe*> find_probes() {
  std::vector<const IsaProbe*> probes = {&probe_baseline};
#if defined(FLASH_ATTN_HAVE_AVX2)
  if (runs("avx2")) probes.push_back(&probe_avx2);
#endif
#if defined(FLASH_ATTN_HAVE_WIDE16)
  if (runs("wide16")) probes.push_back(&probe_wide16);
#endif
#if defined(FLASH_ATTN_HAVE_AVX512)
  if (runs("avx512")) probes.push_back(&probe_avx512);
#endif
  return probes;
}

std::vector<const TileProbe*> find_tile_probes() {
  std::vector<const TileProbe*> probes;
#if defined(FLASH_ATTN_HAVE_SOFT_DOT)
  if (runs("soft_dot")) probes.push_back(&tile_probe_soft_dot);
#endif
#if defined(FLASH_ATTN_HAVE_SOFT_TILES)
  if (runs("soft_tiles")) probes.push_back(&tile_probe_soft_tiles);
#endif
#if defined(FLASH_ATTN_HAVE_AVX512BF16)
  if (runs("avx512bf16")) probes.push_back(&tile_probe_avx512bf16);
#endif
#if defined(FLASH_ATTN_HAVE_AMX)
  if (runs("amx")) probes.push_back(&tile_probe_amx);
#endif
  return probes;
}

// FLASH_ATTENTION_CPU_ISA in the environment leaves its instruction set alone.
std::vector<const flash::cpu::Kernels*> find_kernels() {
  if (std::getenv("FLASH_ATTENTION_CPU_ISA"))
    return {&flash::cpu::kernels_of(flash::cpu::current_isa())};
  return library_kernels();
}

}  // namespace

const std::vector<const IsaProbe*>& isa_probes() {
  static const std::vector<const IsaProbe*> probes = find_probes();
  return probes;
}

const std::vector<const TileProbe*>& tile_probes() {
  static const std::vector<const TileProbe*> probes = find_tile_probes();
  return probes;
}

const std::vector<const flash::cpu::Kernels*>& all_kernels() {
  static const std::vector<const flash::cpu::Kernels*> kernels = find_kernels();
  return kernels;
}

}  // namespace flash_test
