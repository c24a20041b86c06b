#include "cpu/cpu_backend.h"

namespace flash::cpu {

const Kernels& kernels_of(Isa isa) {
  switch (isa) {
#if defined(FLASH_ATTN_HAVE_AVX2)
    case Isa::kAvx2:
      return kernels_avx2;
#endif
#if defined(FLASH_ATTN_HAVE_AVX512)
    case Isa::kAvx512:
      return kernels_avx512;
#endif
#if defined(FLASH_ATTN_HAVE_AVX512BF16)
    case Isa::kAvx512Bf16:
      return kernels_avx512bf16;
#endif
#if defined(FLASH_ATTN_HAVE_AMX)
    case Isa::kAmx:
      return kernels_amx;
#endif
#if defined(FLASH_ATTN_HAVE_WIDE16)
    case Isa::kWide16:
      return kernels_wide16;
#endif
#if defined(FLASH_ATTN_HAVE_SOFT_DOT)
    case Isa::kSoftDot:
      return kernels_soft_dot;
#endif
#if defined(FLASH_ATTN_HAVE_SOFT_TILES)
    case Isa::kSoftTiles:
      return kernels_soft_tiles;
#endif
    default:
      return kernels_baseline;
  }
}

}  // namespace flash::cpu
