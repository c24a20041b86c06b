"""CUDA kernels on machines without a GPU: CPU tensors on the emulated device."""

from __future__ import annotations

import json
import os
import threading
from typing import Optional

from flash_attn._arguments import wrong_kind
from flash_attn._library import lib

_local = threading.local()
_whole_process = bool(os.environ.get("FLASH_ATTENTION_EMULATOR"))
_ever_entered = _whole_process  # asking the thread takes a microsecond of every call


def in_use() -> bool:
    """Whether this thread's CPU tensors go to CUDA kernels on the emulated device."""
    return _ever_entered and bool(getattr(_local, "stack", _whole_process))


class emulator:
    """Within the context, calls of this thread with CPU tensors run the CUDA kernels, emulated.

    They are the kernels that a GPU runs; the emulator executes them on the CPU, thousands of times
    slower, and checks what they do. What the CUDA backend lacks raises RuntimeError. ::

        with flash_attn.emulator(mode="late", seed=1) as gpu:
            out = flash_attn.flash_attn_func(q, k, v, causal=True)
        print(gpu.counters)  # {'flash_fwd_sm80_bf16_d64_masked': {'launches': 1, ...

    ``gpu.line_counters`` tells the same of every line of the kernels' PTX.

    - arch: "sm_80" (an A100), "sm_90a" (an H100), or, with 99 KiB of shared memory for a CTA,
      "sm_86", "sm_89" or "sm_120" (RTX 3090, 4090 and 5090).
    - mode: when asynchronous operations take effect: "eager", at once; "late", as late as their
      waits allow, their destination poisoned until then; "random", and warps in random order.
    - seed: of mode "random".
    - checks: which faults of a kernel are reported. "all"; "memory", without those that take
      time: bounds, alignment and the rules of single instructions; "none", bounds, alignment and
      what a kernel cannot go on after, which are always reported. Behind it, "+kind" and "-kind"
      for single kinds, as in "all-init_fence" or "memory+race+in_flight".
      Kinds of "all": race, in_flight, proxy_fence, init_fence, undefined_address,
      undefined_guard, undefined_store, undefined_atomic.
      Kinds of "all" and "memory": wgmma_fence, wgmma_registers, aligned_barrier, barrier_again,
      barrier_reduction, mbarrier_again, bulk_wait, copy_at_exit, uniform_branch, shuffle_lane.
      A report ends with its kind.
    - threads: CPU threads that run CTAs; 0 for all.
    - count: whether to count what kernels do, for ``counters``.
    - library: the emulator, by default ``libgpu_emulator.so`` beside the package's.

    Options hold for the emulated device, in all threads. The environment variable
    ``FLASH_ATTENTION_EMULATOR``, "sm_80" or "sm_80,mode=late", does the same for a whole process.
    Raises RuntimeError if the library cannot be loaded or does not know an option or its value.
    """

    def __init__(
        self,
        arch: str = "sm_80",
        *,
        mode: str = "eager",
        seed: int = 0,
        checks: str = "all",
        threads: int = 0,
        count: bool = True,
        library: Optional[str] = None,
    ):
        if not isinstance(arch, str):
            raise wrong_kind("arch", arch, "a str")
        options = {
            "mode": mode,
            "seed": seed,
            "checks": checks,
            "threads": threads,
            "count": int(count),
        }
        self._description = ",".join([arch, *(f"{name}={x}" for name, x in options.items())])
        self._library = library
        self._counters = "{}"

    def __enter__(self) -> emulator:
        global _ever_entered
        lib.use_emulator(self._description, self._library)
        _ever_entered = True
        if not hasattr(_local, "stack"):
            _local.stack = []
        _local.stack.append(self)
        return self

    def __exit__(self, *exception) -> None:
        self._counters = str(lib.emulator_counters())
        _local.stack.pop()
        if _local.stack:
            outer = _local.stack[-1]
            lib.use_emulator(outer._description, outer._library)
        else:
            del _local.stack
            lib.use_emulator(os.environ.get("FLASH_ATTENTION_EMULATOR", ""), None)

    @property
    def counters(self) -> dict:
        """What the launches did, by kernel name: instructions, tensor-core work, memory traffic.

        Of the launches since the context was entered; after it, of those until it was left. They
        are the device's: entering or leaving another context, in any thread, starts them anew.
        ``registers_per_thread`` of "occupancy" is estimated from PTX, within the launch bounds;
        docs/cuda.md and ``tools/kernel_table.py`` tell what ptxas takes.
        """
        return {
            name: {key: x for key, x in kernel.items() if key != "lines"}
            for name, kernel in self._all_counters().items()
        }

    @property
    def line_counters(self) -> dict:
        """The same of every line of PTX that was executed, by kernel name: a list of dicts.

        Each has "line", "class", "executed" and "text", and what the line moved.
        """
        return {name: kernel["lines"] for name, kernel in self._all_counters().items()}

    def _all_counters(self) -> dict:
        if self in getattr(_local, "stack", ()):
            self._counters = str(lib.emulator_counters())
        return json.loads(self._counters or "{}")
