"""Settings: every experiment composes, a wrong value is named before anything starts; schedules."""

from __future__ import annotations

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from training_cases import command, overrides, run_here

from training.optim import MovingAverage, make_optimizer, parameter_groups
from training.run import CONFIGS, check_command_line, compose_settings, make_callbacks
from training.schedules import factor, make_scheduler
from training.settings import OptimizerSettings, SchedulerSettings, SettingError, settings_from

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes(name, tmp_path):
    more = []
    if name.startswith("finetune"):
        for file in ("config.json", "tokenizer.json"):
            (tmp_path / file).touch()
        more = [f"model.pretrained={tmp_path}", f"data.train=[{tmp_path}/*.txt]"]
    settings = compose_settings([f"experiment={name}", *more])
    assert settings.name == name
    assert settings.out == f"build/training/{name}"
    assert len(make_callbacks(settings.callbacks)) == 4
    assert settings.trainer.global_batch % settings.trainer.micro_batch == 0


# Parameters of GPT-2 with tied embeddings, its 50257 tokens, by Radford et al. (2019) as
# corrected: 124 M, 355 M, 774 M, 1558 M; of GPT-3 by Brown et al. (2020), table 2.1.
SIZES = {"gpt2-124m": 124e6, "gpt2-1.5b": 1558e6, "gpt3-125m": 125e6}
MORE = {"gpt2-355m": 355e6, "gpt2-774m": 774e6, "gpt3-350m": 356e6, "gpt3-760m": 760e6,
        "gpt3-1.3b": 1.3e9, "gpt3-2.7b": 2.7e9}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [*SIZES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)],
)
def test_models_have_their_names_sizes(name):
    from training.model import make_model

    tokenizer = type("Tokenizer", (), {"vocab_size": 50257, "end_of_text": 50256})()
    settings = compose_settings([f"model={name}", "data.train=[x]", "data.seqlen=1024"])
    with torch.device("meta"):
        model = make_model(settings.model, tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx({**SIZES, **MORE}[name], rel=0.02)


WRONG = {
    "trainer.max_steps=0": "trainer.max_steps must be at least 1, got 0",
    "trainer.precision=fp8": "trainer.precision must be one of fp32, bf16, fp16, got 'fp8'",
    "trainer.ema_decay=1.0": "trainer.ema_decay must be at least 0 and below 1, got 1.0",
    "trainer.resume=/none": "trainer.resume must be auto, never, or a checkpoint's folder, got",
    "trainer.clip_grad_norm=0": "trainer.clip_grad_norm must be above 0, got 0.0",
    "model.n_head=3": r"model.n_embd must be a multiple of model.n_head \(3\), got 32",
    "model.n_head_kv=3": r"model.n_head_kv must be a divisor of model.n_head \(2\), got 3",
    "model.pretrained=/none": "model.pretrained must be a folder with config.json, got '/none'",
    "model.resid_pdrop=-0.1": "model.resid_pdrop must be at least 0 and below 1, got -0.1",
    "model.lora.rank=-1": "model.lora.rank must be at least 0, got -1",
    "data.seqlen=17": r"data.seqlen must be at most model.n_positions \(16\), got 17",
    "data.train=[]": r"data.train must be patterns of text files, got \[\]",
    "data.tokenizer=words": "data.tokenizer must be one of bytes, bpe, folder, got 'words'",
    "data.tokenizer=folder": "data.tokenizer_folder must be a folder, got None",
    "optimizer.lr=0": "optimizer.lr must be above 0, got 0.0",
    "optimizer.betas=[0.9]": r"optimizer.betas must be two numbers, .* got \[0.9\]",
    "optimizer.lr=.inf": "optimizer.lr must be finite, got inf",
    "optimizer.weight_decay=.inf": "optimizer.weight_decay must be finite, got inf",
    "model.initializer_range=.inf": "model.initializer_range must be finite, got inf",
    "seed=-1": r"seed must be at least 0 and below 2\*\*64, got -1",
    f"seed={1 << 64}": r"seed must be at least 0 and below 2\*\*64, got 18446744073709551616",
    "scheduler.name=step": "scheduler.name must be one of .*, got 'step'",
    "scheduler.warmup_steps=7": r"scheduler.warmup_steps must be at most trainer.max_steps \(6\)",
}


def test_wrong_values_are_named(tmp_path):
    config = OmegaConf.structured(compose_settings(overrides(tmp_path)))
    for override, sentence in WRONG.items():
        with pytest.raises(SettingError, match=sentence):
            settings_from(OmegaConf.merge(config, OmegaConf.from_dotlist([override])))


def test_wsd_reaches_its_final_factor_or_is_refused(tmp_path):
    for warmup, decay in ((0, 6), (2, 4), (5, 1), (5, None)):
        changes = {"scheduler__warmup_steps": warmup, "scheduler__decay_steps": decay}
        made = compose_settings(overrides(tmp_path, scheduler__name="wsd", **changes))
        assert factor(6, made.scheduler, 6) == made.scheduler.final_factor
    sentence = (
        r"scheduler.decay_steps must be at most the 4 steps of trainer.max_steps \(6\) that "
        r"scheduler.warmup_steps \(2\) leaves to wsd, got 5"
    )
    with pytest.raises(SettingError, match=sentence):
        compose_settings(overrides(tmp_path, scheduler__name="wsd", scheduler__decay_steps=5))
    # Others may fall for longer than a run is.
    compose_settings(overrides(tmp_path, scheduler__name="cosine", scheduler__decay_steps=50))


MODELS_THAT_ARE_NONE = [
    (
        {"model__n_embd": 14, "model__rotary_emb_fraction": 1.0},
        r"model.rotary_emb_fraction \(1.0\) must turn an even part of head_dim 7",
    ),
    ({"model__activation_function": "foo"}, r"model.activation_function must be one of .*'foo'"),
]


@pytest.mark.parametrize(("changes", "sentence"), MODELS_THAT_ARE_NONE)
def test_models_that_cannot_be_made_are_named(changes, sentence, tmp_path):
    with pytest.raises(SettingError, match=sentence):
        run_here(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


SAMPLES = {
    "prompt: ''": "prompt must have text, got ''",
    "tokens: 0": "tokens must be an integer of at least 1, got 0",
    "top_k: -1": "top_k must be an integer of at least 0, got -1",
    "temperature: -1": "temperature must be finite and at least 0, got -1",
    "prompt: aaaabbbbccccdddd": r"fewer than model.n_positions \(16\), got 16: 'aaaabbbbcc",
}


@pytest.mark.parametrize("options", SAMPLES)
def test_samples_that_cannot_be_made_are_named(options, tmp_path):
    callback = {"+callbacks__mine": f"{{_target_: training.callbacks.Samples, {options}}}"}
    with pytest.raises(SettingError, match=SAMPLES[options]):
        run_here(tmp_path, **callback)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "trainer.max_steps=soon",
            "trainer.max_steps: Value 'soon' of type 'str' could not be converted to Integer",
        ),
        ("trainer.max_step=3", "trainer.max_step is no setting; did you mean trainer.max_steps?"),
        ("tainer.max_steps=3", "tainer is no setting; did you mean trainer?"),
        ("trainer=fast", "Could not find 'trainer/fast'; there are cluster, default"),
        ("data.train=[x", "no viable alternative at input '[x'; See https://hydra.cc"),
    ],
)
def test_wrong_type_and_unknown_names_are_one_sentence(override, sentence, tmp_path):
    with pytest.raises(SettingError) as caught:
        check_command_line([*overrides(tmp_path), override])
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    check_command_line(overrides(tmp_path))


