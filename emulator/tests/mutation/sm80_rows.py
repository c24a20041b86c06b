"""The kernels of csrc/flash_attn/src/sm80 in which no two warps share a thing, for tools/mutate.py:
S_dmask, and merging by LSE.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_rows.py --kernel "dmask|combine"
"""

from launches import run_of

run = run_of("dropout and S_dmask", "combine")
