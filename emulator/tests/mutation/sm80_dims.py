"""The forward kernels of csrc/flash_attn/src/sm80 of other tiles than sm80_fwd.py's, for
tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_dims.py
"""

from launches import run_of

run = run_of(
    "dense d=32x32 masked",
    "dense d=64x64 unmasked",
    "dense d=96x96 modified",
    "dense d=128x128 masked",
    "dense d=192x128 masked",
    "dense d=256x256 modified",
)
