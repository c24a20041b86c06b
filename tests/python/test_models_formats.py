"""Checkpoints of other formats than those of transformers: Meta's, Megatron's, Baichuan's, BTLM's;
and models from folders."""

from __future__ import annotations

import json
from types import SimpleNamespace

import plain_gpt
import pytest
import torch
import transformers
from gpt_cases import config
from model_cases import CASES, hf_model
from test_models_converters import converted, tokens

from flash_attn.models import gpt, llama
from flash_attn.models.baichuan import (
    baichuan_config_to_gpt2_config,
    inv_remap_state_dict_hf_baichuan,
    remap_state_dict_hf_baichuan,
)
from flash_attn.models.btlm import (
    btlm_config_to_gpt2_config,
    inv_remap_state_dict_hf_btlm,
    remap_state_dict_hf_btlm,
)
from flash_attn.models.gpt import GPTLMHeadModel, GPTModel, combine_state_dicts_tp

VOCAB = 96


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


def random_like(state_dict, std=0.2):
    """Random tensors of the same names and shapes: gains about 1."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(x.shape, generator=generator) * std
        + (name.endswith("weight") and x.dim() == 1)
        for name, x in state_dict.items()
    }


# ------------------------------------------------------------------------------ Meta's format


PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
          "multiple_of": 16, "vocab_size": -1, "rope_theta": 500000.0}  # fmt: skip


def meta_shards(state_dict, by_columns):
    """Two shards as Meta writes them; Llama 1 and 2 have the embedding divided by columns."""
    shards = []
    for rank in range(2):
        shard = {}
        for name, x in state_dict.items():
            is_column = name.endswith(("wo.weight", "w2.weight"))
            is_column |= name.startswith("tok_embeddings") and by_columns
            is_whole = "norm" in name
            shard[name] = x if is_whole else x.chunk(2, 1 if is_column else 0)[rank].clone()
        shards.append({**shard, "rope.freqs": torch.zeros(8)})
    return shards


def write_meta(folder, theirs, by_columns, **params):
    """A folder of Meta's format of a model of transformers; returns the whole state dict."""
    options = llama.llama_config_to_gpt2_config(theirs.config)
    ours = llama.remap_state_dict_hf_llama(theirs.state_dict(), options)
    whole = llama.inv_remap_state_dict_meta_llama(ours, options)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    for rank, shard in enumerate(meta_shards(whole, by_columns)):
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    return whole


def meta_model(**options):
    case = CASES["llama"]
    sizes = {"intermediate_size": 176, "rms_norm_eps": 1e-5, **options}
    parameters = sizes.pop("rope_parameters", {"rope_type": "default"})
    parameters = {**parameters, "rope_theta": 500000.0}
    return hf_model(case._replace(options={**case.options, **sizes, "rope_parameters": parameters}))


@pytest.mark.parametrize("by_columns", [True, False])
def test_meta_checkpoint_of_two_shards(tmp_path, by_columns):
    theirs = meta_model()
    write_meta(tmp_path / "7B", theirs, by_columns)
    read = llama.config_from_checkpoint(tmp_path, "7B")
    assert (read.vocab_size, read.intermediate_size, read.num_key_value_heads) == (VOCAB, 176, 2)
    options = llama.llama_config_to_gpt2_config(read)
    options.pad_vocab_size_multiple = 64
    shards = llama.state_dicts_from_checkpoint(tmp_path, "7B")
    assert len(shards) == 2
    parts = [llama.remap_state_dict_meta_llama(shard, options) for shard in shards]
    whole = combine_state_dicts_tp(parts, options)
    model = GPTLMHeadModel(options).eval()
    model.load_state_dict(whole)
    with torch.inference_mode():
        logits = model(tokens()).logits[..., :VOCAB]
        torch.testing.assert_close(logits, theirs(tokens()).logits, atol=1e-4, rtol=1e-4)
    back = llama.inv_remap_state_dict_meta_llama(whole, options)
    for rank, shard in enumerate(meta_shards(back, by_columns)):
        assert_equal(shard, shards[rank])


def test_meta_scaled_rope(tmp_path):
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    theirs = meta_model(rope_parameters=scaled)
    write_meta(tmp_path / "8B", theirs, False, use_scaled_rope=True, vocab_size=VOCAB)
    read = llama.config_from_meta_checkpoint(tmp_path, "8B")
    assert read.rope_parameters == theirs.config.rope_parameters
    options = llama.llama_config_to_gpt2_config(read)
    assert options.rotary_emb_scaling == scaled


