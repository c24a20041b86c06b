"""FlashAttention-3's package: its operators, ``torch.ops.flash_attn_3``, and its interface."""

from importlib.metadata import PackageNotFoundError, version

from flash_attn_3 import _C

try:
    __version__ = version("flash-attn-3")
except PackageNotFoundError:  # from the sources
    __version__ = "0+unknown"

__all__ = ["_C", "__version__"]
