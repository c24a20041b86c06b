"""Tokens a second of a small language model, beside the same model of transformers with SDPA.

    python benchmarks/benchmark_models.py
    python benchmarks/benchmark_models.py --op decode --shape gpt2 --out build/bench

Both have the same weights, and what they compute is compared first. Runs take turns; figures are
medians. On a machine that others use, ``--clock cpu --threads 1`` counts the process's own time
rather than the wall's. decode generates greedily with a cache, prompt included; train is a step of
forward, loss, backward and AdamW.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

import torch
from measuring.timing import median, seconds, take_turns
from torch import Tensor

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models import from_hf

COLUMNS = ("op", "shape", "dtype", "batch", "ours", "transformers", "ratio")  # tokens a second
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY, LAYERS, WIDTH, HEADS, POSITIONS = 4096, 4, 256, 4, 1024


def config_of(shape: str):
    """The configuration of transformers."""
    from transformers import GPT2Config, LlamaConfig

    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if shape == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
        return GPT2Config(vocab_size=VOCABULARY, **sizes, **drops, **ends)
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=640,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=POSITIONS,
        **ends,
    )


def models_of(shape: str, dtype: torch.dtype):
    """Our model and transformers', of the same random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config_of(shape), attn_implementation="sdpa")
    theirs = theirs.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = from_hf(folder, dtype=dtype, fused_dropout_add_ln=True, fused_mlp=shape == "gpt2")
    return ours, theirs


def prompts(batch: int, seqlen: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def check_decode(ours, theirs, ids: Tensor) -> None:
    """Raise AssertionError for logits that differ by more than rounding."""
    with torch.inference_mode():
        a, b = ours(ids).logits.float(), theirs(ids).logits.float()
    bound = 1e-3 if next(ours.parameters()).dtype == torch.float32 else 0.1
    assert (a - b).abs().max() < bound * b.abs().max(), "the models are not the same"


def decoding(ours, theirs, batch: int, new: int) -> dict[str, Callable]:
    """Functions that generate ``batch * new`` tokens."""
    ids = prompts(batch, 16)
    check_decode(ours.eval(), theirs.eval(), ids)
    mask = torch.ones_like(ids)
    options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    return {
        "ours": lambda: ours.generate(ids, None, max_new_tokens=new),
        "transformers": lambda: theirs.generate(
            ids, attention_mask=mask, pad_token_id=0, **options
        ),
    }


def training(ours, theirs, batch: int, seqlen: int) -> dict[str, Callable]:
    """Functions that make a step on ``batch * seqlen`` tokens."""
    ids = prompts(batch, seqlen + 1)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    loss_of_logits = CrossEntropyLoss()

    def our_loss() -> Tensor:
        logits = ours(inputs).logits
        return loss_of_logits(logits.flatten(0, 1), targets.flatten())

    def their_loss() -> Tensor:
        # Labels are not shifted once more: as many tokens as ours.
        return theirs(inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    steps = {}
    losses = {}
    for name, model, loss_of in (("ours", ours, our_loss), ("transformers", theirs, their_loss)):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
        losses[name] = loss_of().item()

        def step(loss_of=loss_of, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

        steps[name] = step
    assert abs(losses["ours"] - losses["transformers"]) < 0.02 * losses["ours"], losses
    return steps


def cpu_seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of this process's CPU time a call."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


CLOCKS = {"wall": seconds, "cpu": cpu_seconds}


def measure(runs: dict[str, Callable], tokens: int, budget: float, clock: str) -> dict[str, str]:
    """The figures of a row, for runs of ``tokens`` tokens."""
    for run in runs.values():
        run()
    estimates = {name: CLOCKS[clock](run) for name, run in runs.items()}
    times = take_turns(runs, estimates, budget, timed=CLOCKS[clock])
    rates = {name: tokens / median(samples) for name, samples in times.items()}
    ratio = f"{rates['ours'] / rates['transformers']:.2f}"
    return {**{name: f"{rate:.0f}" for name, rate in rates.items()}, "ratio": ratio}


def rows_of(options) -> Iterator[dict[str, object]]:
    for shape in options.shape:
        for dtype in options.dtype:
            head = {"shape": shape, "dtype": dtype}
            for op in options.op:
                models = models_of(shape, DTYPES[dtype])
                for batch in options.batch if op == "decode" else [options.train_batch]:
                    count = options.new_tokens if op == "decode" else options.seqlen
                    make = decoding if op == "decode" else training
                    runs = make(*models, batch, count)
                    figures = measure(runs, batch * count, options.case_seconds, options.clock)
                    yield {"op": op, **head, "batch": batch, **figures}


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=("decode", "train"), default=["decode", "train"])
    parser.add_argument("--shape", nargs="+", choices=("llama", "gpt2"), default=["llama", "gpt2"])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="of decode")
    parser.add_argument("--new-tokens", type=int, default=64, help="of decode")
    parser.add_argument("--train-batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256, help="of train")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--case-seconds", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="a folder, for models.csv")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    table = csv.DictWriter(sys.stdout, COLUMNS)
    table.writeheader()
    rows = []
    for row in rows_of(options):
        table.writerow(row)
        sys.stdout.flush()
        rows.append(row)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "models.csv").open("w", newline="") as file:
            kept = csv.DictWriter(file, COLUMNS)
            kept.writeheader()
            kept.writerows(rows)


if __name__ == "__main__":
    main()
