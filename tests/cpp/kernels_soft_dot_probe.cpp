#define FLASH_ATTN_ISA soft_dot
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/exp2_bf16.h"
#include "cpu/tile_dot.h"

#include "tile_probe.inc"

const flash_test::TileProbe flash_test::tile_probe_soft_dot =
    flash::cpu::soft_dot::probe::make_tile_probe<flash::cpu::soft_dot::TileDot>("soft_dot");
