#define FLASH_ATTN_ISA avx2
#define FLASH_ATTN_VECTOR_WIDTH 8
#include "isa_probe.inc"

const flash_test::IsaProbe flash_test::probe_avx2 = flash::cpu::avx2::probe::make("avx2");
