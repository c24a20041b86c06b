"""The forward kernels of csrc/flash_attn/src/hopper, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/hopper_fwd.py

One CTA takes several tiles in turn, so that every ring goes round more than once and what a tile
leaves behind meets the next one; some blocks of keys need no mask, some are cut and hold a NaN that
not every query sees.
"""

from hopper_calls import DEVICE, run_of

__all__ = ["DEVICE", "run"]
run = run_of("windowed", "small tiles", "plain")
