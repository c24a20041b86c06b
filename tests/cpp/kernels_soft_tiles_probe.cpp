// The loops of the AMX unit over tile registers in software.
#define FLASH_ATTN_ISA soft_tiles
#define FLASH_ATTN_VECTOR_WIDTH 16
#define FLASH_ATTN_TILE TileSoft
#include "cpu/tile_soft.h"

#include "cpu/kernels_tiles.inc"
#include "tile_probe.inc"

const flash::cpu::Kernels flash_test::kernels_soft_tiles = {
    "soft_tiles", flash::cpu::soft_tiles::mha_fwd_tiles, flash::cpu::soft_tiles::mha_bwd_tiles,
    flash::cpu::soft_tiles::combine};
const flash_test::TileProbe flash_test::tile_probe_soft_tiles =
    flash::cpu::soft_tiles::probe::make_tile_probe<flash::cpu::soft_tiles::TileSoft>("soft_tiles");
