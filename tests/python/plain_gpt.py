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


# ------------------------------------------------------------- any configuration, by our names


DEFAULTS = {
    "n_head_kv": None, "head_dim": None, "n_positions": 0, "position_embeddings_offset": 0,
    "word_embed_proj_dim": None, "embedding_scale": None, "norm_head": False,
    "final_logit_softcap": 0.0, "prenorm": True, "sandwich_norm": False, "parallel_block": False,
    "parallel_block_tied_norm": False, "rms_norm": False, "rms_norm_zero_centered": False,
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "query_pre_attn_scalar": None,
    "scale_attn_by_inverse_layer_idx": False, "attn_softcap": 0.0, "attn_sinks": False,
    "qk_norm": False, "window_size": (-1, -1), "sliding_window": None, "layer_types": None,
    "use_alibi": False, "alibi_scale": 1.0, "rotary_emb_fraction": 0.0, "rotary_emb_base": 10000.0,
    "rotary_emb_interleaved": False, "rotary_emb_scaling": None, "rotary_emb_local_base": None,
    "attn_dwconv": False, "activation_function": "gelu_new", "mup_width_scale": 1.0,
    "mup_embeddings_multiplier": 1.0, "mup_output_multiplier": 1.0, "mup_attn_multiplier": 1.0,
    "mup_scale_qk_dot_by_d": False,
}  # fmt: skip


def _gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_approx": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: x.clamp(min=0),
    "sqrelu": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x * torch.sigmoid(x),
    "glu": torch.sigmoid,
    "swiglu": lambda x: x * torch.sigmoid(x),
    "geglu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "geglu_approx": _gelu_tanh,
    "reglu": lambda x: x.clamp(min=0),
}


