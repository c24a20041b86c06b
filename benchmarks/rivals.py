"""Which of the other libraries are here."""

from __future__ import annotations

import contextlib
import functools

import rival_ggml
import rival_onednn
import rival_openvino
from errors import Unsupported

_MODULES = {"oneDNN": rival_onednn, "OpenVINO": rival_openvino, "ggml-python": rival_ggml}


@functools.cache
def versions() -> str:
    """Names and versions of those that are installed."""
    found = []
    for name, module in _MODULES.items():
        with contextlib.suppress(Unsupported):
            found.append(f"{name} {module.version()}")
    return ", ".join(found)
