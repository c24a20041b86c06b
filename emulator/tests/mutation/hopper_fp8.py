"""The forward kernels of csrc/flash_attn/src/hopper in e4m3, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/hopper_fp8.py

Blocks of V are transposed by the warps that look through them; a mask cuts some, in one of which V
is NaN; factors are of blocks.
"""

from hopper_calls import DEVICE, run_of

__all__ = ["DEVICE", "run"]
run = run_of("fp8")
