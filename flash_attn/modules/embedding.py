"""Embeddings of tokens, positions and token types, on one process or divided over a group."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn._arguments import check_optional, check_tensors
from flash_attn.utils.distributed import all_reduce, group_rank, group_size, reduce_scatter

__all__ = [
    "BertEmbeddings",
    "ColumnParallelEmbedding",
    "GPT2Embeddings",
    "ParallelGPT2Embeddings",
    "VocabParallelEmbedding",
]


def _check_ids(input_ids: Tensor, position_ids: Optional[Tensor]) -> None:
    """Raise for token ids that are not (batch, seqlen), or positions that do not fit them."""
    check_tensors(input_ids=input_ids)
    check_optional(position_ids=position_ids)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, seqlen), got {tuple(input_ids.shape)}")
    _check_beside("position_ids", position_ids, input_ids)


def _check_beside(name: str, ids: Optional[Tensor], input_ids: Tensor) -> None:
    batch, seqlen = input_ids.shape
    if ids is not None and ids.shape not in ((seqlen,), (1, seqlen), (batch, seqlen)):
        raise ValueError(
            f"{name} must be (batch, seqlen) as input_ids {tuple(input_ids.shape)}, or (seqlen,), "
            f"got {tuple(ids.shape)}"
        )


def _positions(module: nn.Module, input_ids: Tensor, position_ids: Optional[Tensor]) -> Tensor:
    """The positions, by default 0 to seqlen - 1."""
    if position_ids is not None:
        return position_ids
    seqlen = input_ids.shape[1]
    if seqlen > module.max_position_embeddings:
        raise ValueError(
            f"input_ids have {seqlen} tokens, max_position_embeddings is "
            f"{module.max_position_embeddings}"
        )
    return torch.arange(seqlen, dtype=torch.long, device=input_ids.device)


def _embedded(name: str, embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """Return the embeddings of ids; raise IndexError for the first of them that has none."""
    if torch.compiler.is_compiling():
        return embedding(ids)
    try:
        return embedding(ids)
    except IndexError:
        count = embedding.num_embeddings * group_size(getattr(embedding, "process_group", None))
        wrong = ((ids < 0) | (ids >= count)).nonzero()[0].tolist()
        at = "".join(f"[{i}]" for i in wrong)
        raise IndexError(
            f"{name} must be 0 to {count - 1}, but {name}{at} is {int(ids[tuple(wrong)])}"
        ) from None


class GPT2Embeddings(nn.Module):
    """Embeddings of tokens and of their positions, added."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: Optional[int] = None,
        word_embed_proj_dim: Optional[int] = None,
        device=None,
        dtype=None,
    ):
        """Make the module.

        Args:
            embed_dim: of the result.
            vocab_size: number of tokens.
            max_position_embeddings: number of positions; 0 or less: they are not embedded.
            padding_idx: the token of padding, which has no gradient.
            word_embed_proj_dim: dimension in which tokens are embedded, to be projected to
                ``embed_dim`` by ``project_in``, which has no bias; None: ``embed_dim``.
            device, dtype: of the parameters.
        """
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        word_dim = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(
            vocab_size, word_dim, padding_idx=padding_idx, **factory
        )
        self.project_in = None
        if word_embed_proj_dim is not None:
            self.project_in = nn.Linear(word_dim, embed_dim, bias=False, **factory)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)

    def forward(self, input_ids: Tensor, position_ids: Optional[Tensor] = None) -> Tensor:
        """Embed tokens.

        Args:
            input_ids: ``(batch, seqlen)`` int32 or int64.
            position_ids: ``(batch, seqlen)`` or ``(seqlen,)``; None: 0 to seqlen - 1.

        Returns:
            ``(batch, seqlen, embed_dim)``.

        Raises:
            ValueError: shapes do not fit, or there are more tokens than positions.
        """
        _check_ids(input_ids, position_ids)
        embeddings = _embedded("input_ids", self.word_embeddings, input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            position_ids = _positions(self, input_ids, position_ids)
            embeddings = embeddings + _embedded(
                "position_ids", self.position_embeddings, position_ids
            )
        return embeddings


class BertEmbeddings(nn.Module):
    """Embeddings of tokens, of their positions and of their types, added."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: Optional[int] = None,
        device=None,
        dtype=None,
    ):
        """Make the module.

        Args:
            embed_dim: of the result.
            vocab_size: number of tokens.
            max_position_embeddings: number of positions; 0 or less: they are not embedded.
            type_vocab_size: number of token types; 0 or less: they are not embedded.
            padding_idx: the token of padding, which has no gradient.
            device, dtype: of the parameters.
        """
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(
            vocab_size, embed_dim, padding_idx=padding_idx, **factory
        )
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, **factory)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        token_type_ids: Optional[Tensor] = None,
    ) -> Tensor:
        """Embed tokens.

        Args:
            input_ids: ``(batch, seqlen)`` int32 or int64.
            position_ids: ``(batch, seqlen)`` or ``(seqlen,)``; None: 0 to seqlen - 1.
            token_type_ids: ``(batch, seqlen)`` or ``(seqlen,)``; None: all 0.

        Returns:
            ``(batch, seqlen, embed_dim)``.

        Raises:
            ValueError: shapes do not fit, or there are more tokens than positions.
        """
        _check_ids(input_ids, position_ids)
        check_optional(token_type_ids=token_type_ids)
        _check_beside("token_type_ids", token_type_ids, input_ids)
        embeddings = _embedded("input_ids", self.word_embeddings, input_ids)
        if self.max_position_embeddings > 0:
            position_ids = _positions(self, input_ids, position_ids)
            embeddings = embeddings + _embedded(
                "position_ids", self.position_embeddings, position_ids
            )
        if self.type_vocab_size > 0:
            if token_type_ids is None:
                token_type_ids = input_ids.new_zeros(input_ids.shape[1])
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return embeddings


def _equal_share(name: str, whole: int, process_group) -> int:
    size = group_size(process_group)
    if whole % size:
        raise ValueError(
            f"{name} ({whole}) must be divisible by the {size} processes of process_group"
        )
    return whole // size


def _share_of_padding(
    padding_idx: Optional[int], num_embeddings: int, first: int, share: int
) -> Optional[int]:
    """The row of padding_idx among this process's, None if it is not among them."""
    if padding_idx is None:
        return None
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx {padding_idx} is not one of {num_embeddings} embeddings")
    row = padding_idx % num_embeddings - first
    return row if 0 <= row < share else None


class VocabParallelEmbedding(nn.Embedding):
    """An embedding whose rows are divided over a process group: ``weight`` ``(share,
    embedding_dim)``."""

    def __init__(self, num_embeddings: int, *args, process_group=None, padding_idx=None, **kwargs):
        """Make this process's part.

        Args:
            num_embeddings: of all processes.
            *args, **kwargs: ``embedding_dim`` and the other arguments of ``torch.nn.Embedding``.
            process_group: the group; None: this process alone.
            padding_idx: the row that has no gradient, of all processes' rows.

        Raises:
            ValueError: the processes do not divide ``num_embeddings``; over a group, ``max_norm``
                or ``scale_grad_by_freq`` is given, which count on seeing all tokens.
        """
        share = _equal_share("num_embeddings", num_embeddings, process_group)
        self.process_group = process_group
        first = group_rank(process_group) * share
        padding_idx = _share_of_padding(padding_idx, num_embeddings, first, share)
        super().__init__(share, *args, padding_idx=padding_idx, **kwargs)
        self.first_embedding = first
        if group_size(process_group) > 1 and (self.max_norm or self.scale_grad_by_freq):
            raise ValueError(
                "max_norm and scale_grad_by_freq must not be given over a process_group: each "
                "process sees its own embeddings alone"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(*, embedding_dim)`` of ids ``(*)``; over a process group this process's
        summand, 0 for the ids of other processes: the caller adds them up.

        Raises:
            IndexError: an id on the CPU is none of the embeddings'.
        """
        size = group_size(self.process_group)
        if size == 1:
            return super().forward(input)
        _check_range(input, size * self.num_embeddings)
        row = input - self.first_embedding
        is_elsewhere = (row < 0) | (row >= self.num_embeddings)
        embeddings = super().forward(row.masked_fill(is_elsewhere, 0))
        return embeddings.masked_fill(is_elsewhere.unsqueeze(-1), 0.0)


def _check_range(ids: Tensor, num_embeddings: int) -> None:
    if torch.compiler.is_compiling() or not ids.is_cpu or ids.numel() == 0:
        return
    smallest, largest = torch.aminmax(ids)
    if smallest < 0 or largest >= num_embeddings:
        raise IndexError(
            f"ids must be between 0 and {num_embeddings - 1}, got {int(smallest)} to {int(largest)}"
        )


class ColumnParallelEmbedding(nn.Embedding):
    """An embedding whose columns are divided over a process group: ``weight`` ``(num_embeddings,
    share)``. Its forward returns this process's columns ``(*, share)``."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *args, process_group=None, **kwargs
    ):
        """Make this process's part.

        Args:
            num_embeddings: number of rows.
            embedding_dim: of all processes.
            *args, **kwargs: the other arguments of ``torch.nn.Embedding``.
            process_group: the group; None: this process alone.

        Raises:
            ValueError: the processes do not divide ``embedding_dim``.
        """
        share = _equal_share("embedding_dim", embedding_dim, process_group)
        self.process_group = process_group
        super().__init__(num_embeddings, share, *args, **kwargs)


class ParallelGPT2Embeddings(nn.Module):
    """``GPT2Embeddings`` divided over a process group: tokens by rows, positions by columns."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group,
        padding_idx: Optional[int] = None,
        sequence_parallel: bool = True,
        device=None,
        dtype=None,
    ):
        """Make this process's part.

        Args:
            embed_dim, vocab_size, max_position_embeddings, padding_idx, device, dtype: as for
                ``GPT2Embeddings``, of the whole.
            process_group: the group; None: this process alone.
            sequence_parallel: whether each process gets its share of the result, along the first
                dimension, rather than all.

        Raises:
            ValueError: the processes do not divide ``vocab_size`` or ``embed_dim``.
        """
        super().__init__()
        options = {"process_group": process_group, "device": device, "dtype": dtype}
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size, embed_dim, padding_idx=padding_idx, **options
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(
                max_position_embeddings, embed_dim, **options
            )

    def _position_summand(self, position_ids: Tensor) -> Tensor:
        """This process's columns of the positions' embeddings, in zeros."""
        columns = _embedded("position_ids", self.position_embeddings, position_ids)
        share, rank = columns.shape[-1], group_rank(self.process_group)
        after = group_size(self.process_group) - 1 - rank
        return F.pad(columns, (rank * share, after * share))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        combine_batch_seqlen_dim: bool = False,
    ) -> Tensor:
        """Embed tokens, which every process is given all of.

        Args:
            input_ids: ``(batch, seqlen)`` int32 or int64.
            position_ids: ``(batch, seqlen)`` or ``(seqlen,)``; None: 0 to seqlen - 1.
            combine_batch_seqlen_dim: whether the result is to have one dimension of tokens.

        Returns:
            ``(batch, seqlen, embed_dim)``, or ``(batch * seqlen, embed_dim)`` combined; with
            ``sequence_parallel`` this process's share of the first dimension.

        Raises:
            ValueError: shapes do not fit, there are more tokens than positions, or the processes do
                not divide the first dimension.
        """
        _check_ids(input_ids, position_ids)
        embeddings = _embedded("input_ids", self.word_embeddings, input_ids)
        if self.max_position_embeddings > 0:
            position_ids = _positions(self, input_ids, position_ids)
            embeddings = embeddings + self._position_summand(position_ids)
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if group_size(self.process_group) == 1:
            return embeddings
        reduce = reduce_scatter if self.sequence_parallel else all_reduce
        return reduce(embeddings, self.process_group)
