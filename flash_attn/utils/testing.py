"""Inputs and a plain reference for tests of attention, as the test suites of FlashAttention's users
expect them.

Masks made here are True where a key is hidden, except padding masks, which are True at real tokens.
"""

from __future__ import annotations

import math

import torch

from flash_attn.bert_padding import pad_input, unpad_input

__all__ = [
    "attention_ref",
    "construct_chunk_mask",
    "construct_local_mask",
    "generate_qkv",
    "generate_random_padding_mask",
]


def generate_random_padding_mask(max_seqlen, batch_size, device, mode="random", zero_lengths=False):
    """A padding mask of random lengths, padded on the right.

    Args:
        max_seqlen: padded length.
        batch_size: number of rows.
        device: where to make it.
        mode: "full": every length is ``max_seqlen``; "random": lengths in ``[max_seqlen - 20,
            max_seqlen]``; "third": lengths in ``[max_seqlen // 3, max_seqlen]``. Lengths are at
            least 1.
        zero_lengths: allow empty sequences, and make every fifth row and the last one empty.

    Returns:
        ``(batch_size, max_seqlen)`` bool, True at real tokens.
    """
    if mode not in ("full", "random", "third"):
        raise ValueError(f"mode must be 'full', 'random' or 'third', not {mode!r}")
    shortest = {"full": max_seqlen, "random": max_seqlen - 20, "third": max_seqlen // 3}[mode]
    shortest = max(shortest, 0 if zero_lengths else 1)
    lengths = torch.randint(shortest, max_seqlen + 1, (batch_size, 1), device=device)
    if zero_lengths:
        lengths[::5] = 0
        lengths[-1:] = 0
    return torch.arange(max_seqlen, device=device) < lengths


def _unpad(x, padding_mask, unused_mask):
    """``(packed, indices, cu_seqlens, max_seqlen, seqused)``; without a mask every token is
    real."""
    if padding_mask is not None:
        packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, padding_mask, unused_mask)
        return packed, indices, cu_seqlens, max_seqlen, seqused
    batch, seqlen = x.shape[:2]
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * seqlen
    return x.flatten(0, 1), None, cu_seqlens, seqlen, None


def _pad_fn(indices, batch, seqlen):
    """The inverse of ``_unpad`` for tensors packed in the same way."""
    if indices is None:
        return lambda packed: packed.unflatten(0, (batch, seqlen))
    return lambda packed: pad_input(packed, indices, batch, seqlen)


def _leaf(x):
    return x.detach().requires_grad_()


def generate_qkv(
    q,
    k,
    v,
    query_padding_mask=None,
    key_padding_mask=None,
    qv=None,
    kvpacked=False,
    qkvpacked=False,
    query_unused_mask=None,
    key_unused_mask=None,
):
    """Padded and packed ("unpadded") versions of the same attention inputs, as leaves that require
    gradients.

    Args:
        q: ``(b, seqlen_q, h, d)``.
        k: ``(b, seqlen_k, hk, d)``.
        v: ``(b, seqlen_k, hk, dv)``.
        query_padding_mask: ``(b, seqlen_q)`` bool, True at real tokens; None: all are.
        key_padding_mask: ``(b, seqlen_k)`` bool.
        qv: ``(b, seqlen_q, h, dv)`` or None.
        kvpacked: stack k and v.
        qkvpacked: stack q, k and v; the padding masks must be equal, and there must be as many kv
            as query heads.
        query_unused_mask: ``(b, seqlen_q)`` bool, True at tokens that get room in the packed tensor
            but are not used.
        key_unused_mask: ``(b, seqlen_k)`` bool.

    Returns:
        With ``qkvpacked``: (qkv_unpad, cu_seqlens, max_seqlen, qkv, output_pad_fn, dqkv_pad_fn).
        With ``kvpacked``: (q_unpad, kv_unpad, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, q, kv, output_pad_fn, dq_pad_fn, dkv_pad_fn). Otherwise: (q_unpad, k_unpad,
        v_unpad, qv_unpad, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q,
        max_seqlen_k, q, k, v, qv, output_pad_fn, dq_pad_fn, dk_pad_fn); qv_unpad and qv are None
        without ``qv``, seqused_* without the padding mask. The functions turn packed tensors back
        into padded ones.
    """
    if kvpacked and qkvpacked:
        raise ValueError("kvpacked and qkvpacked exclude each other")
    batch, seqlen_q = q.shape[:2]
    seqlen_k = k.shape[1]
    q_unpad, indices_q, cu_seqlens_q, max_seqlen_q, seqused_q = _unpad(
        q, query_padding_mask, query_unused_mask
    )
    k_unpad, indices_k, cu_seqlens_k, max_seqlen_k, seqused_k = _unpad(
        k, key_padding_mask, key_unused_mask
    )
    v_unpad = _unpad(v, key_padding_mask, key_unused_mask)[0]
    q_pad_fn = _pad_fn(indices_q, batch, seqlen_q)
    k_pad_fn = _pad_fn(indices_k, batch, seqlen_k)

    if qkvpacked:
        same_padding = (query_padding_mask is None) == (key_padding_mask is None) and (
            query_padding_mask is None or torch.equal(query_padding_mask, key_padding_mask)
        )
        if not same_padding or q.shape != k.shape:
            raise ValueError("qkvpacked needs q and k of the same shape and padding")
        qkv_unpad = _leaf(torch.stack([q_unpad, k_unpad, v_unpad], dim=1))
        qkv = _leaf(torch.stack([q, k, v], dim=2))
        return qkv_unpad, cu_seqlens_q, max_seqlen_q, qkv, q_pad_fn, q_pad_fn
    lengths = (cu_seqlens_q, cu_seqlens_k)
    max_lengths = (max_seqlen_q, max_seqlen_k)
    if kvpacked:
        kv_unpad = _leaf(torch.stack([k_unpad, v_unpad], dim=1))
        kv = _leaf(torch.stack([k, v], dim=2))
        padded = (_leaf(q), kv, q_pad_fn, q_pad_fn, k_pad_fn)
        return _leaf(q_unpad), kv_unpad, *lengths, *max_lengths, *padded
    qv_unpad = None
    if qv is not None:
        qv_unpad = _leaf(_unpad(qv, query_padding_mask, query_unused_mask)[0])
        qv = _leaf(qv)
    packed = (_leaf(q_unpad), _leaf(k_unpad), _leaf(v_unpad), qv_unpad)
    padded = (_leaf(q), _leaf(k), _leaf(v), qv)
    seqused = (seqused_q, seqused_k)
    return *packed, *lengths, *seqused, *max_lengths, *padded, q_pad_fn, q_pad_fn, k_pad_fn


