#define FLASH_ATTN_ISA amx
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/exp2_bf16.h"
#include "cpu/tile_amx.h"

#include "tile_probe.inc"

const flash_test::TileProbe flash_test::tile_probe_amx =
    flash::cpu::amx::probe::make_tile_probe<flash::cpu::amx::TileAmx>("amx");
