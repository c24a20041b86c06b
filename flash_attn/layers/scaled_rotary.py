"""Rotary embedding for contexts longer than those of pretraining: scaled frequencies.

The kinds and their parameters are those of Hugging Face's ``rope_parameters``; a pair's frequency
is ``base ** (-2i / dim)`` before. ``original`` below is ``original_max_position_embeddings``.

- "linear": frequencies divided by ``factor``.
- "dynamic" (NTK): a base that grows with a sequence longer than ``original``.
- "yarn" (https://arxiv.org/abs/2309.00071): slow pairs divided by ``factor``, fast ones kept, a
  ramp between ``beta_slow`` and ``beta_fast`` turns within ``original`` tokens; cos and sin times
  ``attention_factor``.
- "llama3": wavelengths above ``original / low_freq_factor`` times ``factor``, those below
  ``original / high_freq_factor`` kept, a ramp between.
- "longrope" (https://arxiv.org/abs/2402.13753): each pair divided by its ``short_factor``, in
  sequences longer than ``original`` by its ``long_factor``; cos and sin times ``attention_factor``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Optional

import torch
from torch import Tensor

from flash_attn.layers.rotary import RotaryEmbedding

__all__ = ["ScaledRotaryEmbedding", "check_scaling"]

_ORIGINAL = "original_max_position_embeddings"
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "longrope": ("short_factor", "long_factor", _ORIGINAL),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
LENGTH_DEPENDENT = ("dynamic", "longrope")  # whose frequencies depend on a sequence's length
_PER_PAIR = ("short_factor", "long_factor")
_ELSEWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL)


def _kind(scaling: Mapping) -> str:
    return scaling.get("rope_type", scaling.get("type"))


def _check_number(name: str, key: str, value) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.0 < value < math.inf:
        raise ValueError(f"{name}[{key!r}] must be a positive number, got {value!r}")


def check_scaling(scaling: Mapping, rotary_dim: int, name: str = "scaling") -> None:
    """Raise for a description of scaled frequencies that is unknown or incomplete.

    Args:
        scaling: ``rope_type`` and the kind's parameters, as at the head of this module.
        rotary_dim: number of a head's elements that are turned.
        name: what the caller calls ``scaling``.

    Raises:
        TypeError: it is not a mapping.
        ValueError: the kind is unknown, a parameter missing, unknown or out of range.
    """
    if not isinstance(scaling, Mapping):
        raise TypeError(f"{name} must be a dict with rope_type, got {scaling!r:.80}")
    kind = _kind(scaling)
    if kind not in _REQUIRED:
        raise ValueError(f"{name}['rope_type'] must be one of {', '.join(_REQUIRED)}, got {kind!r}")
    known = (*_REQUIRED[kind], *_OPTIONAL.get(kind, ()))
    for key in _REQUIRED[kind]:
        if scaling.get(key) is None:
            raise ValueError(f"{name} of rope_type {kind!r} needs {key!r}")
    for key, value in scaling.items():
        if key not in known and key not in _ELSEWHERE:
            raise ValueError(f"{name} of rope_type {kind!r} has an unknown key {key!r} ({value!r})")
        if key in _PER_PAIR:
            _check_per_pair(name, key, value, rotary_dim)
        elif key in known and value is not None and key != "truncate":
            _check_number(name, key, value)
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(
            f"{name}['low_freq_factor'] must be less than 'high_freq_factor', got "
            f"{scaling['low_freq_factor']} and {scaling['high_freq_factor']}"
        )


def _check_per_pair(name: str, key: str, value, rotary_dim: int) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != rotary_dim // 2:
        raise ValueError(
            f"{name}[{key!r}] must have a number for each of {rotary_dim // 2} pairs, got "
            f"{value!r:.80}"
        )
    for number in value:
        _check_number(name, key, number)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(scaling: Mapping) -> float:
    given, factor = scaling.get("attention_factor"), scaling["factor"]
    if given is not None:
        return given
    numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if numerator and denominator:
        return _mscale(factor, numerator) / _mscale(factor, denominator)
    return _mscale(factor)


def _longrope_attention_factor(scaling: Mapping) -> float:
    given, factor = scaling.get("attention_factor"), scaling.get("factor") or 1.0
    if given is not None:
        return given
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(scaling[_ORIGINAL]))


def _yarn_frequencies(inv_freq: Tensor, dim: int, base: float, scaling: Mapping) -> Tensor:
    def pair_that_turns(times: float) -> float:
        """The pair, a fraction, that turns so often within the original context."""
        return dim * math.log(scaling[_ORIGINAL] / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pair = torch.arange(dim // 2, dtype=torch.float32, device=inv_freq.device)
    slow = ((pair - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return inv_freq / scaling["factor"] * slow + inv_freq * (1 - slow)


def _llama3_frequencies(inv_freq: Tensor, scaling: Mapping) -> Tensor:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling[_ORIGINAL] * inv_freq / (2 * math.pi)
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq / scaling["factor"] * (1 - fast) + inv_freq * fast


class ScaledRotaryEmbedding(RotaryEmbedding):
    """``RotaryEmbedding`` with scaled frequencies, without xPos."""

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        device=None,
        *,
        scaling: Mapping,
    ):
        """Make the module.

        Args:
            dim, base, interleaved, device: as for ``RotaryEmbedding``.
            scaling: ``rope_type`` and the kind's parameters, as at the head of this module; other
                keys of ``rope_parameters`` that say nothing about scaling are without effect.

        Raises:
            TypeError, ValueError: those of ``check_scaling``.
        """
        check_scaling(scaling, dim)
        self.scaling, self.kind = dict(scaling), _kind(scaling)
        self.depends_on_length = self.kind in LENGTH_DEPENDENT
        self.attention_factor = 1.0
        if self.kind == "yarn":
            self.attention_factor = _yarn_attention_factor(scaling)
        elif self.kind == "longrope":
            self.attention_factor = _longrope_attention_factor(scaling)
        super().__init__(dim, base=base, interleaved=interleaved, device=device)

    def _compute_inv_freq(self, device=None, length: Optional[int] = None) -> Tensor:
        """Return the frequencies fp32 ``(dim / 2,)`` for sequences of ``length`` tokens."""
        base, scaling = self.base, self.scaling
        if self.kind == "dynamic":
            stretch = max(length or 0, scaling[_ORIGINAL]) / scaling[_ORIGINAL]
            factor = scaling["factor"]
            base = base * (factor * stretch - (factor - 1)) ** (self.dim / (self.dim - 2))
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        inv_freq = 1.0 / base**exponents
        if self.kind == "linear":
            return inv_freq / scaling["factor"]
        if self.kind == "yarn":
            return _yarn_frequencies(inv_freq, self.dim, base, scaling)
        if self.kind == "llama3":
            return _llama3_frequencies(inv_freq, scaling)
        if self.kind == "longrope":
            is_long = (length or 0) > scaling[_ORIGINAL]
            factors = scaling["long_factor" if is_long else "short_factor"]
            return inv_freq / torch.tensor(factors, dtype=torch.float32, device=device)
        return inv_freq

    def _cos_sin(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _counted(self, seqlen: int) -> Optional[int]:
        if not self.depends_on_length:
            return None
        original = self.scaling[_ORIGINAL]
        if self.kind == "dynamic":
            return max(seqlen, original)
        return original + 1 if seqlen > original else original

    def _frequencies(self, length: Optional[int], device) -> Tensor:
        if self.depends_on_length:
            frequencies = self._compute_inv_freq(device, length)
            self.inv_freq = frequencies.to(self.inv_freq.device)  # to be looked at, not read here
            return frequencies
        return super()._frequencies(length, device)
