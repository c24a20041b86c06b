"""Layers of the FlashAttention-2 package."""
