"""The decode kernels of csrc/flash_attn/src/sm80 that read pages, for tools/mutate.py.

    GPU_EMULATOR_LIBRARY=build/release/lib/libgpu_emulator.so python emulator/tools/mutate.py \\
        emulator/tests/mutation/sm80_pages.py

Keys lie in pages, several CTAs share them and the last one merges; at d = 256 Q stays in shared
memory. New keys are appended by the CTA that reads them, rotated, and so are queries.
"""

from launches import run_of

run = run_of(
    "decode d=128, pages",
    "decode d=256, pages",
    *(f"decode d={dim}, append" for dim in (128, 256)),
)
