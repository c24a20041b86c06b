#define FLASH_ATTN_ISA avx2
#define FLASH_ATTN_VECTOR_WIDTH 8
#include "cpu/kernels.inc"

const flash::cpu::Kernels flash::cpu::kernels_avx2 = {"avx2", flash::cpu::avx2::mha_fwd_all,
                                                      flash::cpu::avx2::mha_bwd_all,
                                                      flash::cpu::avx2::combine};
