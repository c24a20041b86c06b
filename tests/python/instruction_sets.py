"""The instruction sets that tests run on.

FLASH_ATTN_TEST_ISA=avx2 in the environment: those that a machine has whose best is avx2.
"""

from __future__ import annotations

import os

from flash_attn import _library

OF_CPUS = ["baseline", "avx2", "avx512", "avx512bf16", "amx"]
# What builds for tests have of those that a CPU may lack: the same loops, their vectors, products
# of pairs and tiles in software of AVX2.
SOFTWARE = {"wide16": "avx512", "soft_dot": "avx512bf16", "soft_tiles": "amx"}
ALL_ISAS = OF_CPUS + [isa for isa in SOFTWARE if isa in _library.cpu_isas()]


def isas_to_test(available: list[str], best: str | None = None) -> list[str]:
    """Every loop once: software where the machine lacks what it stands for. ``best``: where it
    lacks all that are better."""
    lacking = OF_CPUS[OF_CPUS.index(best) + 1 :] if best else []
    here = [isa for isa in available if isa not in lacking]
    return [isa for isa in here if SOFTWARE.get(isa) not in here]


ISAS = isas_to_test(_library.cpu_isas(), os.environ.get("FLASH_ATTN_TEST_ISA"))
# Those that fused operators have loops for.
OPERATOR_ISAS = [isa for isa in ISAS if isa in ("baseline", "avx2", "avx512", "wide16")]
