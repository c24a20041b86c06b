"""A small GPT of plain PyTorch modules with flash_attn for attention, and generation with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn import flash_attn_func, flash_attn_with_kvcache


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; the vocabulary is the 256 values of a byte."""

    num_layers: int = 4
    width: int = 192
    num_heads: int = 3
    max_seqlen: int = 1024
    vocabulary: int = 256

    @property
    def headdim(self) -> int:
        return self.width // self.num_heads


def rotary_table(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding, (max_seqlen, headdim / 2) each."""
    frequencies = 10000.0 ** (-torch.arange(0, config.headdim, 2) / config.headdim)
    angles = torch.outer(torch.arange(config.max_seqlen), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (batch, seqlen, nheads, headdim), pairing halves of a head."""
    cos, sin = (t[: x.shape[1], None].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


@dataclass
class KVCache:
    """Keys and values of all tokens so far: a (batch, max_seqlen, nheads, headdim) pair a layer."""

    keys: list[Tensor]
    values: list[Tensor]
    seqlens: Tensor  # int32 (batch,): tokens in the cache

    @classmethod
    def empty(cls, config: GPTConfig, batch: int) -> KVCache:
        shape = (batch, config.max_seqlen, config.num_heads, config.headdim)
        layers = range(config.num_layers)
        return cls(
            keys=[torch.zeros(shape) for _ in layers],
            values=[torch.zeros(shape) for _ in layers],
            seqlens=torch.zeros(batch, dtype=torch.int32),
        )


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = (3, config.num_heads, config.headdim)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, self.heads).unbind(2)
        if cache is None:
            out = flash_attn_func(rotate(q, *rotary), rotate(k, *rotary), v, causal=True)
        else:  # k and v are appended to the cache in place, q and k rotated to their positions
            out = flash_attn_with_kvcache(
                q,
                cache.keys[self.layer],
                cache.values[self.layer],
                k,
                v,
                *rotary,
                cache_seqlens=cache.seqlens,
                causal=True,
                rotary_interleaved=False,
            )
        return self.out(out.flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalised input and added to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config, layer)
        self.norm_mlp = nn.LayerNorm(config.width, bias=False)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotary, cache)
        return x + self.down(F.relu(self.up(self.norm_mlp(x))).square())


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.norm_in = nn.LayerNorm(config.width, bias=False)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.zeros_(self.head.weight)  # the first loss is ln(256), that of guessing
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the byte after each token.

        Arguments:
            tokens: int64 (batch, seqlen).
            cache: attends to its tokens as well, and takes these ones in.

        Returns:
            (batch, seqlen, 256).
        """
        x = self.norm_in(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, (self.cos, self.sin), cache)
        if cache is not None:
            cache.seqlens += tokens.shape[1]
        return self.head(self.norm_out(x))

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token, (batch, 1), of logits (batch, 256). At temperature 0 it is the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


@torch.inference_mode()
def generate(
    model: GPT, prompt: Tensor, num_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Tensor:
    """``num_tokens`` tokens after the prompt, int64 (batch, seqlen), with a KV cache.

    The prompt goes through the model at once, then one token a step.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache.empty(model.config, len(prompt))
    token, tokens = prompt, []
    for _ in range(num_tokens):
        token = pick(model(token, cache)[:, -1], temperature, generator)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


@torch.inference_mode()
def generate_without_cache(model: GPT, prompt: Tensor, num_tokens: int) -> Tensor:
    """The likeliest ``num_tokens`` tokens after the prompt; each step computes all tokens again."""
    tokens = prompt
    for _ in range(num_tokens):
        tokens = torch.cat([tokens, pick(model(tokens)[:, -1], 0.0, None)], dim=1)
    return tokens[:, prompt.shape[1] :]
