// The loops of the AVX-512-BF16 unit with its products in software.
#define FLASH_ATTN_ISA soft_dot
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/kernels_dot.inc"
#include "tile_probe.inc"

const flash::cpu::Kernels flash_test::kernels_soft_dot = {
    "soft_dot", flash::cpu::soft_dot::mha_fwd_dot, flash::cpu::soft_dot::mha_bwd_dot,
    flash::cpu::soft_dot::combine};
const flash_test::TileProbe flash_test::tile_probe_soft_dot =
    flash::cpu::soft_dot::probe::make_tile_probe<flash::cpu::soft_dot::TileDot>("soft_dot");
