"""Train a small GPT on text, generate with it, compare attention with PyTorch's.

    python examples/train_text.py                # two and a half minutes of training, five in all
    python examples/train_text.py --minutes 0.5

The text is the source code of Python's standard library, as bytes; ``training`` trains on it, with
its experiment "tiny". Figures and pictures go to --out.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # training/

import attention_comparison
import torch
import torch.distributed as dist

from training.corpus import prepare
from training.dataset import TokenDataset
from training.model import DTYPES, LanguageModel, make_model
from training.optim import make_optimizer
from training.run import compose_settings, train
from training.settings import Settings

PROMPT = "class Reader:\n    def read_lines(self, path, encoding=None):\n"
NEW_TOKENS = 200
TRIAL_STEPS = 4  # the first is a warm-up
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.5, help="of training")
    parser.add_argument("--dtype", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--no-comparison", action="store_true", help="leave out the last stage")
    return parser.parse_args()


def settings_for(out: Path, precision: str = "fp32", steps: int = 1000, minutes=None) -> Settings:
    """The settings of a run of so many steps, after ``minutes`` of which it ends in any case."""
    return compose_settings([
        "experiment=tiny", f"out={out / 'training'}", f"data.cache={out / 'data'}",
        f"trainer.precision={precision}", f"trainer.max_steps={steps}",
        f"scheduler.decay_steps={steps * 6 // 10}", "scheduler.final_factor=0.02",
        f"scheduler.warmup_steps={min(20, steps)}", "trainer.device=cpu", "trainer.resume=never",
        f"trainer.max_minutes={minutes or 'null'}", f"trainer.log_every={max(steps // 100, 1)}",
        "trainer.evaluate_every=0", "trainer.checkpoint_every=0", "callbacks.samples=null",
        "callbacks.tensorboard=null", "callbacks.progress.lines=10",
    ])  # fmt: skip


def seconds_of_a_step(settings: Settings, precision: str) -> float:
    """How long a step takes on this machine."""
    corpus, batch = prepare(settings.data), settings.trainer.global_batch
    dataset = TokenDataset(corpus.train, settings.data.seqlen)
    tokens = torch.stack([dataset[i] for i in range(batch)])
    model = LanguageModel(make_model(settings.model, corpus.tokenizer))
    optimizer = make_optimizer(model, settings.optimizer)
    seconds = []
    for _ in range(TRIAL_STEPS):
        start = time.perf_counter()
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
            loss = model(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[len(seconds[1:]) // 2]


def train_for(minutes: float, dtype: str, out: Path):
    """A run of about ``minutes`` in ``dtype``, "auto" being the faster: the trainer at its end and
    {step, loss} of every step. bf16 pays where the CPU has instructions for it."""
    choices = list(PRECISIONS.values()) if dtype == "auto" else [PRECISIONS[dtype]]
    settings = settings_for(out)
    seconds = {precision: seconds_of_a_step(settings, precision) for precision in choices}
    precision = min(seconds, key=seconds.get)
    steps = max(int(60 * minutes / seconds[precision]), 2)
    shutil.rmtree(out / "training", ignore_errors=True)
    trainer = train(settings_for(out, precision, steps, 1.2 * minutes))
    dist.destroy_process_group()
    with (trainer.out / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    return trainer, [{"step": int(row["step"]), "loss": float(row["loss"])} for row in rows]


@torch.inference_mode()
def generate_without_cache(model, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The prompt and the likeliest ``num_tokens`` after it; each step computes all tokens again."""
    tokens = prompt
    for _ in range(num_tokens):
        logits = model(tokens).logits[:, -1, : model.config.vocab_size]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


def show_generation(model, tokenizer) -> dict:
    """Generate greedily with and without cache, check that both agree, print a drawn sample."""
    prompt = torch.from_numpy(tokenizer.encode_batch([PROMPT])[0].astype("int64"))[None]
    length = prompt.shape[1] + NEW_TOKENS
    model.generate(prompt, prompt.shape[1] + 2)  # warm-up
    start = time.perf_counter()
    with_cache = model.generate(prompt, length)
    cached_seconds = time.perf_counter() - start
    start = time.perf_counter()
    without_cache = generate_without_cache(model, prompt, NEW_TOKENS)
    plain_seconds = time.perf_counter() - start
    if not torch.equal(with_cache, without_cache):
        place = int((with_cache != without_cache)[0].nonzero()[0])
        raise SystemExit(f"generation with and without KV cache differ at token {place}")
    rates = {"with_cache": NEW_TOKENS / cached_seconds, "without_cache": NEW_TOKENS / plain_seconds}
    print(
        f"greedy, {NEW_TOKENS} tokens: {rates['with_cache']:.0f} tokens/s with KV cache, "
        f"{rates['without_cache']:.0f} without; equal token by token"
    )
    torch.manual_seed(0)
    sample = tokenizer.decode(model.generate(prompt, length, top_k=0, temperature=0.7)[0].tolist())
    print(f"a sample at temperature 0.7:\n{'-' * 60}\n{sample}\n{'-' * 60}")
    return {"tokens_per_second": rates, "sample": sample[len(PROMPT) :]}


def compare(out: Path) -> list[dict]:
    """Measure attention beside PyTorch's and print the table."""
    print("attention beside PyTorch's (about a minute)", flush=True)
    rows = attention_comparison.measure(out)
    print(attention_comparison.tables(rows))
    return rows


def write_report(out: Path, report: dict) -> None:
    """report.json with everything, report.md for reading, demo.png where there is matplotlib."""
    (out / "report.json").write_text(json.dumps(report, indent=1))
    lines = [
        f"Machine: {report['machine']}",
        "",
        f"Model: {report['parameters']:,} parameters, {report['precision']}",
        f"Training: {report['steps']} steps, {report['bytes_per_second']:,.0f} bytes/s",
        f"Loss, nats a byte: {report['first_loss']:.2f} at first, {report['training_loss']:.3f} at "
        f"last, {report['validation_loss']:.3f} on held-out text",
        "Generation, tokens/s: "
        + ", ".join(f"{v:.0f} {k}" for k, v in report["tokens_per_second"].items()),
    ]
    if report["attention"]:
        lines += ["", attention_comparison.tables(report["attention"])]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    written = ["report.md", "report.json"]
    if attention_comparison.picture(report, out / "demo.png") is not None:
        written.append("demo.png")
    print(f"wrote {', '.join(written)} to {out}")


def main() -> None:
    """Train, generate, compare, report."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = attention_comparison.machine_summary()
    print(f"{machine}\nguessing a byte costs ln(256) = {math.log(256):.2f} nats", flush=True)
    start = time.perf_counter()
    trainer, history = train_for(options.minutes, options.dtype, options.out)
    last = [entry["loss"] for entry in history[-100:]]
    report = {
        "machine": machine,
        "parameters": trainer.num_parameters,
        "precision": trainer.settings.trainer.precision,
        "steps": len(history),
        "bytes_per_second": trainer.last["tokens_per_second"],
        "first_loss": history[0]["loss"],
        "training_loss": sum(last) / len(last),
        "validation_loss": trainer.last["validation_loss"],
        "preparing_and_training_seconds": time.perf_counter() - start,
    }
    print(
        f"loss {report['first_loss']:.3f} -> {report['training_loss']:.3f}, "
        f"{report['validation_loss']:.3f} on held-out text (nats a byte)"
    )
    model = trainer.model.model.eval()
    report |= show_generation(model, trainer.corpus.tokenizer)
    report["attention"] = [] if options.no_comparison else compare(options.out)
    report["history"] = history
    write_report(options.out, report)


if __name__ == "__main__":
    main()
