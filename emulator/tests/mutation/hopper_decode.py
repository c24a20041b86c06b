"""The decode kernel of csrc/flash_attn/src/hopper, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/hopper_decode.py

Units that a CTA merges and units that two share; keys by TMA and row by row; a NaN in V that one
query does not see, and NaN behind the last keys.
"""

from hopper_calls import DEVICE, run_of

__all__ = ["DEVICE", "run"]
run = run_of("caches", "shared cache", "row by row")
