"""Registers ``torch.ops.flash_attn_3.*``, as FlashAttention-3's extension module does."""

from flash_attn.v3 import _ops  # noqa: F401
