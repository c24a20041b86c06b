"""GPT-2's parameters by the names of Hugging Face and Megatron, and those of models named alike."""

from __future__ import annotations

from flash_attn.models._config import GPTOptions
from flash_attn.models._state_dict import (
    POSITIONS,
    SAME,
    TRANSPOSED,
    WORDS,
    Layout,
    Step,
    entry,
    gate_joined,
    grouped_qkv,
    head_entries,
    linear,
    norms,
    vocabulary,
)


def gpt2_like(
    options: GPTOptions, *, source: str, dense: Step, qkv: Step, ignored: str, gated: tuple = ()
) -> Layout:
    """The names of Hugging Face's GPT-2.

    Args:
        dense: of every linear layer.
        qkv: of the one of queries, keys and values.
        ignored: as of ``Layout``.
        gated: names of the layers in ``mlp`` that make a gated MLP's first one.
    """
    entries = [entry(WORDS, "transformer.wte.weight", step=vocabulary(options))]
    if options.n_positions > 0:
        entries.append(entry(POSITIONS, "transformer.wpe.weight"))
    first = dense.then(gate_joined(options)) if gated else dense
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"transformer.h.{i}"
        entries += norms(f"{ours}.norm1", f"{theirs}.ln_1", options)
        entries += norms(f"{ours}.norm2", f"{theirs}.ln_2", options)
        fc1 = [f"{theirs}.mlp.{name}" for name in gated or ("c_fc",)]
        entries += linear(
            f"{ours}.mixer.Wqkv", f"{theirs}.attn.c_attn", bias=options.qkv_proj_bias, step=qkv
        )
        entries += linear(
            f"{ours}.mixer.out_proj",
            f"{theirs}.attn.c_proj",
            bias=options.out_proj_bias,
            step=dense,
        )
        entries += linear(f"{ours}.mlp.fc1", *fc1, bias=options.mlp_fc1_bias, step=first)
        fc2 = (f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj")
        entries += linear(*fc2, bias=options.mlp_fc2_bias, step=dense)
    entries += norms("transformer.ln_f", "transformer.ln_f", options)
    entries += head_entries("lm_head", options)
    return Layout(
        source,
        entries,
        prefix="transformer.",
        head="lm_head.weight" if options.tie_word_embeddings else None,
        embedding="transformer.wte.weight",
        ignored=ignored,
    )


def gpt2(options: GPTOptions) -> Layout:
    """Hugging Face's GPT-2."""
    return gpt2_like(
        options,
        source="GPT-2",
        dense=TRANSPOSED,
        qkv=TRANSPOSED,
        ignored=r"\.attn\.(bias|masked_bias)$",
    )


def megatron(options: GPTOptions) -> Layout:
    """Megatron-LM's GPT, below ``language_model.``."""
    entries = [entry(WORDS, "embedding.word_embeddings.weight", step=vocabulary(options))]
    if options.n_positions > 0:
        entries.append(entry(POSITIONS, "embedding.position_embeddings.weight"))
    for i in range(options.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"encoder.layers.{i}"
        for mine, their, bias, step in (
            ("norm1", "input_layernorm", not options.rms_norm, SAME),
            ("norm2", "post_attention_layernorm", not options.rms_norm, SAME),
            (
                "mixer.Wqkv",
                "self_attention.query_key_value",
                options.qkv_proj_bias,
                grouped_qkv(options),
            ),
            ("mixer.out_proj", "self_attention.dense", options.out_proj_bias, SAME),
            ("mlp.fc1", "mlp.dense_h_to_4h", options.mlp_fc1_bias, SAME),
            ("mlp.fc2", "mlp.dense_4h_to_h", options.mlp_fc2_bias, SAME),
        ):
            entries += linear(f"{ours}.{mine}", f"{theirs}.{their}", bias=bias, step=step)
    entries += norms("transformer.ln_f", "encoder.final_layernorm", options)
    entries += head_entries("output_layer", options)
    return Layout(
        "Megatron's GPT",
        entries,
        head="output_layer.weight" if options.tie_word_embeddings else None,
        embedding="embedding.word_embeddings.weight",
        ignored=r"rotary_(pos_)?emb\.inv_freq$|_extra_state$",
    )
