#define FLASH_ATTN_ISA avx512
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/kernels.inc"

const flash::cpu::Kernels flash::cpu::kernels_avx512 = {"avx512", flash::cpu::avx512::mha_fwd_all,
                                                        flash::cpu::avx512::mha_bwd_all,
                                                        flash::cpu::avx512::combine};
