"""BERT against transformers: logits, losses, gradients; weights there and back bit by bit."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from flash_attn.models.bert import (
    BertEncoder,
    BertForPreTraining,
    BertModel,
    inv_remap_state_dict,
    remap_state_dict,
)

transformers = pytest.importorskip("transformers")

VOCAB, LENGTHS = 90, (12, 5, 9)
ATTENTION = pytest.mark.parametrize("use_flash_attn", [True, False], ids=["kernels", "torch"])
VARIANTS = {
    "plain": {},
    "dense": {"dense_seq_output": True},
    "subset": {"dense_seq_output": True, "last_layer_subset": True},
    "fused": {
        "dense_seq_output": True,
        "last_layer_subset": True,
        "fused_dropout_add_ln": True,
        "use_xentropy": True,
        "fused_bias_fc": True,
        "pad_vocab_size_multiple": 64,
    },
}


def make_config(**options):
    made = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **options,
    }
    return transformers.BertConfig(**made)


def hf_model(config, kind="BertForPreTraining"):
    torch.manual_seed(0)
    model = getattr(transformers, kind)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # gains of 1 and biases of 0 hide where they go
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def converted(theirs, config=None, **options):
    config = copy.deepcopy(theirs.config if config is None else config)
    for name, value in options.items():
        setattr(config, name, value)
    kind = BertForPreTraining if "cls.seq_relationship.weight" in theirs.state_dict() else BertModel
    model = kind(config).eval()
    model.load_state_dict(remap_state_dict(theirs.state_dict(), config))
    return model


def make_batch(is_padded=True):
    """Token ids, types, mask and both labels; about a quarter of the tokens is masked."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    ids = torch.randint(1, VOCAB, shape, generator=generator)
    types = torch.randint(2, shape, generator=generator)
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    mask = mask if is_padded else torch.ones_like(mask)
    is_masked = (torch.rand(shape, generator=generator) < 0.25) & mask
    is_masked[0, 0], is_masked[1, 1] = True, True  # a first token among them, and none of row 2
    is_masked[2] = False
    labels = torch.where(is_masked, torch.randint(1, VOCAB, shape, generator=generator), 0)
    next_sentence = torch.tensor([0, 1, -1])
    return (
        {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.long()},
        labels,
        (next_sentence),
    )


def reference_losses(theirs, inputs, labels, next_sentence):
    """Transformers' logits with the losses written out."""
    out = theirs(**inputs)
    is_masked = labels > 0
    mlm = torch.nn.functional.cross_entropy(out.prediction_logits[is_masked], labels[is_masked])
    counts = next_sentence >= 0
    nsp = torch.nn.functional.cross_entropy(
        out.seq_relationship_logits[counts], next_sentence[counts]
    )
    return out, mlm, nsp


@ATTENTION
@pytest.mark.parametrize("is_padded", [True, False])
def test_hidden_states(use_flash_attn, is_padded):
    theirs = hf_model(make_config(), "BertModel")
    ours = converted(theirs, use_flash_attn=use_flash_attn)
    inputs, _, _ = make_batch(is_padded)
    a, b = ours(**inputs), theirs(**inputs)
    is_token = inputs["attention_mask"].bool()
    # fp32's sums in another order.
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(
        a.last_hidden_state[is_token], b.last_hidden_state[is_token], **close
    )
    torch.testing.assert_close(a.pooler_output, b.pooler_output, **close)
    if use_flash_attn:
        assert not a.last_hidden_state[~is_token].any()
    if not is_padded:
        del inputs["attention_mask"]
        torch.testing.assert_close(ours(**inputs).last_hidden_state, a.last_hidden_state)


@ATTENTION
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_logits_in_bf16(use_flash_attn, act):
    """Within twice the error of transformers' own bf16 against its fp32."""
    theirs = hf_model(make_config(hidden_act=act))
    inputs, _, _ = make_batch()
    with torch.no_grad():
        expected = theirs(**inputs)
        ours = converted(theirs, use_flash_attn=use_flash_attn)
        actual = ours(**inputs)
        ours_bf16, theirs_bf16 = ours.bfloat16()(**inputs), theirs.bfloat16()(**inputs)
    is_token = inputs["attention_mask"].bool()
    for name, chosen in (("prediction_logits", is_token), ("seq_relationship_logits", slice(None))):
        exact = getattr(expected, name)[chosen]
        torch.testing.assert_close(getattr(actual, name)[chosen], exact, rtol=1e-4, atol=1e-4)
        error = (getattr(ours_bf16, name)[chosen].float() - exact).abs().max()
        assert error <= 2 * (getattr(theirs_bf16, name)[chosen].float() - exact).abs().max()


