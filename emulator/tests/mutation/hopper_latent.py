"""The decode kernel of csrc/flash_attn/src/hopper, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/hopper_latent.py

Multi-head latent attention: two warpgroups share the keys of a block and the columns of V, which is
a part of K.
"""

from hopper_calls import DEVICE, run_of

__all__ = ["DEVICE", "run"]
run = run_of("latent caches", "shared latent cache", "latent row by row")
