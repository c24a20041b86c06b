"""Exact attention for PyTorch on CPUs and GPUs, with the interface of FlashAttention-2."""

import importlib
from pkgutil import extend_path

import torch.nn.attention

from flash_attn._emulator import emulator
from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3.post1"

# Other distributions may add subpackages to this name.
__path__ = extend_path(__path__, __name__)

__all__ = [
    "emulator",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def __getattr__(name: str):
    """Import ``flash_attn.integrations`` when it is first asked for."""
    if name == "integrations":
        return importlib.import_module("flash_attn.integrations")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _activate():
    """Run PyTorch's attention on the CPU on this package; the result's ``remove()`` ends it."""
    from flash_attn.integrations import sdpa

    sdpa.register()
    return sdpa.Handle()


if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl("flash_attn", register_fn=_activate)