@ATTENTION
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients(name, use_flash_attn):
    theirs = hf_model(make_config())
    ours = converted(theirs, use_flash_attn=use_flash_attn, **VARIANTS[name])
    inputs, labels, next_sentence = make_batch()
    expected, mlm, nsp = reference_losses(theirs, inputs, labels, next_sentence)
    out = ours(**inputs, labels=labels, next_sentence_label=next_sentence)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out.loss, mlm + nsp, **close)
    is_masked, is_token = labels > 0, inputs["attention_mask"].bool()
    if name == "plain":
        logits, exact = out.prediction_logits[is_token], expected.prediction_logits[is_token]
    else:
        logits, exact = out.prediction_logits, expected.prediction_logits[is_masked]
    torch.testing.assert_close(logits[..., :VOCAB], exact, **close)
    assert bool((logits[..., VOCAB:] <= -100).all())
    torch.testing.assert_close(
        out.seq_relationship_logits, expected.seq_relationship_logits, **close
    )
    out.loss.backward()
    (mlm + nsp).backward()
    theirs_grad = {n: p.grad for n, p in theirs.named_parameters()}
    theirs_grad["cls.predictions.decoder.bias"] = theirs_grad["cls.predictions.bias"]
    theirs_grad["cls.predictions.decoder.weight"] = theirs_grad[
        "bert.embeddings.word_embeddings.weight"
    ]
    ours_grad = {n: p.grad for n, p in ours.named_parameters(remove_duplicate=False)}
    for key, grad in inv_remap_state_dict(ours_grad, ours.config).items():
        torch.testing.assert_close(grad, theirs_grad[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_loss_alone(name):
    theirs = hf_model(make_config())
    ours = converted(theirs, use_flash_attn=True, **VARIANTS[name])
    inputs, labels, next_sentence = make_batch()
    _, mlm, nsp = reference_losses(theirs, inputs, labels, next_sentence)
    assert ours(**inputs).loss is None
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours(**inputs, labels=labels).loss, mlm, **close)
    loss = ours(**inputs, next_sentence_label=next_sentence).loss
    torch.testing.assert_close(loss, nsp, **close)


@ATTENTION
@pytest.mark.parametrize("name", VARIANTS)
def test_labels_of_padding_do_not_count(name, use_flash_attn):
    ours = converted(hf_model(make_config()), use_flash_attn=use_flash_attn, **VARIANTS[name])
    inputs, labels, _ = make_batch()
    more = labels.clone()
    more[1, LENGTHS[1] :] = 7
    loss = ours(**inputs, labels=labels).loss
    torch.testing.assert_close(ours(**inputs, labels=more).loss, loss)
    of_collators = labels.masked_fill(labels == 0, -100)
    torch.testing.assert_close(ours(**inputs, labels=of_collators).loss, loss)


def test_padding_does_not_matter_and_costs_nothing():
    """What is behind the mask changes nothing, bit by bit, and is not computed."""
    ours = converted(hf_model(make_config()), use_flash_attn=True)
    inputs, _, _ = make_batch()
    seen = []
    ours.bert.encoder.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    a = ours(**inputs).prediction_logits
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"] > 0, VOCAB - 1)
    b = ours(**inputs).prediction_logits
    is_token = inputs["attention_mask"].bool()
    assert torch.equal(a[is_token], b[is_token])
    assert seen[0].shape == (sum(LENGTHS), 32)


def test_last_layer_computes_the_subset_alone():
    ours = converted(hf_model(make_config()), use_flash_attn=True, **VARIANTS["subset"])
    inputs, labels, _ = make_batch()
    seen = []
    ours.bert.encoder.layers[-1].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ours(**inputs, labels=labels)
    subset = labels > 0
    subset[:, 0] = True
    assert seen[0].shape == (int(subset.sum()), 32)


def test_dropout_in_training():
    config = make_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    ours = converted(hf_model(config), use_flash_attn=True).train()
    inputs, labels, _ = make_batch()
    torch.manual_seed(0)
    a, b = (ours(**inputs, labels=labels).loss for _ in range(2))
    assert not torch.equal(a, b)
    torch.manual_seed(0)
    assert torch.equal(ours(**inputs, labels=labels).loss, a)


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertModel"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pad_vocab_size_multiple": 64},
        {"dense_seq_output": True, "last_layer_subset": True},
    ],
    ids=str,
)
def test_there_and_back(kind, options):
    theirs = hf_model(make_config(), kind)
    config = copy.deepcopy(theirs.config)
    for name, value in options.items():
        setattr(config, name, value)
    state_dict = theirs.state_dict()
    before = {name: x.clone() for name, x in state_dict.items()}
    ours = remap_state_dict(state_dict, config)
    model = BertForPreTraining(config) if kind == "BertForPreTraining" else BertModel(config)
    assert {n: x.shape for n, x in ours.items()} == {
        n: x.shape for n, x in model.state_dict().items()
    }
    back = inv_remap_state_dict(ours, config)
    assert back.keys() == before.keys()
    for name, x in before.items():
        assert torch.equal(back[name], x) and torch.equal(state_dict[name], x), name
    theirs.load_state_dict(back)


