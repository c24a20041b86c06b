"""Calls of the kernels over blocks of a mask, and sums of what they return.

A call has attention of some of a process' queries over some of the keys that it holds, of a dense
batch or of packed sequences. Dense tensors have tokens in dimension 1, packed ones in dimension 0;
softmax_lse has them last in both.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from flash_attn._buffers import new_gradient
from flash_attn._functions import BACKWARD, FORWARD, VARLEN_BACKWARD, VARLEN_FORWARD
from flash_attn.distributed._blocks import Block

_INF = float("inf")


class Scores(NamedTuple):
    """What of a call of attention is the same for all its blocks, but for the mask."""

    dropout_p: float
    softmax_scale: float
    softcap: float
    slopes: Optional[Tensor]  # fp32 (nheads,) or (batch, nheads)


class Distances(NamedTuple):
    """ALiBi over keys that all lie at one side of the queries, as a kernel and a sum over them.

    There ``-slope * |i + ahead - j| = bias[j] + shift[i]``; shift leaves the weights as they are.
    """

    bias: Tensor
    shift: Tensor


class Call:
    """One call of a kernel, forward and backward."""

    forward_operator, backward_operator, token_dim = FORWARD, BACKWARD, 1

    def __init__(self, rows: slice, keys: slice, left: int, right: int, side: int):
        self.rows, self.keys = rows, keys
        self._window = {"window_size_left": left, "window_size_right": right}
        self._side = side
        self._sequences: dict = {}

    def _numbers(self, scores: Scores, distances: Optional[Distances]) -> dict:
        return {
            "dropout_p": scores.dropout_p,
            "softmax_scale": scores.softmax_scale,
            "softcap": scores.softcap,
            "alibi_slopes": self._slopes(scores.slopes) if distances is None else None,
            "attn_bias": None if distances is None else distances.bias,
            "causal": False,
            "zero_tensors": False,
            **self._window,
            **self._sequences,
        }

    def _distances(self, scores: Scores) -> Optional[Distances]:
        if scores.slopes is None or self._side == 0:
            return None
        return self._one_sided(scores.slopes)

    def _slopes(self, slopes: Optional[Tensor]) -> Optional[Tensor]:
        """ALiBi's slopes as this call's kernel takes them."""
        return slopes

    def _one_sided(self, slopes: Tensor) -> Distances:
        raise NotImplementedError

    def forward(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor, rng_state):
        """Return out and softmax_lse of this call's rows."""
        distances = self._distances(scores)
        given = {"q": self.of_rows(q), "k": self.of_keys(k), "v": self.of_keys(v)}
        given.update(self._numbers(scores, distances), return_softmax=False, num_splits=0)
        operator = self.forward_operator
        out, lse, _, _ = operator.kernel(operator.named(given), rng_state=rng_state)
        return out, lse if distances is None else lse + distances.shift

    def backward(self, scores: Scores, saved: dict, k: Tensor, v: Tensor, rng_state):
        """Return dq, dk, dv of this call's rows and keys.

        Args:
            saved: dout, q, out, and softmax_lse and dlse (or None) over all keys.
        """
        distances = self._distances(scores)
        given = {name: self.of_rows(saved[name]) for name in ("dout", "q", "out")}
        given["k"], given["v"] = self.of_keys(k), self.of_keys(v)
        given["softmax_lse"] = saved["softmax_lse"][..., self.rows]
        if distances is not None:
            given["softmax_lse"] = given["softmax_lse"] - distances.shift
        if saved["dlse"] is not None:
            given["dlse"] = saved["dlse"][..., self.rows]
        found = [new_gradient(given[name]) for name in "qkv"]
        given.update(zip(("dq", "dk", "dv"), found), deterministic=True, rng_state=rng_state)
        given.update(self._numbers(scores, distances))
        self.backward_operator.kernel(self.backward_operator.named(given))
        return found

    def of_rows(self, x: Tensor) -> Tensor:
        return _tokens(x, self.token_dim, self.rows)

    def of_keys(self, x: Tensor) -> Tensor:
        return _tokens(x, self.token_dim, self.keys)


def _tokens(x: Tensor, dim: int, which: slice) -> Tensor:
    return x[which] if dim == 0 else x[:, which]


