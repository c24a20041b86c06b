"""How a model shares its sequences: what its attention and its rotary embedding need to know."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Optional

import torch
from torch import Tensor

from flash_attn._arguments import check_tensors
from flash_attn.distributed._agreement import Call, agreed, rank_and_size
from flash_attn.distributed._checks import outside_graphs
from flash_attn.distributed.layout import (
    as_group,
    check_layout,
    dense_segments,
    indices_of,
    is_mesh,
    position_ids_varlen,
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

__all__ = ["ContextParallel", "share_sequences"]

_METHODS = ("ring", "ulysses", "hybrid")


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """Sequences whose tokens processes share, and how they attend over them.

    ``MHA(..., head_options=HeadOptions(context_parallel=ContextParallel(group)))`` attends over the
    group; all else in a model goes by tokens, so that each process runs it on its own. Called, it
    is attention of a dense batch.

    Attributes:
        group: a process group, a DeviceMesh of one dimension, or None: torch's default group. With
            "hybrid" a DeviceMesh of two dimensions, the ring's and Ulysses'.
        method: "ring", "ulysses" or "hybrid".
        layout: "contiguous" or "zigzag".

    Raises:
        ValueError: a method or layout that there is not.
        TypeError: a group that does not go with the method.
    """

    group: object = None
    method: str = "ring"
    layout: str = "contiguous"

    def __post_init__(self):
        check_layout(self.layout)
        if self.method not in _METHODS:
            raise ValueError(
                f"method must be 'ring', 'ulysses' or 'hybrid', got {self.method!r:.80}"
            )
        if self.method != "hybrid":
            as_group(self.group)
        elif not is_mesh(self.group) or self.group.ndim != 2:
            raise TypeError("method 'hybrid' needs a DeviceMesh of two dimensions as its group")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options):
        """Attention of a dense batch: ``ring_attention``, ``ulysses_attention`` or
        ``hybrid_attention``, with their arguments but for the group and the layout."""
        if self.method == "hybrid":
            return hybrid_attention(q, k, v, mesh=self.group, layout=self.layout, **options)
        attention = ring_attention if self.method == "ring" else ulysses_attention
        return attention(q, k, v, group=self.group, layout=self.layout, **options)

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options
    ):
        """Attention of packed sequences; ``cu_seqlens_*`` are those of the whole ones."""
        if self.method == "hybrid":
            raise ValueError("packed sequences need method 'ring' or 'ulysses', got 'hybrid'")
        attention = ring_attention_varlen if self.method == "ring" else ulysses_attention_varlen
        options.update(group=self.group, layout=self.layout)
        return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)

    def shard(self, x: Tensor, dim: int = 1, cu_seqlens: Optional[Tensor] = None) -> Tensor:
        """This process' tokens: ``shard_sequence`` or, with ``cu_seqlens``, ``shard_varlen``."""
        if cu_seqlens is not None:
            return shard_varlen(x, cu_seqlens, self.group, self.layout)
        return shard_sequence(x, dim, self.group, self.layout)

    def unshard(
        self,
        x: Tensor,
        dim: int = 1,
        seqlen: Optional[int] = None,
        cu_seqlens: Optional[Tensor] = None,
    ) -> Tensor:
        """The whole: ``unshard_sequence`` or, with ``cu_seqlens``, ``unshard_varlen``."""
        if cu_seqlens is not None:
            return unshard_varlen(x, cu_seqlens, self.group, self.layout)
        return unshard_sequence(x, dim, self.group, self.layout, seqlen)

    @outside_graphs
    def position_ids(self, tokens: int, device=None) -> tuple[Tensor, int]:
        """Positions of this process' tokens, and the length of the whole sequence.

        Args:
            tokens: the number that this process has. The processes tell each other theirs: all of
                them must call.
            device: of the positions, and of what the group sends.

        Returns:
            ``(positions, seqlen)``: int64 ``(tokens,)``, and an int.

        Raises:
            ValueError: these are not the numbers that the layout gives the processes.
        """
        if self.method != "hybrid":
            rank, lengths = _lengths(tokens, as_group(self.group), device)
            segments = dense_segments("x", lengths, self.layout)[rank]
            return indices_of(segments).to(device), sum(lengths)
        ring, inner = (self.group.get_group(dim) for dim in range(2))
        inner_rank, inner_lengths = _lengths(tokens, inner, device)
        rank, lengths = _lengths(sum(inner_lengths), ring, device)
        positions = indices_of(dense_segments("x", lengths, self.layout)[rank])
        return positions.split(inner_lengths)[inner_rank].to(device), sum(lengths)

    def position_ids_varlen(self, cu_seqlens: Tensor) -> Tensor:
        """The position of each of this process' tokens in its own sequence, int64 (tokens,)."""
        check_tensors(cu_seqlens=cu_seqlens)
        return position_ids_varlen(cu_seqlens, self.group, self.layout)