def _positions(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device):
    """Key positions, the key position on each query's diagonal, and the number of keys; they
    broadcast to ``(seqlen_q, seqlen_k)`` or ``(b, 1, seqlen_q, seqlen_k)``. Keys of the left
    padding lie after all others."""
    rows = torch.arange(seqlen_q, device=device)[:, None]
    cols = torch.arange(seqlen_k, device=device)

    def count(mask, seqlen):
        return seqlen if mask is None else mask.sum(-1)[:, None, None, None]

    sq, sk = count(query_padding_mask, seqlen_q), count(key_padding_mask, seqlen_k)
    if key_leftpad is not None:
        leftpad = key_leftpad[:, None, None, None]
        cols = torch.where(cols >= leftpad, cols - leftpad, 2**32)
    return cols, rows + sk - sq, sk


def construct_local_mask(
    seqlen_q,
    seqlen_k,
    window_size=(None, None),
    sink_token_length=0,
    query_padding_mask=None,
    key_padding_mask=None,
    key_leftpad=None,
    device=None,
):
    """The keys that a sliding window hides, aligned to the bottom right corner.

    Args:
        seqlen_q: number of query rows.
        seqlen_k: number of key columns.
        window_size: (left, right), None: no limit on that side. (None, 0) is causal.
        sink_token_length: the window's left edge does not hide the first so many keys.
        query_padding_mask: ``(b, seqlen_q)`` bool, True at real tokens, to align to each sequence's
            own length.
        key_padding_mask: ``(b, seqlen_k)`` bool.
        key_leftpad: ``(b,)`` int, columns before each sequence's first key.
        device: where to make it.

    Returns:
        bool, ``(seqlen_q, seqlen_k)``, or ``(b, 1, seqlen_q, seqlen_k)`` if a mask or
        ``key_leftpad`` is given; True where hidden. Columns beyond a sequence's keys are hidden if
        there is a right limit.
    """
    left, right = window_size
    cols, diagonal, sk = _positions(
        seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device
    )
    hidden = torch.zeros_like(cols > diagonal)
    if right is not None:
        hidden = cols > torch.clamp(diagonal + right, max=sk)
    if left is not None:
        hidden = hidden | ((cols < diagonal - left) & (cols >= sink_token_length))
    return hidden


def construct_chunk_mask(
    seqlen_q,
    seqlen_k,
    attention_chunk,
    query_padding_mask=None,
    key_padding_mask=None,
    key_leftpad=None,
    device=None,
):
    """The keys that chunked attention hides: those not in the same chunk of positions as the query.

    Args:
        attention_chunk: number of positions in a chunk.

    The other arguments and the result are those of :func:`construct_local_mask`.
    """
    cols, diagonal, _ = _positions(
        seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device
    )
    chunk_start = diagonal - diagonal % attention_chunk
    return (cols < chunk_start) | (cols >= chunk_start + attention_chunk)


