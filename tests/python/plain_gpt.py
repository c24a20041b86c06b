"""A GPT written down once more, as a function of a state dict, by plain PyTorch operations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def alibi_slopes(heads):
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return torch.tensor(slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)])


def rms_norm(x, weight, eps):
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rotated(x, base):
    """Turn the halves of ``(batch, heads, seqlen, dim)``."""
    dim = x.shape[-1]
    angles = torch.outer(
        torch.arange(x.shape[2]).float(), base ** (-torch.arange(0, dim, 2).float() / dim)
    )
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attention(q, k, v, scale, slopes=None):
    """Causal attention of ``(batch, heads, seqlen, dim)``."""
    seqlen = q.shape[2]
    scores = q @ k.transpose(-1, -2) * scale
    if slopes is not None:
        place = torch.arange(seqlen)
        scores = scores - slopes[:, None, None] * (place[:, None] - place).abs()
    hidden = torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def baichuan(sd, ids, config, use_rotary, norm_head):
    """The logits of Baichuan, by its own names of parameters."""
    x = sd["model.embed_tokens.weight"][ids]
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    scale = (config.hidden_size // heads) ** -0.5
    for i in range(config.num_hidden_layers):
        layer = {n.split(".", 3)[3]: w for n, w in sd.items() if n.startswith(f"model.layers.{i}.")}
        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (
            split_heads(t, heads) for t in (y @ layer["self_attn.W_pack.weight"].T).chunk(3, -1)
        )
        slopes = None if use_rotary else alibi_slopes(heads)
        if use_rotary:
            q, k = rotated(q, 10000.0), rotated(k, 10000.0)
        x = x + attention(q, k, v, scale, slopes) @ layer["self_attn.o_proj.weight"].T
        y = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        gate = F.silu(y @ layer["mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    x = rms_norm(x, sd["model.norm.weight"], eps)
    head = sd["lm_head.weight"]
    return x @ (head / head.norm(dim=-1, keepdim=True) if norm_head else head).T


def btlm(sd, ids, config):
    """The logits of BTLM, by its own names of parameters."""
    x = sd["transformer.wte.weight"][ids] * config.mup_embeddings_scale
    heads, eps, dim = config.n_head, config.layer_norm_epsilon, config.n_embd

    def norm(x, name):
        return F.layer_norm(x, (dim,), sd[f"{name}.weight"], sd[f"{name}.bias"], eps)

    def conv1d(x, name):
        return x @ sd[f"{name}.weight"] + sd[f"{name}.bias"]

    for i in range(config.n_layer):
        layer = f"transformer.h.{i}"
        parts = conv1d(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").chunk(3, -1)
        q, k, v = (split_heads(t, heads) for t in parts)
        scale = 1 / (dim // heads)  # mup_scale_qk_dot_by_d
        context = attention(q, k, v, scale, alibi_slopes(heads))
        x = x + conv1d(context, f"{layer}.attn.c_proj")
        y = norm(x, f"{layer}.ln_2")
        hidden = conv1d(y, f"{layer}.mlp.c_fc") * F.silu(conv1d(y, f"{layer}.mlp.c_fc2"))
        x = x + conv1d(hidden, f"{layer}.mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ sd["transformer.wte.weight"].T
    return logits * config.mup_output_alpha * config.mup_width_scale
