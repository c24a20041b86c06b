"""Which of the other libraries are here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from peers import ggml, onednn, openvino
from peers.unsupported import Unsupported

_MODULES = {
    "onednn": ("oneDNN", onednn),
    "openvino": ("OpenVINO", openvino),
    "ggml": ("ggml-python", ggml),
}


def versions(peers: Iterable[str]) -> str:
    """Names and versions of those among the peers that are installed; loads these alone."""
    found = []
    for peer, (name, module) in _MODULES.items():
        with contextlib.suppress(Unsupported):
            if peer in peers:
                found.append(f"{name} {module.version()}")
    return ", ".join(found)
