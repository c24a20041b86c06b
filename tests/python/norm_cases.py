"""Norms of sums of branches: cases, their definition by torch's operations, and the comparison."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from backends import BF16, FP16, FP32
from reference import assert_attention_close

from flash_attn.ops._layer_norm import add_norm

FP64 = torch.float64
EPSILON = 1e-5
VECTORS = "weight", "bias", "weight1", "bias1", "colscale"


@dataclasses.dataclass(frozen=True)
class NormCase:
    """One norm of rows of ``shape``."""

    dtype: torch.dtype = FP32
    shape: tuple = (3, 7, 96)
    is_rms_norm: bool = False
    weight: torch.dtype | None = FP32
    bias: bool = True
    weight1: bool = False
    residual: torch.dtype | None = None
    x1: bool = False
    dropout_p: float = 0.0
    rowscale: bool = False
    colscale: bool = False
    zero_centered_weight: bool = False
    out_dtype: torch.dtype | None = None
    mean: float = 0.0
    seed: int = 0

    def __str__(self):
        """The fields that are not the default's."""
        fields = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        parts = [f"{f.name}={value}" for f, value in fields if value != f.default]
        return ",".join(parts).replace("torch.", "").replace(" ", "") or "default"

    def tensors(self) -> dict:
        """By the names of ``add_norm``'s arguments."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape, dtype):
            return torch.randn(shape, generator=generator).to(dtype)

        n = self.shape[-1]
        weight = self.weight or FP32
        given = {
            "x0": random(*self.shape, dtype=self.dtype) + self.mean,
            "x1": random(*self.shape, dtype=self.dtype) if self.x1 else None,
            "residual": random(*self.shape, dtype=self.residual) if self.residual else None,
            "weight": random(n, dtype=weight) if self.weight else None,
            "bias": random(n, dtype=weight) if self.bias else None,
            "weight1": random(n, dtype=weight) if self.weight1 else None,
            "bias1": random(n, dtype=weight) if self.weight1 and self.bias else None,
            "colscale": random(n, dtype=weight) if self.colscale else None,
            "rowscale": random(*self.shape[:-1], dtype=FP32) if self.rowscale else None,
        }
        return {name: x for name, x in given.items() if x is not None}

    @property
    def options(self) -> dict:
        return {
            "dropout_p": self.dropout_p,
            "is_rms_norm": self.is_rms_norm,
            "zero_centered_weight": self.zero_centered_weight,
        }


def definition(
    tensors,
    masks,
    dtype,
    *,
    dropout_p=0.0,
    is_rms_norm=False,
    zero_centered_weight=False,
):
    """``(out, out1, x)`` in ``dtype``; ``masks`` are what dropout keeps of x0 and of x1."""
    t = {name: x.to(dtype) for name, x in tensors.items()}

    def dropped(x, mask):
        return x if mask is None else torch.where(mask, x / (1.0 - dropout_p), 0.0)

    x = dropped(t["x0"], masks[0])
    if "rowscale" in t:
        x = x * t["rowscale"][..., None]
    if "colscale" in t:
        x = x * t["colscale"]
    if "x1" in t:
        x = x + dropped(t["x1"], masks[1])
    if "residual" in t:
        x = x + t["residual"]
    centred = x if is_rms_norm else x - x.mean(-1, keepdim=True)
    norm = centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    outs = []
    for suffix in ("", "1"):
        weight, bias = t.get("weight" + suffix), t.get("bias" + suffix)
        out = norm
        if weight is not None:
            out = norm * (weight + 1.0 if zero_centered_weight else weight)
        outs.append(out if bias is None else out + bias)
    return outs[0], outs[1] if "weight1" in t else None, x


def results_and_gradients(run, tensors, douts):
    """Run and pull gradients back: those of everything but rowscale."""
    leaves = {n: t.detach().clone() for n, t in tensors.items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != "rowscale")
    results = [r for r in run(leaves) if r is not None]
    wanted = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
    douts = [d.to(r.dtype) for d, r in zip(douts, results)]
    grads = torch.autograd.grad(results, list(wanted.values()), douts, allow_unused=True)
    named = dict(zip(("out", "out1", "x") if len(results) == 3 else ("out", "x"), results))
    return {n: r.detach() for n, r in named.items()} | {f"d{n}": g for n, g in zip(wanted, grads)}


def check(case: NormCase, context) -> None:
    """Values and gradients, run in ``context()``, are as exact as torch's in the same dtype."""
    tensors = case.tensors()
    masks = []

    def run(t):
        normed = add_norm(
            epsilon=EPSILON,
            **{"weight": None, "bias": None} | t,
            **case.options,
            out_dtype=case.out_dtype,
            wants_mask=True,
        )
        masks[:] = normed.dropout_mask, normed.dropout_mask1
        return normed.out, normed.out1, normed.x

    douts = [torch.randn(case.shape) for _ in range(3 if case.weight1 else 2)]
    torch.manual_seed(case.seed)
    with context():
        actual = results_and_gradients(run, tensors, douts)
    assert actual["out"].dtype == (case.out_dtype or case.dtype)
    assert actual["x"].dtype == (case.residual or case.dtype)
    assert all(actual[f"d{n}"].dtype == t.dtype for n, t in tensors.items() if n != "rowscale")
    rounded = [d.to(case.out_dtype or case.dtype) for d in douts[:-1]]
    rounded.append(douts[-1].to(actual["x"].dtype))

    def defined(dtype):
        in_dtype = {n: t.to(dtype) for n, t in tensors.items()}
        return results_and_gradients(
            lambda t: definition(t, masks, dtype, **case.options), in_dtype, rounded
        )

    exact, plain = defined(FP64), defined(case.dtype)
    for name in actual:
        assert_attention_close(actual[name], exact[name], plain[name], name)


