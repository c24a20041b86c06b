"""Rotary embedding of tensors amid NaN, for the tests of the CPU and of the emulated GPU."""

from __future__ import annotations

import dataclasses

import torch
from guard_bands import Guarded
from reference import assert_attention_close

from flash_attn.layers.rotary import apply_rotary_emb_torch
from flash_attn.ops.triton.rotary import apply_rotary

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)


@dataclasses.dataclass(frozen=True)
class RotaryCase:
    dtype: torch.dtype
    dims: tuple = (64, 32)  # head dim, rotary_dim
    interleaved: bool = False
    conjugate: bool = False
    inplace: bool = False
    fp32_tables: bool = False
    shape: tuple = (2, 5, 3)  # batch, seqlen, heads
    before: int = 16
    gap: int = 16

    def __str__(self):
        flags = ("interleaved", "conjugate", "inplace", "fp32_tables")
        named = [name for name in flags if getattr(self, name)]
        shape = "x".join(map(str, (*self.shape, *self.dims)))
        return "-".join([str(self.dtype)[6:], shape, f"at{self.before}+{self.gap}", *named])


def cases(dims, dtypes=DTYPES):
    """Every flag with every size and dtype, half of them at places that are not aligned."""
    found = []
    for i, size in enumerate(dims):
        for dtype in dtypes:
            for flags in range(8):
                interleaved, inplace, aligned = (bool(flags >> b & 1) for b in range(3))
                place = (16, 16) if aligned else (3, 5)
                more = {"conjugate": (i + flags) % 2 == 1, "fp32_tables": (i + flags) % 3 == 0}
                more |= {"before": place[0], "gap": place[1]}
                found.append(RotaryCase(dtype, size, interleaved, inplace=inplace, **more))
    return found


def tables(rows, rotary_dim, dtype):
    """cos and sin of random angles."""
    angles = torch.randn(rows, rotary_dim // 2, generator=torch.Generator().manual_seed(5)) * 2
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check(case: RotaryCase, context) -> None:
    """Turn a case within ``context()``; compare values, and look beside the tensors."""
    headdim, rotary_dim = case.dims
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*case.shape, headdim, generator=generator).to(case.dtype)
    offset = 2
    cos, sin = tables(case.shape[1] + offset, rotary_dim, FP32 if case.fp32_tables else case.dtype)
    given = [Guarded(t, case.before, case.gap) for t in (x, cos, sin)]
    options = {"inplace": case.inplace, "conjugate": case.conjugate}
    with context():
        out = apply_rotary(*(g.x for g in given), offset, interleaved=case.interleaved, **options)
    for g in given:
        g.assert_untouched()
    sin = -sin if case.conjugate else sin
    inputs = (x, cos[offset:], sin[offset:])
    exact = apply_rotary_emb_torch(*(t.double() for t in inputs), case.interleaved)
    plain = apply_rotary_emb_torch(*(t.to(case.dtype) for t in inputs), case.interleaved)
    assert (out is given[0].x) == case.inplace
    assert_attention_close(out, exact, plain, "out")
    assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])
