"""A small decoder for tests of generation, and its tokens without any cache to compare with."""

from __future__ import annotations

from collections import namedtuple
from functools import partial

import torch
from torch import nn

from flash_attn.modules.block import Block
from flash_attn.modules.embedding import GPT2Embeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.utils.generation import GenerationMixin

VOCAB, DIM, POSITIONS = 61, 32, 64
Output = namedtuple("Output", ["logits"])


class TinyDecoder(nn.Module, GenerationMixin):
    """Two layers, four heads, two of keys; positions embedded, or turned with ``rotary``."""

    takes_packed_tokens = True

    def __init__(self, seed: int = 0, rotary: int = 0, use_flash_attn: bool = True, **mha):
        super().__init__()
        torch.manual_seed(seed)
        self.embeddings = GPT2Embeddings(DIM, VOCAB, 0 if rotary else POSITIONS)
        options = {"num_heads": 4, "num_heads_kv": 2, "causal": True, "rotary_emb_dim": rotary}
        options.update(use_flash_attn=use_flash_attn, **mha)
        self.layers = nn.ModuleList(
            Block(DIM, partial(MHA, layer_idx=i, **options), partial(Mlp, hidden_features=64))
            for i in range(2)
        )
        self.norm = nn.LayerNorm(DIM)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)
        self.calls = []  # shapes of the tokens that the model was called with
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.25)
        self.eval().requires_grad_(False)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        self.calls.append(tuple(input_ids.shape))
        x, residual = self.embeddings(input_ids, position_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, mixer_kwargs={"inference_params": inference_params})
        x = self.norm(x + residual)
        if num_last_tokens > 0:
            packing = getattr(inference_params, "packing", None)
            last = slice(-num_last_tokens, None)
            x = x[:, last] if packing is None else x[0, packing.last(num_last_tokens)]
        return Output(self.lm_head(x))


def greedy(model, prompt, max_length, stop=()):
    """Generate after one prompt ``(seqlen,)`` without a cache: tokens, and logits of each."""
    tokens, scores = prompt.clone(), []
    while len(tokens) < max_length and not (scores and int(tokens[-1]) in stop):
        logits = model(tokens[None]).logits[0, -1]
        scores.append(logits)
        tokens = torch.cat((tokens, logits.argmax()[None]))
    return tokens, torch.stack(scores)


def prompts(*lengths, seed=0):
    """Return random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]
