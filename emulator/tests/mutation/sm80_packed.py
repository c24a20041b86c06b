"""The forward kernel of csrc/flash_attn/src/sm80 on packed batches, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_packed.py

A warp finds the sequence of its CTA's tile and leaves it in shared memory; keys are dense or in
pages.
"""

from launches import run_of

run = run_of("packed", "packed, pages")
