"""The forward kernels of csrc/flash_attn/src/hopper for calls without a mask, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/hopper_unmasked.py

Two CTAs, a cluster where the kernel has clusters, take several tiles in turn.
"""

from hopper_calls import DEVICE, run_of

__all__ = ["DEVICE", "run"]
run = run_of("unmasked", "unmasked small tiles", sms=2)
