#define FLASH_ATTN_ISA avx512
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "isa_probe.inc"

const flash_test::IsaProbe flash_test::probe_avx512 = flash::cpu::avx512::probe::make("avx512");