def test_meta_hidden_features(tmp_path):
    """Llama 3 8B's numbers."""
    (tmp_path / "8B").mkdir()
    params = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5,
              "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "vocab_size": 128256}  # fmt: skip
    (tmp_path / "8B" / "params.json").write_text(json.dumps(params))
    assert llama.config_from_meta_checkpoint(tmp_path, "8B").intermediate_size == 14336


def test_meta_checkpoints_that_are_wrong(tmp_path):
    theirs = meta_model()
    write_meta(tmp_path / "7B", theirs, True)
    options = llama.llama_config_to_gpt2_config(theirs.config)
    with pytest.raises(FileNotFoundError, match=r"13B has no consolidated"):
        llama.state_dicts_from_checkpoint(tmp_path, "13B")
    with pytest.raises(ValueError, match="checkpoint_format must be 'meta' or 'hf', got 'gguf'"):
        llama.config_from_checkpoint(tmp_path, "7B", "gguf")
    first = llama.state_dicts_from_checkpoint(tmp_path, "7B")[0]
    first.pop("layers.1.attention.wk.weight")
    with pytest.raises(RuntimeError, match=r"layers\.1\.attention\.wk\.weight is missing"):
        llama.remap_state_dict_meta_llama(first, options)
    file = tmp_path / "7B" / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"consolidated\.01\.pth cannot be read"):
        llama.state_dicts_from_checkpoint(tmp_path, "7B")
    (tmp_path / "7B" / "params.json").write_text("{}")
    with pytest.raises(ValueError, match=r"params\.json has no dim"):
        llama.config_from_meta_checkpoint(tmp_path, "7B")


def test_config_from_hf_checkpoint(tmp_path):
    theirs = meta_model()
    theirs.config.save_pretrained(tmp_path / "7B-hf")
    for function in (
        llama.config_from_hf_checkpoint,
        lambda path, name: llama.config_from_checkpoint(path, name, "hf"),
    ):
        assert function(tmp_path, "7B").to_dict()["hidden_size"] == 64
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        llama.config_from_hf_checkpoint(tmp_path, "13B")


# ------------------------------------------------------------------- models without transformers


@pytest.mark.parametrize(("hidden", "heads", "vocab"), [(48, 4, 96), (60, 6, 96), (48, 4, 128)])
def test_baichuan(hidden, heads, vocab):
    """7B, 13B, whose heads are no power of two, and 7B of the second version."""
    theirs = SimpleNamespace(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=90, hidden_act="silu", rms_norm_eps=1e-6, initializer_range=0.02,
        use_rotary=hidden == 48, norm_head=vocab == 128, tie_word_embeddings=False,
    )  # fmt: skip
    options = baichuan_config_to_gpt2_config(theirs)
    model = GPTLMHeadModel(options).eval()
    sd = random_like(inv_remap_state_dict_hf_baichuan(model.state_dict(), options))
    model.load_state_dict(remap_state_dict_hf_baichuan(sd, options))
    expected = plain_gpt.baichuan(sd, tokens(), theirs, hidden == 48, vocab == 128)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    assert_equal(inv_remap_state_dict_hf_baichuan(model.state_dict(), options), sd)


def test_baichuan_by_its_sizes():
    sizes = {"num_hidden_layers": 1, "intermediate_size": 8, "hidden_act": "silu",
             "rms_norm_eps": 1e-6, "initializer_range": 0.02}  # fmt: skip
    first = SimpleNamespace(hidden_size=4096, num_attention_heads=32, vocab_size=64000, **sizes)
    options = baichuan_config_to_gpt2_config(first)
    assert (options.rotary_emb_fraction, options.use_alibi, options.norm_head) == (
        1.0,
        False,
        False,
    )
    second = SimpleNamespace(hidden_size=5120, num_attention_heads=40, vocab_size=125696, **sizes)
    options = baichuan_config_to_gpt2_config(second)
    assert (options.rotary_emb_fraction, options.use_alibi, options.norm_head) == (0.0, True, True)


