#define FLASH_ATTN_ISA avx512bf16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/exp2_bf16.h"
#include "cpu/tile_dot.h"

#include "tile_probe.inc"

const flash_test::TileProbe flash_test::tile_probe_avx512bf16 =
    flash::cpu::avx512bf16::probe::make_tile_probe<flash::cpu::avx512bf16::TileDot>("avx512bf16");
