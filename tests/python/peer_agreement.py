"""Whether a peer of the benchmarks computes what this package does, for a process of its own.

Other libraries change the process that loads them: the OpenCL runtime of oneDNN's SYCL build
handles SIGCHLD, and OpenVINO leaves the thread an alternate signal stack that it has freed.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from scripts import ROOT


def differences(name: str, dtype: str, causal: bool) -> tuple[float, float] | str:
    """Differences over what is tolerated: from the same mask, and from the other one.

    A sentence where the peer cannot run the case.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from cases.case import Case, make_inputs
    from measuring.measure import _difference
    from peers.registry import PEERS
    from peers.unsupported import Unsupported

    torch.set_num_threads(1)
    case = Case("fwd", dtype, 2, 48, 48, 4, 4, 32, 32, causal)
    inputs = make_inputs(case)
    try:
        run = PEERS[name](case, inputs)
    except Unsupported as reason:
        return str(reason)

    def difference(ours: Case) -> float:
        return float(_difference(run(), PEERS["flash_attn"](ours, inputs)(), case.torch_dtype))

    return difference(case), difference(dataclasses.replace(case, causal=not causal))