def share_sequences(model: torch.nn.Module, context: Optional[ContextParallel]) -> torch.nn.Module:
    """Let all attention modules of a model share sequences, as ``HeadOptions.context_parallel``
    does when one is made.

    Args:
        model: with ``MHA`` or ``ParallelMHA`` modules, such as ``GPTLMHeadModel``. It is then given
            this process' tokens. Learned positions, of the model here or of ``GPT2Embeddings`` and
            the like in another one, are those of the whole sequence without ``position_ids``; the
            processes tell each other how many tokens they have.
        context: how; None: no longer.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no such module, or one of a kind that cannot; none is changed.
    """
    from flash_attn.modules._heads import HeadAttention

    modules = {n: m for n, m in model.named_modules() if isinstance(m, HeadAttention)}
    if not modules:
        raise ValueError("model must have MHA or ParallelMHA modules, it has none")
    for name, module in modules.items():
        for attribute, needed in (
            ("use_flash_attn", True),
            ("cross_attn", False),
            ("dwconv", False),
        ):
            value = getattr(module, attribute, needed)
            if bool(value) != needed:
                where = f"{name}.{attribute}" if name else attribute
                raise ValueError(f"{where} must be {needed} to share sequences, got {value}")
    for module in modules.values():
        module.context_parallel = context
    for module in model.modules():
        _share_positions(module, context)
    return model


def _share_positions(module: torch.nn.Module, context: Optional[ContextParallel]) -> None:
    """Let a module of learned positions, if it is one, find those of its tokens in the whole."""
    before = module.__dict__.pop("_shared_positions", None)
    if before is not None:
        before.remove()
    counts = (getattr(module, n, None) for n in ("max_positions", "max_position_embeddings"))
    most = next((n for n in counts if isinstance(n, int) and n > 0), None)
    names = tuple(inspect.signature(module.forward).parameters)
    if context is not None and most is not None and "position_ids" in names:
        hook = functools.partial(_with_positions, context, names, most)
        module._shared_positions = module.register_forward_pre_hook(hook, with_kwargs=True)


def _with_positions(context: ContextParallel, names, most: int, module, args, kwargs):
    """Add ``position_ids`` to a call that lacks them: a forward pre-hook.

    Raises:
        ValueError: the whole sequence has more tokens than positions.
    """
    given = {**dict(zip(names, args)), **kwargs}
    ids = given.get("input_ids")
    is_usual = given.get("position_ids") is None and given.get("inference_params") is None
    if not is_usual or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None  # as it is asked, or an error of the module's own
    if given.get("cu_seqlens") is not None:
        positions = context.position_ids_varlen(given["cu_seqlens"])
    else:
        positions, seqlen = context.position_ids(ids.shape[1], ids.device)
        if seqlen > most:
            raise ValueError(
                f"input_ids have {seqlen} tokens over all processes, the model has {most} positions"
            )
    return (), {**given, "position_ids": positions[None]}


def _lengths(tokens: int, group, device) -> tuple[int, list[int]]:
    """This process' place in the group, and the numbers of tokens of all."""
    rank, size = rank_and_size(group)
    if size == 1:
        return rank, [tokens]
    call = Call("sharing of tokens", {}, {"tokens": tokens})
    device = None if device is None else torch.device(device)
    return rank, [own["tokens"] for own in agreed(lambda: call, group, device)]
