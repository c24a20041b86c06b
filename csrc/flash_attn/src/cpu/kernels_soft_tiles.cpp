// The loops of the AMX unit over tile registers in software.
#define FLASH_ATTN_ISA soft_tiles
#define FLASH_ATTN_VECTOR_WIDTH 16
#define FLASH_ATTN_TILE TileSoft
#include "cpu/tile_soft.h"

#include "cpu/kernels_tiles.inc"

const flash::cpu::Kernels flash::cpu::kernels_soft_tiles = {
    "soft_tiles", flash::cpu::soft_tiles::mha_fwd_tiles, flash::cpu::soft_tiles::mha_bwd_tiles,
    flash::cpu::soft_tiles::combine};
