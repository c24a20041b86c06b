"""Make a small checkpoint of Hugging Face's layout, for the examples to run without a download.

    python examples/inference/tiny_checkpoint.py build/tiny_model            # half a minute

A Llama of a few layers with a byte-level BPE of its own, trained on the sources of Python's
standard library for as many steps as fit into ``--seconds``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch

DEFAULT = Path("build/tiny_model")
VOCABULARY, POSITIONS, END = 1024, 1024, "<|endoftext|>"
BATCH, SEQLEN, PEAK_LEARNING_RATE = 8, 96, 3e-3


def text_of(most: int = 1 << 20) -> str:
    """Some of the sources, about ``most`` characters of whole files, by their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, size = [], 0
    for path in sorted(root.glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size >= most:
            break
    return "".join(texts)


def train_tokenizer(text: str):
    """A byte-level BPE of ``VOCABULARY`` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A part says what is frequent.
    tokenizer.train_from_iterator(text[: 1 << 18].splitlines(keepends=True), trainer)
    return tokenizer


def make_model(layers: int, width: int, seed: int = 0):
    """A Llama of Hugging Face with random weights, with attention by this package."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import flash_attn.integrations

    flash_attn.integrations.register()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64 or 1,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "exact_attention"
    return LlamaForCausalLM(config)


def random_batch(tokens: torch.Tensor, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random places of the text: tokens and, for each, the one after it, ``(BATCH, SEQLEN)``."""
    starts = torch.randint(len(tokens) - SEQLEN, (BATCH, 1), generator=generator)
    windows = tokens[starts + torch.arange(SEQLEN + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def train(model, tokens: torch.Tensor, seconds: float, most_steps: int = 10_000) -> float:
    """Train for about ``seconds``; return the mean loss of the last steps, in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95))
    generator, losses = torch.Generator().manual_seed(0), []
    start = time.perf_counter()
    done = 0.0
    while done < 1.0 and len(losses) < most_steps:
        for group in optimizer.param_groups:
            warm = min(1.0, (len(losses) + 1) / 20)
            group["lr"] = PEAK_LEARNING_RATE * warm * (0.05 + 0.95 * math.cos(0.5 * math.pi * done))
        inputs, targets = random_batch(tokens, generator)
        logits = model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = (time.perf_counter() - start) / seconds if seconds > 0 else 1.0
    last = losses[-20:]
    return sum(last) / len(last)


@contextlib.contextmanager
def _quiet():
    """Without transformers' progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def make_checkpoint(
    folder: Path, *, layers: int = 2, width: int = 128, seconds: float = 20.0, text: str = ""
) -> float:
    """Train a model and write it; return its last loss.

    Args:
        folder: gets config.json, generation_config.json, model.safetensors and tokenizer.json,
            whole or not at all.
        layers, width: of the model.
        seconds: of training; 0: one step.
        text: to train on; empty: ``text_of()``.
    """
    text = text or text_of()
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer.encode(text).ids, dtype=torch.int32)
    model = make_model(layers, width)
    loss = train(model, tokens, seconds)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    with _quiet():
        model.save_pretrained(partial)
    tokenizer.save(str(partial / "tokenizer.json"))
    partial.rename(folder)
    return loss


def folder_or_tiny(folder: Path | None) -> Path:
    """Return the folder, or that of a tiny model, which is made where there is none."""
    if folder is not None:
        return folder
    if not (DEFAULT / "config.json").is_file():
        print(f"training a tiny model into {DEFAULT}", file=sys.stderr, flush=True)
        make_checkpoint(DEFAULT)
    return DEFAULT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training")
    options = parser.parse_args()
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists already")
    sizes = {"layers": options.layers, "width": options.width, "seconds": options.seconds}
    loss = make_checkpoint(options.folder, **sizes)
    print(f"{options.folder}: {loss:.2f} nats a token")


if __name__ == "__main__":
    main()
