"""Attention of sequences that several processes share (docs/distributed.md)."""

from flash_attn.distributed.context import ContextParallel, share_sequences
from flash_attn.distributed.layout import (
    local_cu_seqlens,
    position_ids,
    position_ids_varlen,
    shard_lengths,
    shard_sequence,
    shard_varlen,
    unshard_sequence,
    unshard_varlen,
)
from flash_attn.distributed.ring import ring_attention, ring_attention_varlen
from flash_attn.distributed.ulysses import (
    hybrid_attention,
    ulysses_attention,
    ulysses_attention_varlen,
)

__all__ = [
    "ContextParallel",
    "hybrid_attention",
    "local_cu_seqlens",
    "position_ids",
    "position_ids_varlen",
    "ring_attention",
    "ring_attention_varlen",
    "shard_lengths",
    "shard_sequence",
    "shard_varlen",
    "share_sequences",
    "ulysses_attention",
    "ulysses_attention_varlen",
    "unshard_sequence",
    "unshard_varlen",
]
