"""Attention written down once more, by plain PyTorch operations and without looking at the library.

The library is measured against this file in fp64, and allowed twice the error that the same
operations make in the library's own dtype.
"""

from __future__ import annotations

import math

import torch

INF = math.inf
SMALL_TENSOR = 1024  # elements


def visible(seqlen_q, seqlen_k, causal=False, window_size=(-1, -1), device=None):
    """Which keys a query sees, ``(seqlen_q, seqlen_k)``; both sequences end at the same place."""
    left, right = (INF if w < 0 else w for w in window_size)
    right = min(right, 0) if causal else right
    ahead = torch.arange(seqlen_k, device=device) - torch.arange(seqlen_q, device=device)[:, None]
    ahead = ahead - (seqlen_k - seqlen_q)  # of a key, how far it lies ahead of the query
    return (ahead <= right) & (-ahead <= left)


def alibi_bias(slopes, seqlen_q, seqlen_k):
    """``-slope |i + seqlen_k - seqlen_q - j|``: ``(h,)`` -> ``(1, h, sq, sk)``, ``(b, h)`` -> ``(b,
    h, sq, sk)``."""
    rows = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    distance = (rows - torch.arange(seqlen_k)).abs()
    slopes = slopes if slopes.dim() == 2 else slopes[None]
    return -slopes[:, :, None, None] * distance


def einsum(equation, a, b):
    """``torch.einsum`` that sums 16-bit products in fp32 and rounds once, as matrix units do."""
    if a.dtype.itemsize > 2:
        return torch.einsum(equation, a, b)
    return torch.einsum(equation, a.float(), b.float()).to(a.dtype)


def attention(
    q,
    k,
    v,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    s_aux=None,
    attn_bias=None,
    dropout_p=0.0,
    keep=None,
):
    """``(out, lse)`` in the dtype of q: ``(b, sq, h, dv)`` and ``(b, h, sq)``.

    q ``(b, sq, h, d)``, k ``(b, sk, hk, d)``, v ``(b, sk, hk, dv)``; ``keep`` ``(b, h, sq, sk)`` is
    True where dropout keeps a probability. A query that sees no key gives out = 0 and lse = +inf,
    or its sink's logit.
    """
    groups = q.shape[2] // k.shape[2]
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    k = k.repeat_interleave(groups, dim=2)
    v = v.repeat_interleave(groups, dim=2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    scores = einsum("bihd,bjhd->bhij", q * scale, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes.double(), seqlen_q, seqlen_k).to(scores.dtype)
    if attn_bias is not None:
        scores = scores + attn_bias.to(scores.dtype)
    mask = visible(seqlen_q, seqlen_k, causal, window_size)
    scores = scores.masked_fill(~mask, -INF)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)

    sees_none = ~mask.any(dim=-1) if s_aux is None else torch.zeros(seqlen_q, dtype=torch.bool)
    lse = scores.logsumexp(dim=-1).masked_fill(sees_none, INF)
    probs = scores.softmax(dim=-1)[..., :seqlen_k].masked_fill(sees_none[:, None], 0.0)
    if keep is not None:
        probs = probs.masked_fill(~keep, 0.0) / (1.0 - dropout_p)
    return einsum("bhij,bjhd->bihd", probs, v), lse


def attention_and_gradients(tensors, options, dout, dlse=None, dtype=torch.float64):
    """Forward and backward of ``attention`` computed in ``dtype``.

    Args:
        tensors: dict with q, k, v and, if wanted, s_aux and attn_bias.
        options: the other arguments of ``attention``.
        dout: gradient of out.
        dlse: gradient of lse; None: no gradient flows into it.

    Returns:
        dict with out, lse, dq, dk, dv and, if given, ds_aux and dattn_bias.
    """
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    out, lse = attention(**leaves, **options)
    outputs, grads = [out], [dout.to(dtype)]
    if dlse is not None:
        outputs.append(lse)
        grads.append(dlse.to(dtype))
    wanted = torch.autograd.grad(outputs, list(leaves.values()), grads)
    gradients = {f"d{n}": g for n, g in zip(leaves, wanted)}
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def out_rounding(dtype, dout, out):
    """Error of sum(D), D = rowsum(dout out), that comes of rounding out to ``dtype``; one value per
    head."""
    per_row = torch.finfo(dtype).eps / 2 * (dout.double() * out.double()).norm(dim=-1)
    return per_row.square().sum((0, 1)).sqrt()


