#define FLASH_ATTN_ISA soft_tiles
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/exp2_bf16.h"
#include "cpu/tile_soft.h"

#include "tile_probe.inc"

const flash_test::TileProbe flash_test::tile_probe_soft_tiles =
    flash::cpu::soft_tiles::probe::make_tile_probe<flash::cpu::soft_tiles::TileSoft>("soft_tiles");
