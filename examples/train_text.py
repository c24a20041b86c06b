"""Train a small GPT on text, generate with it, compare attention with PyTorch's.

    python examples/train_text.py                # two and a half minutes of training, five in all
    python examples/train_text.py --minutes 0.5

The text is the source code of Python's standard library. Attention's forward, backward and KV cache
are this package's; all else is plain PyTorch. Figures and pictures go to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import attention_comparison
import torch
import torch.nn.functional as F
from corpus import load_corpus, random_batch
from gpt import GPT, GPTConfig, generate, generate_without_cache

BATCH, SEQLEN = 4, 256
PEAK_LEARNING_RATE = 3e-3
VALIDATION_BATCHES = 40
PROMPT = b"class Reader:\n    def read_lines(self, path, encoding=None):\n"
NEW_TOKENS = 200


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=2.5, help="of training")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--no-comparison", action="store_true", help="leave out the last stage")
    return parser.parse_args()


def loss_of(model: GPT, tokens, targets, dtype: torch.dtype):
    """Cross entropy in nats a byte, with matrix products and attention in ``dtype``."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def faster_dtype(model: GPT, text) -> torch.dtype:
    """fp32 or bf16, whichever trains faster; bf16 pays where the CPU has instructions for it."""
    tokens, targets = random_batch(text, BATCH, SEQLEN, torch.Generator().manual_seed(0))
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):  # the first run is a warm-up
            start = time.perf_counter()
            loss_of(model, tokens, targets, dtype).backward()
            seconds[dtype] = time.perf_counter() - start
    model.zero_grad()
    return min(seconds, key=seconds.get)


class Progress:
    """A bar on a terminal, elsewhere a line for every tenth of the way."""

    def __init__(self):
        self._tenth = -1

    def show(self, done: float, text: str) -> None:
        bar = "#" * int(30 * done)
        line = f"[{bar:<30}] {100 * done:3.0f} %  {text}"
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if done >= 1 else "", flush=True)
        elif int(10 * done) > self._tenth:
            self._tenth = int(10 * done)
            print(line, flush=True)


def learning_rate(step: int, done: float) -> float:
    """A short rise, a plateau until 40 % of the time, then linearly down to almost nothing."""
    decay = min(1.0, (1.0 - done) / 0.6)
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 20) * max(decay, 0.02)


def train(model: GPT, text, minutes: float, dtype: torch.dtype) -> list[dict]:
    """Train for ``minutes``; returns {step, seconds, loss} of every step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    generator = torch.Generator().manual_seed(0)
    history, smooth, progress = [], None, Progress()
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < 60 * minutes:
        done = seconds / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(len(history), done)
        loss = loss_of(model, *random_batch(text, BATCH, SEQLEN, generator), dtype)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        history.append({"step": len(history), "seconds": seconds, "loss": loss.item()})
        rate = len(history) * BATCH * SEQLEN / (time.perf_counter() - start)
        progress.show(done, f"step {len(history)}  loss {smooth:.3f}  {rate:,.0f} bytes/s")
    progress.show(1.0, f"step {len(history)}  loss {smooth:.3f}  {rate:,.0f} bytes/s")
    return history


@torch.inference_mode()
def validate(model: GPT, text) -> float:
    """Mean loss over fixed places of the held-out text, in nats a byte, in fp32."""
    generator = torch.Generator().manual_seed(1)
    losses = [
        loss_of(model, *random_batch(text, BATCH, SEQLEN, generator), torch.float32).item()
        for _ in range(VALIDATION_BATCHES)
    ]
    return sum(losses) / len(losses)


def as_text(tokens) -> str:
    return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


def show_generation(model: GPT) -> dict:
    """Generate greedily with and without cache, check that both agree, print a drawn sample."""
    prompt = torch.tensor([list(PROMPT)])
    generate(model, prompt, 2)  # warm-up
    start = time.perf_counter()
    with_cache = generate(model, prompt, NEW_TOKENS)
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
    sample = as_text(generate(model, prompt, NEW_TOKENS, temperature=0.7))
    print(f"a sample at temperature 0.7:\n{'-' * 60}\n{as_text(prompt)}{sample}\n{'-' * 60}")
    return {"tokens_per_second": rates, "sample": sample}


def compare(out: Path, machine: str) -> list[dict]:
    """Measure attention beside PyTorch's, print the table and draw the picture."""
    print("attention beside PyTorch's (about a minute)", flush=True)
    rows = attention_comparison.measure(out)
    print(attention_comparison.tables(rows))
    if (path := attention_comparison.picture(rows, machine, out / "attention.png")) is not None:
        print(f"wrote {path}")
    return rows


def write_report(out: Path, report: dict) -> None:
    """report.json with everything, report.md for reading."""
    (out / "report.json").write_text(json.dumps(report, indent=1))
    lines = [
        f"Machine: {report['machine']}",
        "",
        f"Model: {report['parameters']:,} parameters, {report['dtype']}",
        f"Training: {report['steps']} steps in {report['training_seconds']:.0f} s, "
        f"{report['bytes_per_second']:,.0f} bytes/s",
        f"Loss, nats a byte: {report['first_loss']:.2f} at first, {report['training_loss']:.3f} at "
        f"last, {report['validation_loss']:.3f} on held-out text",
        "Generation, tokens/s: "
        + ", ".join(f"{v:.0f} {k}" for k, v in report["tokens_per_second"].items()),
    ]
    if report["attention"]:
        lines += ["", attention_comparison.tables(report["attention"])]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    print(f"wrote {out / 'report.md'} and {out / 'report.json'}")


def main() -> None:
    """Train, generate, compare, report."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = attention_comparison.machine_summary()
    print(machine)
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    training_text, held_out_text = load_corpus()
    dtype = getattr(torch, options.dtype, None) or faster_dtype(model, training_text)
    print(
        f"{model.num_parameters():,} parameters, {str(dtype)[6:]}; {len(training_text):,} bytes of "
        f"text, {len(held_out_text):,} held out; guessing costs ln(256) = {math.log(256):.2f} nats"
    )
    history = train(model, training_text, options.minutes, dtype)
    last = [entry["loss"] for entry in history[-100:]]
    report = {
        "machine": machine,
        "model": asdict(model.config),
        "parameters": model.num_parameters(),
        "dtype": str(dtype)[6:],
        "steps": len(history),
        "training_seconds": 60 * options.minutes,
        "bytes_per_second": len(history) * BATCH * SEQLEN / (60 * options.minutes),
        "first_loss": history[0]["loss"],
        "training_loss": sum(last) / len(last),
        "validation_loss": validate(model, held_out_text),
    }
    print(
        f"loss {report['first_loss']:.3f} -> {report['training_loss']:.3f}, "
        f"{report['validation_loss']:.3f} on held-out text (nats a byte)"
    )
    report |= show_generation(model)
    report["attention"] = [] if options.no_comparison else compare(options.out, machine)
    report["history"] = history
    write_report(options.out, report)


if __name__ == "__main__":
    main()
