#define FLASH_ATTN_ISA amx
#define FLASH_ATTN_VECTOR_WIDTH 16
#define FLASH_ATTN_TILE TileAmx
#include "cpu/tile_amx.h"

#include "cpu/kernels_tiles.inc"

const flash::cpu::Kernels flash::cpu::kernels_amx = {"amx", flash::cpu::amx::mha_fwd_tiles,
                                                     flash::cpu::amx::mha_bwd_tiles,
                                                     flash::cpu::amx::combine};