SIZES = [1, 3, 7, 8, 9, 63, 64, 130, 1000, 4096]
FEATURES = {
    "plain": {},
    "bare": {"weight": None, "bias": False},
    "residual": {"residual": FP16},
    "residual_fp32": {"residual": FP32, "bias": False},
    "x1": {"x1": True, "weight1": True, "residual": FP32},
    "dropout": {"dropout_p": 0.3, "residual": FP32},
    "dropout_x1": {"dropout_p": 0.1, "x1": True, "weight1": True, "zero_centered_weight": True},
    "scales": {"rowscale": True, "colscale": True, "dropout_p": 0.2, "residual": FP32},
    "out_fp32": {"out_dtype": FP32, "zero_centered_weight": True},
    "own_weights": {"weight": FP16, "out_dtype": BF16},
}


def cases(shape=(3, 7, 96)) -> list[NormCase]:
    """All features with all dtypes, layer norm and RMS norm."""

    def of(dtype, features):
        # A sum of a narrower dtype than x0 is less exact than x0's dtype is.
        if features.get("residual") not in (None, FP32):
            return features | {"residual": dtype}
        return features

    return [
        NormCase(dtype, shape, is_rms_norm, seed=seed, **of(dtype, features))
        for seed, (dtype, is_rms_norm, features) in enumerate(
            itertools.product((FP32, BF16, FP16), (False, True), FEATURES.values())
        )
    ]


def philox(key: int, counter: tuple) -> list[int]:
    """Philox-4x32-7 as its paper has it: four numbers of 32 bits."""
    low = 0xFFFFFFFF
    keys = [key & low, key >> 32]
    c = list(counter)
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ keys[0], p1 & low, (p0 >> 32) ^ c[3] ^ keys[1], p0 & low]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return c


def expected_mask(rows, cols, dropout_p, rng_state, branch) -> torch.Tensor:
    """The mask that flash_attn/layer_norm.h describes."""
    seed, offset = (int(x) for x in rng_state)
    key = seed ^ (offset >> 32 << 32)
    threshold = int((1 - dropout_p) * 65536 + 0.5)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for row in range(rows):
        for block in range((cols + 7) // 8):
            words = philox(key, (block, row, branch, offset & 0xFFFFFFFF))
            halves = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
            for i in range(8 * block, min(8 * block + 8, cols)):
                mask[row, i] = halves[i - 8 * block] < threshold
    return mask