def test_names_of_old_checkpoints():
    theirs = hf_model(make_config())
    state_dict = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in theirs.state_dict().items()
        if name not in ("cls.predictions.decoder.bias", "cls.predictions.decoder.weight")
    }
    state_dict["bert.embeddings.position_ids"] = torch.arange(16)[None]
    expected = remap_state_dict(theirs.state_dict(), theirs.config)
    actual = remap_state_dict(state_dict, theirs.config)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertModel", "BertForMaskedLM"])
def test_from_pretrained(tmp_path, kind, is_safe):
    theirs = hf_model(make_config(), kind)
    if is_safe:
        theirs.save_pretrained(tmp_path)
    else:
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    inputs, _, _ = make_batch()
    config = copy.deepcopy(theirs.config)
    config.use_flash_attn = True
    has_pooler = kind != "BertForMaskedLM"
    ours = BertModel.from_pretrained(tmp_path, config, add_pooling_layer=has_pooler).eval()
    base = getattr(theirs, "bert", theirs)
    a, b = ours(**inputs), base(**inputs)
    is_token = inputs["attention_mask"].bool()
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(
        a.last_hidden_state[is_token], b.last_hidden_state[is_token], **close
    )
    if kind == "BertForPreTraining":
        whole = BertForPreTraining.from_pretrained(tmp_path, config, dtype=torch.bfloat16)
        assert whole.cls.predictions.decoder.weight.dtype == torch.bfloat16
        assert whole.cls.predictions.decoder.weight is whole.bert.embeddings.word_embeddings.weight
    elif kind == "BertModel":
        with pytest.raises(RuntimeError, match=r"cls\.predictions\.\S+ is missing"):
            BertForPreTraining.from_pretrained(tmp_path, config)
        model = BertForPreTraining.from_pretrained(tmp_path, config, strict=False)
        assert torch.equal(model.bert.emb_ln.weight, base.embeddings.LayerNorm.weight)


def test_own_names_load_too(tmp_path):
    theirs = hf_model(make_config())
    ours = converted(theirs)
    torch.save(ours.state_dict(), tmp_path / "pytorch_model.bin")
    again = BertForPreTraining.from_pretrained(tmp_path, ours.config)
    assert all(torch.equal(again.state_dict()[n], x) for n, x in ours.state_dict().items())


def test_state_dicts_that_do_not_fit():
    theirs = hf_model(make_config())
    state_dict = theirs.state_dict()
    key = "bert.encoder.layer.1.attention.self.key.bias"
    del state_dict[key]
    with pytest.raises(RuntimeError, match=f"{key} is missing"):
        remap_state_dict(state_dict, theirs.config)
    state_dict = {**theirs.state_dict(), "bert.encoder.layer.7.x": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"bert\.encoder\.layer\.7\.x is unknown"):
        remap_state_dict(state_dict, theirs.config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_act": "relu"}, r"config\.hidden_act must be one of gelu, .* got 'relu'"),
        ({"last_layer_subset": True}, r"config\.last_layer_subset needs config\.dense_seq_output"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"is_decoder": True}, r"config\.is_decoder must be False"),
        ({"fused_mlp": True}, r"config\.fused_mlp needs config\.hidden_act to be gelu_new"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(options, message):
    config = make_config()
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        BertForPreTraining(config)


def test_fused_mlp():
    theirs = hf_model(make_config(hidden_act="gelu_new"))
    ours = converted(theirs, use_flash_attn=True, fused_mlp=True, mlp_checkpoint_lvl=[0, 1, 2])
    inputs, labels, next_sentence = make_batch()
    _, mlm, nsp = reference_losses(theirs, inputs, labels, next_sentence)
    out = ours(**inputs, labels=labels, next_sentence_label=next_sentence)
    torch.testing.assert_close(out.loss, mlm + nsp, rtol=1e-4, atol=1e-4)
    out.loss.backward()


def test_bad_masks():
    ours = converted(hf_model(make_config(), "BertModel"), use_flash_attn=True)
    inputs, labels, _ = make_batch()
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 12\) as input_ids"):
        ours(ids, attention_mask=torch.ones(3, 11))
    with pytest.raises(ValueError, match="must have a token first in every sequence"):
        ours(ids, attention_mask=inputs["attention_mask"].flip(1), masked_tokens_mask=labels > 0)


def test_encoder_alone():
    """Without a mask, with a subset, in both kinds of attention: the same rows."""
    config, x = make_config(), torch.randn(2, 6, 32)
    subset = torch.zeros(2, 6, dtype=torch.bool)
    subset[0, 3:5] = subset[1, 1] = True
    torch.manual_seed(3)
    config.use_flash_attn, config.last_layer_subset, config.dense_seq_output = True, True, True
    flash = BertEncoder(config)
    config.use_flash_attn = False
    plain = BertEncoder(config)
    plain.load_state_dict(flash.state_dict())
    whole = plain(x)
    for encoder in (flash, plain):
        torch.testing.assert_close(encoder(x), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            encoder(x, subset_mask=subset), whole[subset], rtol=1e-4, atol=1e-5
        )


def test_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['huggingface_hub'] = None\n"
        "import flash_attn.models.bert, flash_attn.models.vit\n"
        "assert not {'timm', 'torchvision', 'safetensors'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
