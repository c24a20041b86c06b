// The loops of the AVX-512-BF16 unit with its products in software.
#define FLASH_ATTN_ISA soft_dot
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/kernels_dot.inc"

const flash::cpu::Kernels flash::cpu::kernels_soft_dot = {
    "soft_dot", flash::cpu::soft_dot::mha_fwd_dot, flash::cpu::soft_dot::mha_bwd_dot,
    flash::cpu::soft_dot::combine};
