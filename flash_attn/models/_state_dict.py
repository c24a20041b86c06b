"""State dicts of other packages and of this one, converted both ways by one description.

A ``Layout`` says, parameter by parameter, which of theirs make one of ours and how; the way back is
the inverse, so that what is converted and converted back is what it was, bit by bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.models._config import GPTOptions


@dataclass(frozen=True)
class Step:
    """A transformation of tensors, and its inverse."""

    to_ours: Callable[[list[Tensor]], list[Tensor]]
    to_theirs: Callable[[list[Tensor]], list[Tensor]]

    def then(self, other: Step) -> Step:
        """Return this step on the way to ours, then another one."""
        return Step(
            lambda tensors: other.to_ours(self.to_ours(tensors)),
            lambda tensors: self.to_theirs(other.to_theirs(tensors)),
        )


def each(to_ours: Callable[[Tensor], Tensor], to_theirs: Callable[[Tensor], Tensor]) -> Step:
    """A step that does the same to every tensor."""
    return Step(lambda ts: [to_ours(t) for t in ts], lambda ts: [to_theirs(t) for t in ts])


SAME = Step(lambda tensors: tensors, lambda tensors: tensors)


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous() if x.dim() == 2 else x


TRANSPOSED = each(_transposed, _transposed)  # of transformers' Conv1D; a bias stays


def joined(sizes: list[int]) -> Step:
    """Several tensors one after the other, along the first dimension; ``sizes`` for the way back,
    scaled where the whole is a part of what they say."""

    def split(tensors: list[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        return [part.contiguous() for part in whole.split(sizes)]

    return Step(lambda tensors: [torch.cat(tensors)], split)


def qkv_joined(options: GPTOptions) -> Step:
    """Queries, keys and values of all heads."""
    kv = options.n_head_kv * options.head_dim
    return joined([options.n_head * options.head_dim, kv, kv])


def gate_joined(options: GPTOptions) -> Step:
    """The two halves of a gated MLP's first layer: what is multiplied, then the gate."""
    return joined([options.hidden_features] * 2)


def padded_to(rows: int, vocab_size: int) -> Step:
    """Rows of zeros behind those of a whole vocabulary."""

    def pad(x: Tensor) -> Tensor:
        if x.shape[0] != vocab_size or rows == vocab_size:
            return x  # a part of the vocabulary: combine_state_dicts_tp fills up the whole
        return F.pad(x, (0, 0, 0, rows - vocab_size) if x.dim() == 2 else (0, rows - vocab_size))

    return each(pad, lambda x: x[:vocab_size].contiguous() if rows != vocab_size else x)


def vocabulary(options: GPTOptions) -> Step:
    """An embedding, padded as the configuration says."""
    return padded_to(options.padded_vocab_size, options.vocab_size)


def grouped_qkv(options: GPTOptions) -> Step:
    """From rows by groups of a key-value head: its queries, key and value, then the next group's,
    to all queries, all keys, all values."""
    groups, dim = options.n_head_kv, options.head_dim
    queries = options.n_head // groups

    def to_ours(x: Tensor) -> Tensor:
        x = x.unflatten(0, (groups, queries + 2, dim))
        return torch.cat([part.flatten(0, 2) for part in x.split([queries, 1, 1], 1)])

    def to_theirs(x: Tensor) -> Tensor:
        parts = x.split([groups * queries * dim, groups * dim, groups * dim])
        parts = [part.unflatten(0, (groups, -1, dim)) for part in parts]
        return torch.cat(parts, 1).flatten(0, 2)

    return each(to_ours, to_theirs)


