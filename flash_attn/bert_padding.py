"""Removing and restoring padding around variable-length attention.

A padded batch is ``(batch, seqlen, ...)`` with a mask of its real tokens; a packed ("varlen") batch
is ``(total_tokens, ...)`` with cumulative sequence lengths. All functions are differentiable in the
token data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def _scatter_rows(values: torch.Tensor, indices: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Zeros of ``num_rows`` rows with ``values`` written at the distinct rows ``indices``."""
    rows = values.new_zeros((num_rows, *values.shape[1:]))
    rows[indices] = values
    return rows


class IndexFirstAxis(torch.autograd.Function):
    """``input[indices]`` along the first axis, for distinct ``indices``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, indices):
        return input.index_select(0, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, indices = inputs
        _save(ctx, indices)
        ctx.num_rows = input.shape[0]

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        return _scatter_rows(grad_output, indices, ctx.num_rows), None

    @staticmethod
    def jvp(ctx, tangent, _):
        (indices,) = ctx.saved_tensors
        return tangent.index_select(0, indices)


class IndexPutFirstAxis(torch.autograd.Function):
    """Zeros of ``first_axis_dim`` rows with ``values`` at the distinct rows ``indices``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values, indices, first_axis_dim):
        return _scatter_rows(values, indices, first_axis_dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices, ctx.num_rows = inputs
        _save(ctx, indices)

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (indices,) = ctx.saved_tensors
        return _scatter_rows(tangent, indices, ctx.num_rows)


class IndexFirstAxisResidual(torch.autograd.Function):
    """``(input[indices], input)``: gathered rows, and the input for a residual connection.

    The gradient of the gathered rows is added to the gradient of the residual branch in one pass,
    instead of scattering it into a tensor of zeros first.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input, indices):
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs[1])

    @staticmethod
    def backward(ctx, grad_output, grad_residual):
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None

    @staticmethod
    def jvp(ctx, tangent, _):
        (indices,) = ctx.saved_tensors
        return tangent.index_select(0, indices), tangent.view_as(tangent)


def _save(ctx, indices: torch.Tensor) -> None:
    ctx.save_for_backward(indices)
    ctx.save_for_forward(indices)


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather rows.

    Args:
        input: ``(rows, ...)``.
        indices: ``(n,)`` int64, distinct row numbers.

    Returns:
        ``(n, ...)``, dtype of ``input``. Its gradient is zero in the rows that were not picked.
    """
    if torch.compiler.is_compiling():  # it does not trace functions with a jvp
        return input.index_select(0, indices)
    return IndexFirstAxis.apply(input, indices)


def index_put_first_axis(
    values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int
) -> torch.Tensor:
    """Scatter rows into zeros.

    Args:
        values: ``(n, ...)``.
        indices: ``(n,)`` int64, distinct row numbers below ``first_axis_dim``.
        first_axis_dim: number of rows of the result.

    Returns:
        ``(first_axis_dim, ...)``, dtype of ``values``, zero in the rows that were not written.
    """
    if torch.compiler.is_compiling():
        return _scatter_rows(values, indices, first_axis_dim)
    return IndexPutFirstAxis.apply(values, indices, first_axis_dim)


def index_first_axis_residual(
    input: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather rows and pass the input on for a residual connection.

    Args:
        input: ``(rows, ...)``.
        indices: ``(n,)`` int64, distinct row numbers.

    Returns:
        ``(gathered, residual)``: ``(n, ...)`` and ``(rows, ...)``; the second has the values of
        ``input``. Gradients of both flow back into ``input``.
    """
    if torch.compiler.is_compiling():
        return input.index_select(0, indices), input.view_as(input)
    return IndexFirstAxisResidual.apply(input, indices)


def _cumulative(seqlens: torch.Tensor) -> torch.Tensor:
    """``(b,)`` lengths -> ``(b + 1,)`` int32 cumulative lengths that start at 0."""
    return F.pad(torch.cumsum(seqlens, dim=0, dtype=torch.int32), (1, 0))


def _check_mask(name: str, mask: torch.Tensor, hidden_states: torch.Tensor) -> None:
    """Raise ValueError if the mask is not (b, s) as ``hidden_states`` is (b, s, ...)."""
    if torch.compiler.is_compiling() and mask.dim() == 2:
        for size, expected in zip(mask.shape, hidden_states.shape):
            torch._check(size == expected)  # no branch on a length that is not known yet
    elif mask.shape != hidden_states.shape[:2] or mask.dim() != 2:
        raise ValueError(
            f"{name} must be (b, s) as hidden_states (b, s, ...), got {tuple(mask.shape)} and "
            f"{tuple(hidden_states.shape)}"
        )


def _check_lengths(lengths: torch.Tensor, tokens_per_row: torch.Tensor, seqlen: int) -> None:
    """Raise ValueError for lengths that a row has no room for."""
    if torch.compiler.is_compiling() or lengths.numel() == 0:
        return
    if lengths.min() < 0 or tokens_per_row.max() > seqlen:
        raise ValueError(
            "attention_mask_in_length must hold lengths that are not negative and whose sum is at "
            f"most the {seqlen} tokens of a row"
        )


def _pack(hidden_states: torch.Tensor, token_mask: torch.Tensor):
    """The rows of ``(b, s, ...)`` where ``token_mask`` ``(b, s)`` is true, and their flat
    positions."""
    indices = torch.nonzero(token_mask.flatten(), as_tuple=False).flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def unpad_input(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    unused_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Pack the tokens that a mask selects.

    Args:
        hidden_states: ``(b, s, ...)``.
        attention_mask: ``(b, s)`` bool or number, not 0 at tokens that are used.
        unused_mask: ``(b, s)`` likewise, not 0 at tokens that get room in the packed batch but are
            not used unless ``attention_mask`` says so.

    Returns:
        ``(packed, indices, cu_seqlens, max_seqlen, seqused)``: ``packed`` ``(total, ...)`` holds
        the tokens selected by either mask; ``indices`` ``(total,)`` int64 are their positions in
        the flattened ``(b * s)`` batch; ``cu_seqlens`` ``(b + 1,)`` int32 and ``max_seqlen`` (a
        Python int) describe the packed sequences; ``seqused`` ``(b,)`` int32 counts the used tokens
        of each.

    Raises:
        ValueError: a mask does not fit ``hidden_states``.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    attention_mask = token_mask = attention_mask.bool()
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        token_mask = attention_mask | unused_mask.bool()
    seqlens = token_mask.sum(dim=-1, dtype=torch.int32)
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    packed, indices = _pack(hidden_states, token_mask)
    max_seqlen = seqlens.max().item() if seqlens.numel() > 0 else 0
    return packed, indices, _cumulative(seqlens), max_seqlen, seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Pack rows that each hold several sequences one after another, as separate sequences.

    Args:
        hidden_states: ``(b, s, ...)``.
        attention_mask_in_length: ``(b, s)`` int. A row starts with the lengths of its sequences;
            the rest are zeros. ``[2, 3, 0, 0, 0, 0]`` means a sequence of 2 tokens, then one of 3,
            then one token of padding.

    Returns:
        ``(packed, indices, cu_seqlens, max_seqlen)`` as in :func:`unpad_input`, with one entry of
        ``cu_seqlens`` for every sequence of every row.

    Raises:
        ValueError: the lengths do not fit ``hidden_states``.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    tokens_per_row = attention_mask_in_length.sum(dim=-1, keepdim=True)
    seqlen = hidden_states.shape[1]
    _check_lengths(attention_mask_in_length, tokens_per_row, seqlen)
    positions = torch.arange(seqlen, device=attention_mask_in_length.device)
    packed, indices = _pack(hidden_states, positions < tokens_per_row)
    lengths = attention_mask_in_length.flatten()
    seqlens = lengths[lengths > 0]
    max_seqlen = seqlens.max().item() if seqlens.numel() > 0 else 0
    return packed, indices, _cumulative(seqlens), max_seqlen


def pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int
) -> torch.Tensor:
    """Undo :func:`unpad_input`.

    Args:
        hidden_states: ``(total, ...)`` packed tokens.
        indices: ``(total,)`` int64, their positions in the flattened batch.
        batch: number of rows of the padded batch.
        seqlen: padded length of a row.

    Returns:
        ``(batch, seqlen, ...)``, zero where there was no token.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))