class _DenseCall(Call):
    """Of a dense batch: the same block of each sequence."""

    def __init__(self, block: Block):
        rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        super().__init__(rows, keys, block.left, block.right, block.side)
        self._block = block

    def _one_sided(self, slopes: Tensor) -> Distances:
        block, device = self._block, slopes.device
        anchor = block.keys - 1 if self._side > 0 else 0
        signed = self._side * (slopes if slopes.dim() == 2 else slopes[None])[..., None]
        columns = torch.arange(block.keys, device=device) - anchor
        rows = anchor - block.ahead - torch.arange(block.rows, device=device)
        return Distances((signed * columns)[:, :, None], signed * rows)


def dense_calls(blocks: list[Block]) -> list[Call]:
    """The calls of a dense batch."""
    return [_DenseCall(block) for block in blocks]


class _PackedCall(Call):
    """Of packed sequences: one block of each of some sequences, with one window.

    Kernels take queries and keys in runs that leave no gap. What lies between the blocks becomes
    runs without keys and runs without queries, which cost nothing.
    """

    forward_operator, backward_operator, token_dim = VARLEN_FORWARD, VARLEN_BACKWARD, 0

    def __init__(self, blocks: dict, q_lengths: list[int], k_lengths: list[int], device):
        any_block = next(iter(blocks.values()))
        every = slice(None)
        super().__init__(every, every, any_block.left, any_block.right, any_block.side)
        self._blocks, self._q_lengths = blocks, q_lengths
        self._device = device
        q_runs, k_runs, self._owners = [], [], []
        for s, (rows, keys) in enumerate(zip(q_lengths, k_lengths)):
            for q_run, k_run in _runs(blocks.get(s), rows, keys):
                q_runs.append(q_run)
                k_runs.append(k_run)
                self._owners.append(s)
        self._max_keys = max(k_runs)
        self._sequences = {
            "cu_seqlens_q": _int32([0, *accumulate(q_runs)], device),
            "cu_seqlens_k": _int32([0, *accumulate(k_runs)], device),
            "max_seqlen_q": max(q_runs),
            "max_seqlen_k": self._max_keys,
        }

    def _slopes(self, slopes: Optional[Tensor]) -> Optional[Tensor]:
        if slopes is None or slopes.dim() == 1:
            return slopes
        return slopes[torch.tensor(self._owners, device=self._device)]

    def _one_sided(self, slopes: Tensor) -> Distances:
        anchor = self._max_keys - 1 if self._side > 0 else 0
        columns = torch.arange(self._max_keys, device=self._device) - anchor
        own = self._slopes(slopes) if slopes.dim() == 2 else slopes[None]
        bias = (self._side * own[..., None] * columns)[:, :, None]
        rows = torch.zeros(sum(self._q_lengths), device=self._device)
        for start, block in self._starts():
            places = torch.arange(block.rows, device=self._device)
            rows[start : start + block.rows] = anchor - block.ahead - places
        by_token = slopes[:, None]
        if slopes.dim() == 2:
            lengths = torch.tensor(self._q_lengths, device=self._device)
            by_token = slopes.repeat_interleave(lengths, 0).t()
        return Distances(bias, self._side * by_token * rows)

    def _starts(self):
        """The first row of each block among those of all sequences, and the block."""
        starts = [0, *accumulate(self._q_lengths)]
        return [(starts[s] + block.q_start, block) for s, block in self._blocks.items()]


