"""The forward kernels of csrc/flash_attn/src/hopper on packed batches, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/hopper_packed.py

Rows of other sequences and NaN follow the last keys; the ends of tiles are stored by warps; there
are rows of no sequence and sequences without keys.
"""

from hopper_calls import DEVICE, run_of

__all__ = ["DEVICE", "run"]
run = run_of("packed")