def test_wrong_command_line_is_one_line(tmp_path):
    result = command(tmp_path, "experiment=tinny")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: Could not find 'experiment/tinny'; there are finetune-lora, ")
    assert line.endswith("tiny")


def test_callback_that_is_none_is_refused():
    with pytest.raises(SettingError, match=r"callbacks.mine must be a callback, got .*no.such"):
        make_callbacks({"mine": {"_target_": "no.such"}, "other": None})


class Particular:
    def __init__(self):
        raise ValueError("two things:\n  one\n  other")


def test_reason_of_a_callback_is_whole():
    with pytest.raises(SettingError, match=r"got .*: two things: one; other$"):
        make_callbacks({"mine": {"_target_": f"{__name__}.Particular"}})


def test_refusal_is_a_sentence_and_status_1_and_nothing_is_written(tmp_path):
    result = command(tmp_path, optimizer__lr=-1)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: optimizer.lr must be above 0, got -1.0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_schedules():
    def factors(*steps, **settings):
        options = SchedulerSettings(warmup_steps=4, **settings)
        return [factor(step, options, 104) for step in steps]

    assert factors(0, 1, 3, 4) == [0.2, 0.4, 0.8, 1.0]
    assert factors(4, 54, 104, 200, name="linear", final_factor=0.2) == [1.0, 0.6, 0.2, 0.2]
    cosine = factors(4, 29, 54, 104, name="cosine", final_factor=0.0)
    assert cosine == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.0], abs=1e-15)
    assert factors(4, 24, name="cosine", decay_steps=20, final_factor=0.1) == [1.0, 0.1]
    assert factors(4, 83, 84, 94, 104, name="wsd", decay_steps=20, final_factor=0.0) == [
        1.0, 1.0, 1.0, 0.5, 0.0,
    ]  # fmt: skip
    assert factors(83, 84, name="wsd", final_factor=0.0) == [1.0, pytest.approx(20 / 21)]
    assert factors(4, 1000, name="constant") == [1.0, 1.0]
    no_warmup = SchedulerSettings(name="linear", final_factor=0.0)
    assert [factor(step, no_warmup, 10) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]


def test_scheduler_gives_the_optimizer_its_rates():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scheduler = make_scheduler(optimizer, SchedulerSettings("linear", 1, None, 0.0), 3)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.25, 0.5, 0.25]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_matrices_decay_alone(decay_embeddings):
    model = Small()
    groups = parameter_groups(
        model, OptimizerSettings(weight_decay=0.3, decay_embeddings=decay_embeddings)
    )
    decayed = [model.linear.weight] + [model.table.weight] * decay_embeddings
    free = [model.norm.weight, model.norm.bias, model.linear.bias]
    free += [model.table.weight] * (not decay_embeddings)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    for group, expected in zip(groups, (decayed, free)):
        assert set(group["params"]) == set(expected)
        assert len(group["params"]) == len(expected)


def test_moving_average_against_its_formula():
    model = Small()
    average = MovingAverage(model, 0.75)
    optimizer = make_optimizer(model, OptimizerSettings(lr=0.1))
    expected = model.linear.weight.detach().clone()
    for _ in range(3):
        model.linear(torch.ones(4)).square().sum().backward()
        optimizer.step()
        average.update()
        expected = 0.75 * expected + 0.25 * model.linear.weight.detach()
    trained = model.linear.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(model.linear.weight.detach(), expected)
    assert torch.equal(model.linear.weight, trained)
