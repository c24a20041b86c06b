"""Runs of one process: they learn, go on to the last bit, and survive what befalls them."""

from __future__ import annotations

import json
import math
import shutil
import signal

import pytest
import torch
from training_cases import COURSE, command, rows, run_here

from training.checkpoint import CheckpointError, verify
from training.processes import StopSignal, start_processes
from training.settings import SettingError

# Dropout draws from the generators; a step has two micro batches; evaluation and the averaged
# weights lie between.
EVERYTHING = {
    "trainer__max_steps": 9,
    "trainer__checkpoint_every": 3,
    "trainer__evaluate_every": 2,
    "trainer__ema_decay": 0.9,
    "model__resid_pdrop": 0.1,
    "model__attn_pdrop": 0.1,
    "scheduler__name": "wsd",
}


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """The cases are too small to share; run_here takes one."""


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of EVERYTHING that nothing befell: its folder and its trainer."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_here(folder, **EVERYTHING)


def test_run_learns_and_tells(tmp_path):
    options = {"callbacks": "default", "callbacks__samples": None, "trainer__evaluate_every": 20}
    trainer = run_here(tmp_path, trainer__max_steps=40, **options)
    assert trainer.step == 40
    losses = [float(loss) for (loss,) in rows(tmp_path / "run", "loss") if loss]
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert len(losses) == 40
    assert losses[-1] < 2.9
    assert trainer.last["validation_loss"] < 2.9
    assert trainer.last["perplexity"] == pytest.approx(math.exp(trainer.last["validation_loss"]))
    assert trainer.last["tokens_per_second"] > 0
    assert trainer.last["mfu"] > 0
    assert trainer.last["memory_mib"] > 50
    assert trainer.tokens == 40 * 4 * 16
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/perplexity")] == [20, 40]
    assert [event.step for event in events.Scalars("train/loss")] == [*range(3, 40, 3), 40]
    assert "n_layer: 2" in (tmp_path / "run" / "config.yaml").read_text()


def test_going_on_after_kill_9_is_bitwise_the_run_without(whole, tmp_path):
    fault = "+callbacks.kill={_target_: training_faults.KillAfter, step: 5, stored: 3}"
    killed = command(tmp_path, fault, **EVERYTHING)
    assert killed.returncode == -9, killed.stderr
    assert rows(tmp_path / "run", "step")[-1] == ("5",)
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("6,4.2")  # of a row that a kill cut
    trainer = run_here(tmp_path, **EVERYTHING)
    assert rows(tmp_path / "run", *COURSE) == rows(whole[0] / "run", *COURSE)
    assert same(weights(trainer), weights(whole[1]))
    assert same(trainer.ema.state_dict().values(), whole[1].ema.state_dict().values())


def test_kill_in_a_checkpoint_leaves_the_last_one(whole, tmp_path):
    fault = "+callbacks.kill={_target_: training_faults.KillInCheckpoint, step: 6}"
    killed = command(tmp_path, fault, trainer__async_checkpoints=False, **EVERYTHING)
    assert killed.returncode == -9, killed.stderr
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000003", "step-00000006.partial",
    ]  # fmt: skip
    run_here(tmp_path, **EVERYTHING)
    assert rows(tmp_path / "run", *COURSE) == rows(whole[0] / "run", *COURSE)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000006", "step-00000009"]


@pytest.mark.parametrize("is_async", [True, False])
def test_full_disk_leaves_the_last_one(tmp_path, is_async):
    folder = tmp_path / "run" / "checkpoints"
    options = "step: 4, stored: 3, limit: 20000"
    fault = {"+callbacks__full": f"{{_target_: training_faults.FullDisk, {options}}}"}
    sentence = f"step-00000006 could not be written: .*; the last whole one is {folder}/step-000000"
    with pytest.raises(CheckpointError, match=sentence + "03"):
        run_here(tmp_path, trainer__async_checkpoints=is_async, **fault, **EVERYTHING)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert run_here(tmp_path, **EVERYTHING).step == 9


