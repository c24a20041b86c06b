"""Generate text with a model from a local Hugging Face folder.

    python examples/inference/generate.py FOLDER --prompt "Once upon a time" --temperature 0.8

Text appears as it comes. Without a folder a tiny model is trained first, on the sources of Python's
standard library, into build/tiny_model.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from checkpoint import DTYPES, Checkpoint, load_or_exit
from serving.text import TokenText
from tiny_checkpoint import folder_or_tiny

PROMPT = "class Reader:\n    def read_lines(self, path, encoding=None):\n"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="default: a tiny model, trained first")
    parser.add_argument("--prompt", default=PROMPT, help="- for standard input")
    parser.add_argument("--max-tokens", type=int, default=120, help="new tokens")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def generate(checkpoint: Checkpoint, options: argparse.Namespace, out=sys.stdout) -> int:
    """Write the text after a prompt; return how many tokens it has."""
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    device = next(checkpoint.model.parameters()).device
    ids = checkpoint.tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError(f"--prompt must have at least one token, got {prompt!r}")
    tokens = torch.tensor([ids], device=device)
    checkpoint.check_length(tokens.shape[1] + options.max_tokens)
    text, count = TokenText(checkpoint.tokenizer, tokens[0].tolist()), 0
    steps = checkpoint.model.stream(
        tokens,
        None,
        max_new_tokens=options.max_tokens,
        temperature=0.0 if options.top_k == 1 else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        eos_token_id=sorted(checkpoint.stop_tokens) or None,
        vocab_size=checkpoint.vocab_size,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    out.write(prompt)
    for step in steps:
        count += 1
        if int(step) not in checkpoint.stop_tokens:
            out.write(text.push(int(step)))
            out.flush()
    out.write(text.rest() + "\n")
    return count


def main() -> None:
    options = parse_arguments()
    checkpoint = load_or_exit(folder_or_tiny(options.folder), options.dtype, options.device)
    start = time.perf_counter()
    try:
        count = generate(checkpoint, options)
    except ValueError as error:  # an option out of range, or too many tokens for the model
        raise SystemExit(f"generate.py: {error}") from None
    seconds = time.perf_counter() - start
    print(f"{count} tokens, {count / seconds:.0f} a second", file=sys.stderr)


if __name__ == "__main__":
    main()
