#define FLASH_ATTN_ISA avx512bf16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/kernels_dot.inc"

const flash::cpu::Kernels flash::cpu::kernels_avx512bf16 = {
    "avx512bf16", flash::cpu::avx512bf16::mha_fwd_dot, flash::cpu::avx512bf16::mha_bwd_dot,
    flash::cpu::avx512bf16::combine};
