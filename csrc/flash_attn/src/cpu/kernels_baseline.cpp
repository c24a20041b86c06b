#define FLASH_ATTN_ISA baseline
#define FLASH_ATTN_VECTOR_WIDTH 4
#include "cpu/kernels.inc"

const flash::cpu::Kernels flash::cpu::kernels_baseline = {
    "baseline", flash::cpu::baseline::mha_fwd_all, flash::cpu::baseline::mha_bwd_all,
    flash::cpu::baseline::combine};