def damage_truncated(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    return "__0_0.distcp has .* bytes where .* were written"


def damage_flipped(folder):
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "__0_0.distcp does not have the content that was written"


def damage_missing(folder):
    (folder / ".metadata").unlink()
    return ".metadata is missing"


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")
    return "its manifest.json cannot be read"


def damage_deep(folder):
    (folder / "manifest.json").write_text("[" * 100_000)
    return "its manifest.json cannot be read .RecursionError"


def changed_manifest(name, value):
    """Damage that gives a fact of the manifest another value; None: takes it away."""

    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest.pop(name)
        if value is not None:
            manifest[name] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return f"manifest.json is damaged: it has .* as '{name}'"

    damage.__name__ = f"{name}-{'gone' if value is None else 'wrong'}"
    return damage


def damage_file_not_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["__0_0.distcp"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "__0_0.distcp is not in its manifest.json"


DAMAGED_MANIFESTS = [
    damage_deep,
    damage_file_not_named,
    *(changed_manifest(name, None) for name in ("files", "course", "step", "processes")),
    *(changed_manifest("files", files) for files in ({}, [1], {".metadata": 3})),
    changed_manifest("step", "9"),
]


@pytest.mark.parametrize("damage", DAMAGED_MANIFESTS, ids=lambda damage: damage.__name__)
def test_damaged_manifest(whole, tmp_path, one_process, damage):
    folder = tmp_path / "step-00000009"
    shutil.copytree(whole[0] / "run" / "checkpoints" / "step-00000009", folder)
    assert verify(folder)["step"] == 9
    sentence = damage(folder)
    with pytest.raises(CheckpointError, match=f"step-00000009 is damaged: .*{sentence}"):
        verify(folder)


@pytest.fixture
def one_process(whole):
    start_processes("cpu")
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_flipped, damage_missing, damage_manifest]
)
def test_damaged_checkpoint_is_refused_and_the_one_before_it_can_be_used(whole, tmp_path, damage):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run" / "checkpoints"
    sentence = damage(folder / "step-00000009")
    before = f"the one before it is {folder}/step-00000006"
    (tmp_path / "run" / "metrics.csv").write_text("untouched")
    with pytest.raises(CheckpointError, match=f"step-00000009 is damaged: .*{sentence}.*{before}"):
        run_here(tmp_path, **EVERYTHING)
    assert (tmp_path / "run" / "metrics.csv").read_text() == "untouched"
    shutil.copy(whole[0] / "run" / "metrics.csv", tmp_path / "run")
    trainer = run_here(tmp_path, trainer__resume=str(folder / "step-00000006"), **EVERYTHING)
    assert same(weights(trainer), weights(whole[1]))
    assert rows(tmp_path / "run", *COURSE) == rows(whole[0] / "run", *COURSE)


def test_checkpoint_of_another_course_is_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    sentence = r"model.n_layer must be 2, as in the checkpoint .*step-00000009, got 3"
    with pytest.raises(SettingError, match=sentence):
        run_here(tmp_path, **{**EVERYTHING, "model__n_layer": 3})
    with pytest.raises(SettingError, match=r"data.content_crc must be \d+, .* got \d+"):
        run_here(tmp_path, data__hold_out=5, **EVERYTHING)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("lr", 0.02, "optimizer.lr must be 0.01, as in .*step-00000009, got 0.02"),
        ("weight_decay", 0.5, "optimizer.weight_decay must be 0.1, as in .*, got 0.5"),
        (
            "betas",
            "[0.1,0.2]",
            r"optimizer.betas must be \[0.9, 0.95\], as in .*, got \[0.1, 0.2\]",
        ),
        ("eps", 1e-6, "optimizer.eps must be 1e-08, as in .*, got 1e-06"),
        ("decay_embeddings", False, "optimizer.decay_embeddings must be True, as in .*, got False"),
    ],
)
def test_optimizer_of_another_course_is_refused(whole, tmp_path, name, value, sentence):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "run")
    with pytest.raises(SettingError, match=sentence):
        run_here(tmp_path, **EVERYTHING, **{f"optimizer__{name}": value})
    assert contents(tmp_path / "run") == before
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000009"
    other = {"out": str(tmp_path / "other"), "trainer__resume": str(checkpoint)}
    with pytest.raises(SettingError, match=sentence):
        run_here(tmp_path, **EVERYTHING, **other, **{f"optimizer__{name}": value})
    assert not (tmp_path / "other").exists()


