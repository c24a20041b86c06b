#define FLASH_ATTN_ISA avx2
#define FLASH_ATTN_VECTOR_WIDTH 8
#include "activations/cpu/activations.h"
#include "activations/cpu/kernels.h"

namespace flash::activations::cpu {

const Kernels kernels_avx2 = {avx2::activation_fwd, avx2::activation_bwd};

}  // namespace flash::activations::cpu