def _int32(values: list[int], device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def _runs(block: Optional[Block], rows: int, keys: int) -> list[tuple[int, int]]:
    """Numbers of queries and keys of the runs of one sequence, in order; none is empty."""
    if block is None:
        runs = [(rows, 0), (0, keys)]
    else:
        runs = [
            (block.q_start, 0),
            (0, block.k_start),
            (block.rows, block.keys),
            (rows - block.q_stop, 0),
            (0, keys - block.k_stop),
        ]
    return [run for run in runs if run != (0, 0)]


def packed_calls(
    blocks: list[list[Block]], q_lengths: list[int], k_lengths: list[int], device
) -> list[Call]:
    """The calls of packed sequences.

    Args:
        blocks: of each sequence.
        q_lengths, k_lengths: tokens that the processes hold of each sequence.
        device: of the tensors.
    """
    alike: dict = {}  # blocks with one window, at one side, at most one of a sequence
    for s, of_sequence in enumerate(blocks):
        seen: dict = {}
        for block in of_sequence:
            kind = (block.left, block.right, block.side)
            seen[kind] = seen.get(kind, 0) + 1
            alike.setdefault((*kind, seen[kind]), {})[s] = block
    return [_PackedCall(some, q_lengths, k_lengths, device) for some in alike.values()]


class Merged:
    """out and softmax_lse over keys that are seen a part at a time, in fp32.

    With ``w = exp(lse_b) / (exp(lse_a) + exp(lse_b))`` out is ``out_a + w (out_b - out_a)``: the
    merge of two softmax states (https://arxiv.org/abs/2205.14135), without a division.
    """

    def __init__(self, token_dim: int, out_shape: tuple, lse_shape: tuple, device):
        self._dim, self._out_shape, self._lse_shape = token_dim, out_shape, lse_shape
        self._device = device
        self._out = self._lse = None

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Add attention of some rows over more keys; the kernel's +inf marks one that saw none."""
        lse = torch.where(lse == _INF, -_INF, lse)
        if self._out is None and out.shape == self._out_shape:
            self._out, self._lse = out, lse
            return
        self._widen()
        own_lse, own_out = self._lse[..., rows], _tokens(self._out, self._dim, rows)
        weight = torch.where(lse == -_INF, 0.0, torch.sigmoid(lse - own_lse))
        own_out.lerp_(out.float(), weight.transpose(-1, -2).unsqueeze(-1))
        own_lse.copy_(torch.logaddexp(own_lse, lse))

    def _widen(self) -> None:
        if self._out is None:
            self._out = torch.zeros(self._out_shape, device=self._device)
            self._lse = torch.full(self._lse_shape, -_INF, device=self._device)
        elif self._out.dtype != torch.float32:
            self._out = self._out.float()

    def result(self, dtype: torch.dtype, s_aux: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """Return out and softmax_lse, +inf where a row saw nothing; ``s_aux``: sinks, (nheads,)."""
        if self._out is None or s_aux is not None:
            self._widen()
        out, lse = self._out, self._lse
        if s_aux is not None:
            total = torch.logaddexp(lse, s_aux.float()[:, None].expand_as(lse))
            weight = torch.where(lse == -_INF, 0.0, torch.exp(lse - total))
            out, lse = out * weight.transpose(-1, -2).unsqueeze(-1), total
        return out.to(dtype), torch.where(lse == -_INF, _INF, lse)


class Sum:
    """A sum of parts of a gradient, in fp32 as soon as there are two."""

    def __init__(self, token_dim: int, shape: tuple, device):
        self._dim, self._shape, self._device = token_dim, shape, device
        self._value: Optional[Tensor] = None  # of all tokens
        self._part: Optional[tuple] = None  # the only part, and its tokens

    def add(self, part: Tensor, where: slice = slice(None)) -> None:
        """Add what belongs to some tokens; ``part`` may be kept."""
        if self._value is None and self._part is None:
            if part.shape == self._shape:
                self._value = part
            else:
                self._part = (part, where)
            return
        _tokens(self._widened(), self._dim, where).add_(part)

    def join(self, other: Tensor) -> None:
        """Add a tensor of all tokens, which is kept: it may become the sum."""
        if other.dtype != torch.float32:
            self.add(other)
            return
        if self._part is not None:
            part, where = self._part
            _tokens(other, self._dim, where).add_(part)
        elif self._value is not None:
            other.add_(self._value)
        self._value, self._part = other, None

    def _widened(self) -> Tensor:
        if self._value is None:
            self._value = self._placed(torch.float32)
        elif self._value.dtype != torch.float32:
            self._value = self._value.float()
        return self._value

    def _placed(self, dtype: torch.dtype) -> Tensor:
        """Zeros, and the only part if there is one."""
        value = torch.zeros(self._shape, dtype=dtype, device=self._device)
        if self._part is not None:
            part, where = self._part
            _tokens(value, self._dim, where).copy_(part)
            self._part = None
        return value

    def result(self, dtype: torch.dtype) -> Tensor:
        """Return the sum, which is then to be left alone."""
        if self._value is None:
            self._value = self._placed(dtype)
        return self._value.to(dtype)
