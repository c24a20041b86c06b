"""Modules of the FlashAttention-2 package."""