def _hidden_keys(
    q, k, query_padding_mask, key_padding_mask, key_leftpad, window, chunk, sink_token_length
):
    """All hidden (query, key) pairs, broadcastable to ``(b, h, seqlen_q, seqlen_k)``."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    masks = (query_padding_mask, key_padding_mask, key_leftpad, q.device)
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None, :]
    if window != (None, None):
        hidden = hidden | construct_local_mask(
            seqlen_q, seqlen_k, window, sink_token_length, *masks
        )
    if chunk > 0:
        hidden = hidden | construct_chunk_mask(seqlen_q, seqlen_k, chunk, *masks)
    return hidden


def _softmax(scores, learnable_sink):
    """Softmax over the last dimension, with an optional logit per head that has no key. Rows of
    -inf become 0."""
    if learnable_sink is None:
        probs = torch.softmax(scores, dim=-1)
    else:
        sink = learnable_sink.to(scores.dtype).view(-1, 1, 1)
        sink = sink.expand(*scores.shape[:-1], 1)
        probs = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    return probs.masked_fill((scores == -math.inf).all(dim=-1, keepdim=True), 0.0)


def attention_ref(
    q,
    k,
    v,
    query_padding_mask=None,
    key_padding_mask=None,
    key_leftpad=None,
    attn_bias=None,
    dropout_p=0.0,
    dropout_mask=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(None, None),
    attention_chunk=0,
    sink_token_length=0,
    learnable_sink=None,
    softcap=0.0,
    upcast=True,
    reorder_ops=False,
    intermediate_dtype=None,
):
    """Attention by plain PyTorch operations, with the whole score matrix in memory.

    Args:
        q: ``(b, seqlen_q, h, d)``.
        k: ``(b, seqlen_k, hk, d)``; h % hk == 0.
        v: ``(b, seqlen_k, hk, dv)``.
        query_padding_mask: ``(b, seqlen_q)`` bool, True at real tokens; the other rows give 0.
        key_padding_mask: ``(b, seqlen_k)`` bool.
        key_leftpad: ``(b,)`` int, keys skipped at the start; give ``key_padding_mask`` too, False
            there.
        attn_bias: added to the scores, broadcastable to ``(b, h, seqlen_q, seqlen_k)``.
        dropout_p: probability that went into ``dropout_mask``.
        dropout_mask: ``(b, h, seqlen_q, seqlen_k)`` bool, True where a probability is kept; None:
            all are.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        qv: ``(b, seqlen_q, h, dv)``: adds qv . v to q . k; the scale is then (d + dv) ** -0.5.
        q_descale, k_descale, v_descale: ``(b, hk)`` factors of q (and qv), k, v.
        window_size: (left, right), None: no limit.
        attention_chunk: > 0: a query sees the keys of its own chunk of positions only.
        sink_token_length: the window's left edge does not hide the first so many keys.
        learnable_sink: ``(h,)`` logits that join the softmax's denominator.
        softcap: > 0: scores become softcap * tanh(scores / softcap).
        upcast: compute in fp32.
        reorder_ops: scale k instead of q, to see how much rounding alone changes the result.
        intermediate_dtype: dtype that the probabilities are rounded to before they meet v.

    Returns:
        ``(out, attention)`` in q's dtype: ``(b, seqlen_q, h, dv)`` and the probabilities before
        dropout, ``(b, h, seqlen_q, seqlen_k)``. Queries that see no key give 0.
    """
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
        qv = None if qv is None else qv.float()
    groups = q.shape[2] // k.shape[2]

    def descale(x, factors, repeats):
        if factors is None:
            return x
        return (x.float() * factors.repeat_interleave(repeats, dim=1)[:, None, :, None]).to(x.dtype)

    q = descale(q, q_descale, groups)
    qv = None if qv is None else descale(qv, q_descale, groups)
    k = descale(k, k_descale, 1).repeat_interleave(groups, dim=2)
    v = descale(v, v_descale, 1).repeat_interleave(groups, dim=2)

    scale = (q.shape[-1] if qv is None else q.shape[-1] + qv.shape[-1]) ** -0.5
    q, k = (q, k * scale) if reorder_ops else (q * scale, k)
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    if qv is not None:
        scores = scores + torch.einsum("bthd,bshd->bhts", qv * scale, v)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)

    window = (window_size[0], 0) if causal else tuple(window_size)
    hidden = _hidden_keys(
        q,
        k,
        query_padding_mask,
        key_padding_mask,
        key_leftpad,
        window,
        attention_chunk,
        sink_token_length,
    )
    if attn_bias is not None:
        scores = scores + attn_bias
    scores = scores.masked_fill(hidden, -math.inf)
    attention = _softmax(scores, learnable_sink).to(v.dtype)
    if query_padding_mask is not None:
        attention = attention.masked_fill(~query_padding_mask[:, None, :, None], 0.0)

    kept = attention if dropout_mask is None else attention.masked_fill(~dropout_mask, 0.0)
    if intermediate_dtype is not None:
        kept = kept.to(intermediate_dtype).to(attention.dtype)
    out = torch.einsum("bhts,bshd->bthd", kept, v / (1.0 - dropout_p))
    return out.to(dtype), attention.to(dtype)
