"""Attention with q, k and v in fp8 (e4m3) and factors by the C interface, and its reference."""

from __future__ import annotations

import torch
from reference import alibi_bias, visible

from flash_attn._library import bind

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 128  # rows that share a factor, where factors are of blocks

_SCORE = "softmax_scale is_causal window_left window_right s_aux softcap alibi_slopes attn_bias"
_FACTORS = "q_descale k_descale v_descale"
_FORWARD = bind("mha_fwd", f"q k v out softmax_lse {_SCORE} {_FACTORS}")
_VARLEN = bind(
    "mha_varlen_fwd",
    f"q k v out softmax_lse {_SCORE} {_FACTORS} cu_seqlens_q cu_seqlens_k max_seqlen_q "
    "max_seqlen_k seqused_k block_table",
)
_KVCACHE = bind(
    "mha_fwd_kvcache",
    f"q k_cache v_cache out softmax_lse {_SCORE} {_FACTORS} cache_seqlens cache_batch_idx "
    "cache_leftpad block_table",
)


def score(q, causal=False, window_size=(-1, -1), softmax_scale=None, s_aux=None, softcap=0.0,
          alibi_slopes=None, attn_bias=None):  # fmt: skip
    """The arguments of _SCORE."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return (float(scale), int(causal), *window_size, s_aux, softcap, alibi_slopes, attn_bias)


def outputs(q, v, dtype=torch.bfloat16):
    """Empty out and softmax_lse, of a dense call or a packed one."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=dtype)
    rows, heads = q.shape[-3:-1]
    return out, torch.empty(*q.shape[:-3], heads, rows)


def dense(q, k, v, factors=(None, None, None), out_dtype=torch.bfloat16, **options):
    """(out, softmax_lse) of a dense batch."""
    out, lse = outputs(q, v, out_dtype)
    _FORWARD(q, k, v, out, lse, *score(q, **options), *factors)
    return out, lse


def packed(q, k, v, cu_q, cu_k, max_q, max_k, factors=(None, None, None), seqused_k=None,
           block_table=None, **options):  # fmt: skip
    """The same of a packed batch."""
    out, lse = outputs(q, v)
    lengths = (cu_q, cu_k, max_q, max_k, seqused_k, block_table)
    _VARLEN(q, k, v, out, lse, *score(q, **options), *factors, *lengths)
    return out, lse


def cache(q, k, v, factors=(None, None, None), cache_seqlens=None, cache_batch_idx=None,
          leftpad=None, block_table=None, **options):  # fmt: skip
    """The same over a KV cache."""
    out, lse = outputs(q, v)
    place = (cache_seqlens, cache_batch_idx, leftpad, block_table)
    _KVCACHE(q, k, v, out, lse, *score(q, **options), *factors, *place)
    return out, lse


def quantised(x, heads_k, by_blocks=False):
    """x, (batch, rows, heads, dim) in fp64, as (fp8, factors, what they stand for), each factor the
    largest of a key-value head's numbers over the largest of fp8."""
    batch, rows, heads, dim = x.shape
    count = max(-(-rows // BLOCK), 1) if by_blocks else 1
    size = BLOCK if by_blocks else max(rows, 1)
    padded = torch.zeros(batch, count * size, heads, dim, dtype=x.dtype)
    padded[:, :rows] = x
    groups = padded.view(batch, count, size, heads_k, -1).abs().amax((2, 4))  # (b, blocks, hk)
    factors = (groups.clamp_min(1e-30) / LARGEST).float()
    each = factors.double().repeat_interleave(size, 1)[:, :rows]
    each = each.repeat_interleave(heads // heads_k, 2)[..., None]
    numbers = (x / each).float().clamp(-LARGEST, LARGEST).to(FP8)
    factors = factors.transpose(1, 2).contiguous() if by_blocks else factors[:, 0].contiguous()
    return numbers, factors, numbers.double() * each


def attention(q, k, v, softmax_scale=None, s_aux=None, softcap=0.0, alibi_slopes=None, **mask):
    """(out, softmax_lse) in the arguments' dtype, fp64: every score, softmax over all keys."""
    heads, heads_k = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // heads_k, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes.to(q.dtype), q.shape[1], k.shape[1])
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], **mask), -torch.inf)
    if s_aux is not None:
        sinks = s_aux.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    lse = torch.logsumexp(scores, -1)
    seen = lse > -torch.inf
    weights = torch.exp(scores - torch.where(seen, lse, 0.0)[..., None])
    if s_aux is not None:
        weights = weights[..., :-1]
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return out, torch.where(seen, lse, torch.inf)


def mask_of(options):
    return {name: options[name] for name in ("causal", "window_size") if name in options}


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


def normal_with_outliers(generator, *shape):
    """As activations have them: one of a thousand is ten times as large."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    far = torch.rand(*shape, generator=generator, dtype=torch.float64) < 1e-3
    return torch.where(far, 10 * x, x)


class Problem:
    """q, k and v, of fp64 and of fp8 with factors."""

    def __init__(self, seed=0, batch=1, seqlens=(150, 300), heads=(2, 1), dims=(128, 128),
                 by_blocks=(False, False, False), spread=1.0):  # fmt: skip
        gen = torch.Generator().manual_seed(seed)
        self.heads_k = heads[1]
        shapes = ((seqlens[0], heads[0], dims[0]), (seqlens[1], heads[1], dims[0]),
                  (seqlens[1], heads[1], dims[1]))  # fmt: skip
        self.exact = tuple(normal_with_outliers(gen, batch, *shape) for shape in shapes)
        self.exact = (self.exact[0] * spread, *self.exact[1:])
        self.quantise(self.exact, by_blocks)

    def quantise(self, exact, by_blocks):
        self.exact = exact
        each = [quantised(x, self.heads_k, blocks) for x, blocks in zip(exact, by_blocks)]
        self.numbers, self.factors, self.values = (tuple(x) for x in zip(*each))


def assert_close(result, values, exact=None, **options):
    """(out, softmax_lse) beside the reference of what fp8 numbers stand for, element by element;
    and with `exact`, q, k and v before they were quantised: no more than half of the error that
    quantising them makes, on top of it."""
    out, lse = (x.double() for x in result)
    expected, expected_lse = attention(*values, **options)
    torch.testing.assert_close(lse, expected_lse, atol=2e-4, rtol=1e-5)
    # A probability is rounded to 4 bits: by 2^-4 of it, or 2^-14 of a row's largest, at most.
    q, k, v = values
    sizes, _ = attention(q, k, v.abs(), **options)
    seen = visible(q.shape[1], k.shape[1], **mask_of(options)).double()
    all_seen = torch.einsum("ij,bjhd->bihd", seen, v.abs())
    all_seen = all_seen.repeat_interleave(q.shape[2] // k.shape[2], 2)
    bound = 2**-4 * sizes + 2**-14 * all_seen + 2**-8 * expected.abs() + 1e-6
    excess = ((out - expected).abs() / bound).max().item()
    assert excess <= 1, f"{excess:.2f} times the bound"
    if exact is None:
        return
    wanted, _ = attention(*exact, **options)
    quantising = rms(expected - wanted)
    assert rms(out - wanted) <= 1.5 * quantising + 2**-9 * rms(wanted)
