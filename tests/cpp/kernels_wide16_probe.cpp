#define FLASH_ATTN_ISA wide16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "isa_probe.inc"

const flash_test::IsaProbe flash_test::probe_wide16 = flash::cpu::wide16::probe::make("wide16");