def test_btlm():
    theirs = SimpleNamespace(
        vocab_size=96, n_positions=64, n_embd=48, n_layer=2, n_head=6, n_inner=80,
        activation_function="swiglu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        layer_norm_epsilon=1e-5, initializer_range=0.07, scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False, position_embedding_type="alibi",
        mup_width_scale=0.5, mup_embeddings_scale=3.0, mup_output_alpha=0.7,
        mup_scale_qk_dot_by_d=True,
    )  # fmt: skip
    options = btlm_config_to_gpt2_config(theirs)
    model = GPTLMHeadModel(options).eval()
    sd = random_like(inv_remap_state_dict_hf_btlm(model.state_dict(), options))
    sd["lm_head.weight"] = sd["transformer.wte.weight"]
    buffers = {"transformer.relative_pe.slopes": torch.zeros(6, 1, 1)}
    model.load_state_dict(remap_state_dict_hf_btlm({**sd, **buffers}, options))
    with torch.inference_mode():
        expected = plain_gpt.btlm(sd, tokens(), theirs)
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    assert_equal(inv_remap_state_dict_hf_btlm(model.state_dict(), options), sd)


def test_megatron():
    """Rows of each head's query, key and value lie together."""
    options = config(vocab_size=96)
    model = GPTLMHeadModel(options)
    ours = model.state_dict()
    theirs = gpt.inv_remap_state_dict_megatron(ours, options)
    name = "language_model.encoder.layers.1.self_attention.query_key_value.weight"
    by_head = theirs[name].unflatten(0, (4, 3, 8))
    whole = ours["transformer.layers.1.mixer.Wqkv.weight"].unflatten(0, (3, 4, 8))
    assert torch.equal(by_head.transpose(0, 1), whole)
    assert "language_model.embedding.word_embeddings.weight" in theirs
    without_head = {n: x for n, x in theirs.items() if "output_layer" not in n}
    rope = {"language_model.encoder.rotary_pos_emb.inv_freq": torch.zeros(2)}
    assert_equal(gpt.remap_state_dict_megatron({**without_head, **rope}, options), ours)
    old = {n.replace("encoder.", "transformer."): x for n, x in theirs.items()}
    assert_equal(gpt.remap_state_dict_megatron(old, options), ours)


# ------------------------------------------------------------------------------ from folders


@pytest.mark.parametrize("name", ["gpt2", "llama, tied, biases, head dim", "gpt_neox", "opt, 350m"])
def test_from_pretrained(tmp_path, name):
    theirs = hf_model(CASES[name])
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    options = converted(CASES[name], theirs).config
    model = GPTLMHeadModel.from_pretrained(tmp_path, options).eval()
    with torch.inference_mode():
        torch.testing.assert_close(
            model(tokens()).logits, theirs(tokens()).logits, atol=1e-4, rtol=1e-4
        )
    assert torch.equal(GPTLMHeadModel(options).transformer.layers[0].norm1.weight, torch.ones(64))
    part = GPTLMHeadModel.from_pretrained(tmp_path, options, dtype=torch.bfloat16)
    assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    body = GPTModel.from_pretrained(tmp_path, options)
    assert_equal(body.state_dict(), model.transformer.state_dict())


def test_from_pretrained_of_our_names(tmp_path):
    options = transformers.GPT2Config(**vars(config(bos_token_id=1, eos_token_id=2)))
    model = GPTLMHeadModel(options)
    options.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_equal(GPTLMHeadModel.from_pretrained(tmp_path, options).state_dict(), model.state_dict())


def test_from_pretrained_of_what_does_not_fit(tmp_path):
    theirs = hf_model(CASES["llama"])
    theirs.save_pretrained(tmp_path)
    options = llama.llama_config_to_gpt2_config(theirs.config)
    options.n_layer = 3
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.input_layernorm\.weight is missing"):
        GPTLMHeadModel.from_pretrained(tmp_path, options)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"model_type among .*, got 'mamba'"):
        GPTLMHeadModel.from_pretrained(tmp_path, options)


def test_llama_of_another_width_is_named():
    options = llama.llama_config_to_gpt2_config(meta_model().config)
    options.n_embd = 32
    options.head_dim = None
    state_dict = llama.remap_state_dict_hf_llama(meta_model().state_dict(), options)
    name = r"transformer\.layers\.0\.mixer\.Wqkv\.weight"
    with pytest.raises(RuntimeError, match=rf"{name} has shape \(128, 64\), the model's has"):
        GPTLMHeadModel(options).load_state_dict(state_dict)
