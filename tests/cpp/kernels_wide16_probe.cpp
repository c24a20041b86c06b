#define FLASH_ATTN_ISA wide16
#define FLASH_ATTN_VECTOR_WIDTH 16
#include "cpu/kernels.inc"
#include "isa_probe.inc"

const flash_test::IsaProbe flash_test::probe_wide16 = flash::cpu::wide16::probe::make("wide16");
const flash::cpu::Kernels flash_test::kernels_wide16 = {"wide16", flash::cpu::wide16::mha_fwd_all,
                                                        flash::cpu::wide16::mha_bwd_all,
                                                        flash::cpu::wide16::combine};
