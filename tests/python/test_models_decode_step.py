"""A step of decoding without modules: what the modules compute, or left to them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from flash_attn.models import _decode_step
from flash_attn.models import gpt as gpt_module
from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.utils.generation import InferenceParams
from flash_attn.utils.paged_cache import PagedKVCache

ROTARY = {"n_positions": 0, "rotary_emb_fraction": 1.0}
CONFIGS = {
    "gpt2": {},
    "gpt2-fused": {"fused_dropout_add_ln": True, "activation_function": "gelu"},
    "fused-mlp": {"fused_mlp": True, "fused_dropout_add_ln": True},
    "fused-relu": {**ROTARY, "fused_mlp": True, "activation_function": "relu"},
    "fused-sqrelu": {**ROTARY, "fused_mlp": True, "activation_function": "sqrelu"},
    "llama": {**ROTARY, "rms_norm": True, "activation_function": "swiglu", "n_head_kv": 2},
    "interleaved": {**ROTARY, "rotary_emb_interleaved": True, "mlp_fc1_bias": False},
    "part": {**ROTARY, "rotary_emb_fraction": 0.5, "qkv_proj_bias": False, "n_head_kv": 1},
    "alibi": {"n_positions": 0, "use_alibi": True, "out_proj_bias": False},
    "window": {**ROTARY, "sliding_window": 4, "attn_softcap": 5.0, "attn_sinks": True},
    "gemma": {
        **ROTARY,
        "rms_norm": True,
        "rms_norm_zero_centered": True,
        "head_dim": 16,
        "activation_function": "geglu_approx",
        "embedding_scale": 6.0,
        "qk_norm": True,
        "final_logit_softcap": 4.0,
        "query_pre_attn_scalar": 9.0,
        "tie_word_embeddings": False,
    },
}
# By modules: layers that a step does not have.
OTHERS = {
    "postnorm": {"prenorm": False},
    "parallel": {"parallel_block": True},
    "sandwich": {"sandwich_norm": True},
    "fp32 residual": {"residual_in_fp32": True},
    "xpos": {**ROTARY, "rotary_emb_scale_base": 64.0},
    "torch attention": {"use_flash_attn": False},
}


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    torch.set_num_threads(1)


def make_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    stock = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    drops = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    config = GPT2Config(**stock, **drops, bos_token_id=0, eos_token_id=0)
    for name, value in options.items():
        setattr(config, name, value)
    model = GPTLMHeadModel(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "bias" in name or "sinks" in name:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, 0.0 if "gemma" in str(options) else 1.0, 0.2)
    return model


@pytest.fixture
def steps(monkeypatch):
    """Whether each call with a cache went without modules; ``use`` says whether it may."""

    class Steps(list):
        use = True

        def __call__(self, *args):
            done = _decode_step.decode_step(*args) if self.use else None
            self.append(done is not None)
            return done

    steps = Steps()
    monkeypatch.setattr(gpt_module, "decode_step", steps)
    return steps


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(67, (n,), generator=generator) for n in lengths]


def scores_of(model, rows, **options):
    options = {"max_new_tokens": 9, "output_scores": True, **options}
    return model.generate(rows, None, return_dict_in_generate=True, **options)


def taught(rows):
    """Tokens to follow, so that what is compared does not part ways."""
    return torch.randint(67, (len(rows), 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_modules(name, dtype, steps):
    """Prompts of one length, of several, and in blocks."""
    model = make_model(dtype, **CONFIGS[name])
    even, ragged = torch.stack(prompts(5, 5, 5)), prompts(3, 7, 1)
    for rows, paged in ((even, False), (ragged, False), (ragged, True)):
        found = []
        for steps.use in (True, False):
            cache = {"cache": PagedKVCache.for_model(model, 32, 4)} if paged else {}
            out = scores_of(model, rows, teacher_outputs=taught(rows), **cache)
            found.append(torch.stack(out.scores).float())
        assert steps == [False, *[True] * 8, *[False] * 9], name
        steps.clear()
        unit = torch.finfo(dtype).eps * found[1].abs().max().item()
        # Norms and linear layers round otherwise in the last place, and what follows makes more of
        # it: weights of 0.3 sqrt(32) = 1.7 gain, eight linear layers.
        assert (found[0] - found[1]).abs().max().item() <= 64 * unit


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_left_to_modules(name, steps):
    model = make_model(**OTHERS[name])
    scores_of(model, torch.stack(prompts(4, 4)), max_new_tokens=3)
    assert steps == [False] * 3 if name != "postnorm" else not any(steps)


def params_after_prompt(model, batch=2, max_seqlen=16, length=5):
    params = InferenceParams(max_seqlen, batch)
    with torch.inference_mode():
        model(torch.stack(prompts(*[length] * batch)), inference_params=params)
    params.seqlen_offset = length
    return params


def step_logits(model, params):
    with torch.inference_mode():
        return model(torch.tensor([[3], [5]]), inference_params=copy.copy(params)).logits.clone()


def test_changes_of_the_model_are_seen(steps):
    """Weights that are replaced, layers, modes, hooks, attributes."""
    model = make_model(**CONFIGS["llama"])
    params = params_after_prompt(model)
    before = step_logits(model, params)
    assert steps[-1]
    mixer, mlp = model.transformer.layers[0].mixer, model.transformer.layers[1].mlp

    def by_modules_too():
        steps.use = False
        expected = step_logits(model, params)
        steps.use = True
        logits = step_logits(model, params)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert (logits - before).abs().max() > 1e-3
        return steps[-1]

    mlp.fc2.weight.data.mul_(1.5)  # in place
    assert by_modules_too()
    mlp.fc2.weight = nn.Parameter(mlp.fc2.weight * 1.5, requires_grad=False)
    assert by_modules_too()
    mixer.inner_cross_attn.softmax_scale = 0.01
    assert by_modules_too()
    seen = []
    handle = mixer.Wqkv.register_forward_hook(lambda *call: seen.append(1))
    assert not by_modules_too() and len(seen) == 2
    handle.remove()
    assert by_modules_too()
    mixer.out_proj = nn.Sequential(mixer.out_proj, nn.Tanh())  # as adapters do
    assert not by_modules_too()


@pytest.mark.parametrize("what", ["training", "part training", "gradients", "autocast", "profiler"])
def test_calls_that_are_left_to_modules(what, steps):
    model = make_model(**CONFIGS["llama"])
    params = params_after_prompt(model)
    ids = torch.tensor([[3], [5]])
    if what == "training":
        model.train()
    if what == "part training":
        model.transformer.layers[0].dropout1.train()
    with torch.set_grad_enabled(what == "gradients"):
        if what == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                model(ids, inference_params=InferenceParams(16, 2))
        elif what == "profiler":
            with torch.profiler.profile():
                model(ids, inference_params=params)
        else:
            model(ids, inference_params=params)
    assert steps[-1] is False
    model.eval()
    step_logits(model, params)
    assert steps[-1]


def test_cast_models(steps):
    """After ``to`` the step goes on in the new dtype."""
    model = make_model(**CONFIGS["llama"])
    step_logits(model, params_after_prompt(model))
    model.to(torch.bfloat16)
    assert step_logits(model, params_after_prompt(model)).dtype == torch.bfloat16
    assert steps == [False, True, False, True]


def test_cache_without_room(steps):
    model = make_model(**CONFIGS["llama"])
    params = params_after_prompt(model, max_seqlen=5)
    with pytest.raises(ValueError, match="do not fit into a cache of max_seqlen 5"):
        step_logits(model, params)
    params = params_after_prompt(model)
    params.key_value_memory_dict[1] = params.key_value_memory_dict[1].double()
    with pytest.raises(ValueError, match=r"key_value_memory_dict\[1\] is .*float64"):
        step_logits(model, params)


def test_models_are_let_go():
    model = make_model(**CONFIGS["llama"])
    step_logits(model, params_after_prompt(model))
    assert model.transformer in _decode_step._STEPS
    gone = weakref.ref(model.transformer)
    del model
    gc.collect()
    assert gone() is None
