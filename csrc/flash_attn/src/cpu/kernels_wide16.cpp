// The loops of the AVX-512 unit over vectors of 16 floats that are two of AVX2.
#define FLASH_ATTN_ISA wide16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/kernels.inc"

const flash::cpu::Kernels flash::cpu::kernels_wide16 = {"wide16", flash::cpu::wide16::mha_fwd_all,
                                                        flash::cpu::wide16::mha_bwd_all,
                                                        flash::cpu::wide16::combine};