def contents(folder):
    """The bytes of all files of a folder, by name."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_never_starts_anew_and_keeps_what_was_there(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    trainer = run_here(tmp_path, trainer__resume="never", **EVERYTHING)
    assert same(weights(trainer), weights(whole[1]))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert [name[:19] for name in names] == [
        "step-00000006", "step-00000006.aside", "step-00000009", "step-00000009.aside",
    ]  # fmt: skip


def test_manifest_tells_of_the_run(whole):
    manifest = json.loads(
        (whole[0] / "run" / "checkpoints" / "step-00000009" / "manifest.json").read_text()
    )
    assert manifest["step"] == 9
    assert manifest["processes"] == 1
    assert manifest["settings"]["optimizer"]["lr"] == 0.01
    assert set(manifest["files"]) == {".metadata", "__0_0.distcp"}


def test_stop_after_minutes_stores_a_checkpoint(whole, tmp_path):
    stopped = run_here(tmp_path, trainer__max_minutes=1e-9, **EVERYTHING)
    assert stopped.step == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()
    trainer = run_here(tmp_path, **EVERYTHING)
    assert same(weights(trainer), weights(whole[1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_with_a_checkpoint(number, whole, tmp_path, capsys):
    signals = f"{{_target_: training_faults.SignalAfter, step: 4, signal: {int(number)}}}"
    assert run_here(tmp_path, **{"+callbacks__end": signals}, **EVERYTHING).step == 5
    stored = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert stored.is_dir()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"stopped at step 5, stored in {stored}; the same command goes on"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same(weights(run_here(tmp_path, **EVERYTHING)), weights(whole[1]))


def test_second_interrupt_ends_at_once():
    before, signals = signal.getsignal(signal.SIGINT), StopSignal()
    try:
        signal.raise_signal(signal.SIGINT)
        assert signals.arrived
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGINT) is before


def test_line_has_the_mean_loss_since_the_line_before(tmp_path, capsys):
    progress = {"+callbacks__progress": "{_target_: training.callbacks.Progress}"}
    run_here(tmp_path, trainer__max_steps=7, **progress)
    losses = [float(loss) for (loss,) in rows(tmp_path / "run", "loss") if loss]
    lines = [line for line in capsys.readouterr().out.splitlines() if " lr " in line]
    printed = [float(line.split("loss ")[1].split()[0]) for line in lines]
    means = [sum(part) / len(part) for part in (losses[:3], losses[3:6], losses[6:])]
    assert printed == pytest.approx(means, abs=6e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    options = {"trainer__max_steps": 3, "trainer__global_batch": 8}
    at_once = run_here(tmp_path, trainer__micro_batch=8, **options)
    first = rows(tmp_path / "run", "loss", "grad_norm")
    shutil.rmtree(tmp_path / "run")
    in_parts = run_here(tmp_path, trainer__micro_batch=2, **options)
    second = rows(tmp_path / "run", "loss", "grad_norm")
    assert len(first) == len(second) == 4
    for one, other in zip(first[:3], second[:3]):
        assert [float(x) for x in one] == pytest.approx([float(x) for x in other], rel=1e-5)
    for a, b in zip(weights(at_once), weights(in_parts)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_changes_nothing(tmp_path):
    options = {"model__resid_pdrop": 0.1, "model__attn_pdrop": 0.1}
    plain = run_here(tmp_path, **options)
    again = run_here(
        tmp_path, trainer__resume="never", model__activation_checkpointing=1, **options
    )
    assert same(weights(plain), weights(again))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_runs_go_on_too(tmp_path, precision):
    options = {"trainer__precision": precision, "trainer__max_steps": 8}
    run_here(tmp_path, trainer__max_steps=4, trainer__checkpoint_every=4,
             trainer__precision=precision, scheduler__name="constant")  # fmt: skip
    went_on = run_here(tmp_path, scheduler__name="constant", **options)
    first = rows(tmp_path / "run", *COURSE)
    shutil.rmtree(tmp_path / "run")
    without = run_here(tmp_path, scheduler__name="constant", **options)
    second = rows(tmp_path / "run", *COURSE)
    assert [row for row in first if row[1]] == [row for row in second if row[1]]
    assert same(weights(went_on), weights(without))
    assert float(second[-2][1]) < 5.3


def test_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss of step \d+ is (nan|inf)"):
        run_here(tmp_path, optimizer__lr=1e30, scheduler__warmup_steps=0, trainer__max_steps=20,
                 trainer__clip_grad_norm=None)  # fmt: skip


def test_step_that_spoils_the_weights_is_not_stored(tmp_path):
    """Its own loss is finite, and so are the weights after it: their loss is not."""
    options = {"trainer__checkpoint_every": 1, "scheduler__warmup_steps": 0}
    run_here(tmp_path, trainer__max_steps=2, **options)
    spoilt = {"+callbacks__spoil": "{_target_: training_faults.Spoil, step: 4}"}
    folder = tmp_path / "run" / "checkpoints"
    sentence = (
        rf"the loss with the weights of step 4 is (nan|inf); the last .* is {folder}/step-0+3"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        run_here(tmp_path, trainer__max_steps=8, **options, **spoilt)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    went_on = run_here(tmp_path, trainer__max_steps=8, **options)
    assert went_on.step == 8 and math.isfinite(went_on.last["loss"])


def test_spoilt_weights_are_not_exported(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss with the weights of step 1 is .* none"):
        run_here(tmp_path, optimizer__lr=1e30, scheduler__warmup_steps=0, trainer__max_steps=1)
    assert not (tmp_path / "run" / "model").exists()


def test_gradient_norm_that_is_not_finite_ends_the_run_before_the_weights_have_it(tmp_path):
    spoilt = {"+callbacks__spoil": "{_target_: training_faults.SpoilGradient, step: 2}"}
    with pytest.raises(FloatingPointError, match=r"the gradient norm of step 3 is inf; .* none"):
        run_here(tmp_path, **spoilt)
