"""FlashAttention-3's Python interface on this package's operators.

The distribution flash-attn-3 (``hopper/``) gives it the names that others import,
``flash_attn_interface`` and ``flash_attn_3``. Without it nothing here is found by packages that
choose FlashAttention-3 as soon as it is there.
"""

from flash_attn.v3.interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]