def gradient_slack(tensors, options, dout, out):
    """Errors of gradients that are rounding's alone but do not show in plain PyTorch's.

    The scores' gradient is P (dP - D) with D = rowsum(dout out), where PyTorch's softmax subtracts
    rowsum(P dP):

    - ds_aux is a sum of P D, so the rounding of out to its dtype adds up in it.
    - Where no query sees more than two keys, nothing averages the rounding of out, which D has in
      all its products: with one key D is the one dP, from which PyTorch subtracts itself and makes
      no error at all. In dk such errors of all rows add up, as independent ones do.

    Args:
        tensors, options, dout: as in ``attention_and_gradients``.
        out: exact.

    Returns:
        dict from the gradient's name to its slack.
    """
    q, k, v = (tensors[n].double() for n in "qkv")
    slack = {"ds_aux": 2 * out_rounding(dout.dtype, dout, out).max().item()}
    seen = visible(q.shape[1], k.shape[1], options["causal"], options["window_size"])
    if not 1 <= seen.sum(-1).max() <= 2:
        return slack
    scale = options.get("softmax_scale")
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    groups = q.shape[2] // k.shape[2]
    of_dp = torch.finfo(torch.float32).eps * dout.double().norm(dim=-1) * v.norm(dim=-1).max()
    of_out = torch.finfo(dout.dtype).eps / 2 * (dout.double() * out).norm(dim=-1)
    errors = of_dp + of_out  # of dP - D, (b, sq, h)
    error = errors.max().item()
    slack["dq"] = error * scale * k.abs().max().item()
    rows = (errors[..., None] * q).unflatten(2, (k.shape[2], groups))
    slack["dk"] = scale * rows.square().sum((1, 3)).sqrt().max().item()
    slack["dattn_bias"] = error * q.shape[0] * groups
    return slack


def _worst(error, actual, exact):
    """Where the error is largest, for a message."""
    place = torch.unravel_index(error.argmax(), error.shape)
    place = tuple(int(x) for x in place)
    return f"at {place}: {actual[place].item():.9g}, exact {exact[place].item():.9g}"


def error_floor(dtype, exact):
    """An error that is always allowed: half a unit in the last place of the largest element, for
    the result's own rounding, and 1e-6 of it (but at least 1e-6, inputs being of order 1) for fp32
    sums that cancel exactly in one order of summation and not in another."""
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return torch.finfo(dtype).eps / 2 * largest + 1e-6 * max(1.0, largest)


def assert_same_non_finite(actual, exact, name):
    """NaN, +inf and -inf stand at the same places."""
    for kind, test in (
        ("nan", torch.isnan),
        ("+inf", lambda x: x == INF),
        ("-inf", lambda x: x == -INF),
    ):
        differs = test(actual) != test(exact)
        if differs.any():
            place = tuple(differs.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {int(differs.sum())} of {differs.numel()} elements are {kind} on one "
                f"side only, first at {place}: {actual[place].item()}, exact {exact[place].item()}"
            )


def assert_attention_close(actual, exact, plain, name, slack=0.0, factor=2):
    """``actual`` is as good an approximation of ``exact`` as ``plain`` is: its largest error is at
    most ``factor`` times plain's (twice that in small tensors, where one rounding error more or
    less decides), up to ``error_floor``.

    Args:
        actual: the library's result, in the dtype under test.
        exact: the reference in fp64.
        plain: the reference in the dtype under test.
        name: of the result, for the message.
        slack: an error that is allowed in addition.
        factor: what plain's largest error is multiplied by.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, {tuple(exact.shape)}"
    floor = error_floor(actual.dtype, exact) + slack
    actual = actual.detach().double()
    assert_same_non_finite(actual, exact, name)
    if actual.numel() == 0:
        return
    finite = exact.isfinite()
    error = torch.where(finite, actual - exact, 0.0).abs()
    factor = factor if actual.numel() >= SMALL_TENSOR else 2 * factor
    allowed = factor * torch.where(finite, plain.double() - exact, 0.0).abs().max().item() + floor
    assert error.max().item() <= allowed, (
        f"{name}: largest error {error.max().item():.3g}, allowed {allowed:.3g}; "
        f"worst {_worst(error, actual, exact)}"
    )
