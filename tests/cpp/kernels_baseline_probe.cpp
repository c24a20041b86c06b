#define FLASH_ATTN_ISA baseline
#define FLASH_ATTN_VECTOR_WIDTH 4
#include "isa_probe.inc"

const flash_test::IsaProbe flash_test::probe_baseline =
    flash::cpu::baseline::probe::make("baseline");
