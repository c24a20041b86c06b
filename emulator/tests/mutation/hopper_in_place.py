"""The forward kernels of csrc/flash_attn/src/hopper that put O into Q's place, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/hopper_in_place.py

Tiles without keys come between others.
"""

from hopper_calls import DEVICE, run_of

__all__ = ["DEVICE", "run"]
run = run_of("in Q's place", "packed, in Q's place")