def interleaved_rotary(options: GPTOptions) -> Step:
    """From a head whose halves are the pairs that turn, to one whose neighbours are: of queries,
    keys and values the first two."""
    dim = options.head_dim

    def to_ours(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()

    def to_theirs(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()

    return Step(
        lambda ts: [to_ours(t) for t in ts[:2]] + ts[2:],
        lambda ts: [to_theirs(t) for t in ts[:2]] + ts[2:],
    )


@dataclass(frozen=True)
class Entry:
    """One parameter of ours, made of theirs."""

    ours: str
    theirs: tuple[str, ...]
    step: Step = SAME


def entry(ours: str, *theirs: str, step: Step = SAME) -> Entry:
    return Entry(ours, theirs, step)


def linear(ours: str, *theirs: str, bias: bool, step: Step = SAME) -> list[Entry]:
    """Weight and bias of a layer, linear or norm."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Entry(f"{ours}.{k}", tuple(f"{name}.{k}" for name in theirs), step) for k in kinds]


@dataclass(frozen=True)
class Layout:
    """All parameters of a model.

    Attributes:
        source: what the other package calls such a model, for messages.
        entries: the parameters.
        prefix: with which their names start, other than the head's; a state dict of the model
            without its head lacks it.
        head, embedding: their names of the two that are one weight in a tied model, or None.
        ignored: a regular expression of names that are no parameters, such as masks.
        aliases: other names that theirs may have, and which they stand for.
    """

    source: str
    entries: list[Entry]
    prefix: str = ""
    head: Optional[str] = None
    embedding: Optional[str] = None
    ignored: Optional[str] = None
    aliases: Mapping[str, str] = field(default_factory=dict)

    def to_ours(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert their state dict.

        Raises:
            RuntimeError: a name is missing or unknown, or a shape does not fit; the message has it.
        """
        rest = self.prepared(state_dict)
        needed = [name for entry in self.entries for name in entry.theirs]
        known = set(needed)
        problems = [f"{name} is missing" for name in needed if name not in rest]
        problems += [f"{name} is unknown" for name in rest if name not in known]
        _raise_if(problems, self.source)
        return {
            entry.ours: _converted(entry, entry.theirs, rest, entry.step.to_ours)[0]
            for entry in self.entries
        }

    def to_theirs(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert our state dict back.

        Raises:
            RuntimeError: as for ``to_ours``.
        """
        known = {entry.ours for entry in self.entries}
        problems = [f"{name} is missing" for name in known if name not in state_dict]
        problems += [f"{name} is unknown" for name in state_dict if name not in known]
        _raise_if(sorted(problems), "GPTLMHeadModel")
        theirs: dict[str, Tensor] = {}
        for entry in self.entries:
            parts = _converted(entry, (entry.ours,), state_dict, entry.step.to_theirs)
            theirs.update(zip(entry.theirs, parts))
        return theirs

    def prepared(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return it with full names, without what is no parameter, and with the tied head."""
        named = {self.aliases.get(name, name): x for name, x in state_dict.items()}
        if self.prefix and not any(name.startswith(self.prefix) for name in named):
            heads = {n for e in self.entries for n in e.theirs if not n.startswith(self.prefix)}
            named = {n if n in heads else self.prefix + n: x for n, x in named.items()}
        if self.ignored is not None:
            named = {n: x for n, x in named.items() if not re.search(self.ignored, n)}
        if self.head is not None and self.head not in named and self.embedding in named:
            named[self.head] = named[self.embedding]
        return named


def _raise_if(problems: list[str], source: str) -> None:
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise RuntimeError(
            f"the state dict does not fit the configuration of {source}: "
            f"{'; '.join(problems[:8])}{more}"
        )


def _converted(entry: Entry, names: Iterable[str], state_dict, convert) -> list[Tensor]:
    tensors = [state_dict[name] for name in names]
    try:
        return convert(tensors)
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, tensors))
        raise RuntimeError(
            f"{shapes} does not fit the configuration's {entry.ours}: {error}"
        ) from None


def norms(ours: str, theirs: str, options: GPTOptions) -> list[Entry]:
    """A norm's entries: RMS norms have no bias."""
    return linear(ours, theirs, bias=not options.rms_norm)


def head_entries(layout_head: str, options: GPTOptions) -> list[Entry]:
    """The head's entries, by their name of it."""
    return linear("lm_head", layout_head, bias=options.lm_head_bias, step=vocabulary(options))


WORDS = "transformer.embeddings.word_embeddings.weight"
POSITIONS = "transformer.embeddings.position_embeddings.weight"


def llama_like(
    options: GPTOptions, *, source: str, qkv: list[str], rotary: bool, packed: bool = False
) -> Layout:
    """The names of Hugging Face's Llama and of those that follow it.

    Args:
        qkv: names of the layers of queries, keys and values, in ``self_attn``.
        rotary: whether neighbours are to turn with each other rather than halves.
        packed: whether ``qkv`` is one layer of all three.
    """
    step = SAME if packed else qkv_joined(options)
    if rotary:
        step = interleaved_rotary(options).then(step)
    entries = [entry(WORDS, "model.embed_tokens.weight", step=vocabulary(options))]
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"model.layers.{i}"
        entries += norms(f"{ours}.norm1", f"{theirs}.input_layernorm", options)
        entries += norms(f"{ours}.norm2", f"{theirs}.post_attention_layernorm", options)
        names = [f"{theirs}.self_attn.{name}" for name in qkv]
        entries += linear(f"{ours}.mixer.Wqkv", *names, bias=options.qkv_proj_bias, step=step)
        out = (f"{ours}.mixer.out_proj", f"{theirs}.self_attn.o_proj")
        entries += linear(*out, bias=options.out_proj_bias)
        gated = [f"{theirs}.mlp.up_proj", f"{theirs}.mlp.gate_proj"]
        bias1, bias2 = options.mlp_fc1_bias, options.mlp_fc2_bias
        entries += linear(f"{ours}.mlp.fc1", *gated, bias=bias1, step=gate_joined(options))
        entries += linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.down_proj", bias=bias2)
    entries += norms("transformer.ln_f", "model.norm", options)
    entries += head_entries("lm_head", options)
    return Layout(
        source,
        entries,
        prefix="model.",
        head="lm_head.weight" if options.tie_word_embeddings else None,
        embedding="model.embed_tokens.weight",
        ignored=r"rotary_emb\.inv_freq$",
    )