class PlainGPT:
    """The logits of a state dict by our names, of a configuration without tensor parallelism."""

    def __init__(self, config, state_dict):
        self.config, self.sd = config, state_dict
        self.dim = self["head_dim"] or config.n_embd // config.n_head

    def __getitem__(self, name):
        return getattr(self.config, name, DEFAULTS[name])

    def norm(self, x, name):
        weight, eps = self.sd[f"{name}.weight"], self["layer_norm_epsilon"]
        if not self["rms_norm"]:
            x = x - x.mean(-1, keepdim=True)
            return (
                x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
                + self.sd[f"{name}.bias"]
            )
        return rms_norm(x, weight + 1 if self["rms_norm_zero_centered"] else weight, eps)

    def linear(self, x, name):
        out = x @ self.sd[f"{name}.weight"].T
        return out + self.sd[f"{name}.bias"] if f"{name}.bias" in self.sd else out

    def is_sliding(self, i):
        if self["layer_types"] is None:
            return self["sliding_window"] is not None
        return self["layer_types"][i] == "sliding_attention"

    def turned(self, x, i):
        """Rotary embedding of ``(batch, heads, seqlen, dim)``."""
        count = int(self["rotary_emb_fraction"] * self.dim)
        if count == 0:
            return x
        base = self["rotary_emb_base"]
        scaling = self["rotary_emb_scaling"]
        if self.is_sliding(i) and self["rotary_emb_local_base"] is not None:
            base, scaling = self["rotary_emb_local_base"], None
        frequency = base ** (-torch.arange(0, count, 2).double() / count)
        if scaling is not None:
            assert scaling["rope_type"] == "linear"
            frequency = frequency / scaling["factor"]
        angles = torch.outer(torch.arange(x.shape[2]).double(), frequency).to(x.dtype)
        pairs = x[..., :count].unflatten(-1, (-1, 2) if self["rotary_emb_interleaved"] else (2, -1))
        way = -1 if self["rotary_emb_interleaved"] else -2
        a, b = pairs.unbind(way)
        cos, sin = angles.cos(), angles.sin()
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), way).flatten(-2)
        return torch.cat((out, x[..., count:]), -1)

    def scale(self, i):
        scale = self.dim ** (-1.0 if self["mup_scale_qk_dot_by_d"] else -0.5)
        if not self["scale_attn_weights"]:
            scale = 1.0
        if self["query_pre_attn_scalar"] is not None:
            scale = self["query_pre_attn_scalar"] ** -0.5
        if self["scale_attn_by_inverse_layer_idx"]:
            scale = scale / (i + 1)
        return scale * self["mup_attn_multiplier"]

    def hidden(self, seqlen, i):
        distance = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
        left = self["window_size"][0]
        if self.is_sliding(i):
            left = self["sliding_window"] - 1
        return (distance < 0) | ((distance > left) if left >= 0 else False)

    def mixer(self, x, i):
        name = f"transformer.layers.{i}.mixer"
        heads, heads_k = self.config.n_head, self["n_head_kv"] or self.config.n_head
        qkv = self.linear(x, f"{name}.Wqkv")
        if self["attn_dwconv"]:
            weight, bias = self.sd[f"{name}.dwconv_qkv.weight"], self.sd[f"{name}.dwconv_qkv.bias"]
            qkv = F.conv1d(F.pad(qkv.mT, (2, 0)), weight, bias, groups=len(weight)).mT
        qkv = qkv.unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = qkv.split([heads, heads_k, heads_k], 1)
        if self["qk_norm"]:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k = self.turned(q, i), self.turned(k, i)
        k, v = (t.repeat_interleave(heads // heads_k, 1) for t in (k, v))
        scores = q @ k.mT * self.scale(i)
        if self["attn_softcap"]:
            scores = self["attn_softcap"] * torch.tanh(scores / self["attn_softcap"])
        seqlen = x.shape[1]
        if self["use_alibi"]:
            place = torch.arange(seqlen)
            slopes = alibi_slopes(heads).to(x.dtype) * self["alibi_scale"]
            scores = scores - slopes[:, None, None] * (place[:, None] - place).abs()
        weights = scores.masked_fill(self.hidden(seqlen, i), -math.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if self["attn_sinks"]:
            total = total + self.sd[f"{name}.sinks"].exp()[:, None, None]
        context = (weights / total @ v).transpose(1, 2).flatten(2)
        return self.linear(context, f"{name}.out_proj")

    def mlp(self, x, i):
        name = f"transformer.layers.{i}.mlp"
        act = ACTIVATIONS[self["activation_function"]]
        y = self.linear(x, f"{name}.fc1")
        if self["activation_function"].endswith(("glu", "glu_approx")):
            y, gate = y.chunk(2, -1)
            y = y * act(gate)
        else:
            y = act(y)
        return self.linear(y, f"{name}.fc2")

    def block(self, x, i):
        name = f"transformer.layers.{i}"
        if not self["prenorm"]:
            x = self.norm(x + self.mixer(x, i), f"{name}.norm1")
            return self.norm(x + self.mlp(x, i), f"{name}.norm2")
        y = self.norm(x, f"{name}.norm1")
        if self["parallel_block"]:
            z = y if self["parallel_block_tied_norm"] else self.norm(x, f"{name}.norm2")
            return x + self.mixer(y, i) + self.mlp(z, i)
        y = self.mixer(y, i)
        x = x + (self.norm(y, f"{name}.post_norm1") if self["sandwich_norm"] else y)
        y = self.mlp(self.norm(x, f"{name}.norm2"), i)
        return x + (self.norm(y, f"{name}.post_norm2") if self["sandwich_norm"] else y)

    def logits(self, ids):
        name = "transformer.embeddings"
        x = self.sd[f"{name}.word_embeddings.weight"][ids]
        if self["word_embed_proj_dim"] is not None:
            x = self.linear(x, f"{name}.project_in")
        if self["n_positions"] > 0:
            first = self["position_embeddings_offset"]
            x = x + self.sd[f"{name}.position_embeddings.weight"][first : first + ids.shape[1]]
        x = x * (self["embedding_scale"] or 1.0) * self["mup_embeddings_multiplier"]
        for i in range(self.config.n_layer):
            x = self.block(x, i)
        if self["prenorm"]:
            x = self.norm(x, "transformer.ln_f")
        if self["word_embed_proj_dim"] is not None:
            x = self.linear(x, "project_out")
        head = self.sd["lm_head.weight"]
        if self["norm_head"]:
            head = head / head.norm(dim=-1, keepdim=True)
        logits = x @ head.T + self.sd.get("lm_head.bias", 0.0)
        logits = logits * self["mup_output_multiplier"] * self["mup_width_scale"]
        cap = self["final_logit_softcap"]
        return cap * torch.tanh(logits / cap) if cap else logits
