"""Speculative decoding: a small model drafts, a larger one looks at a whole draft in one call.

    python examples/inference/speculative.py --target FOLDER --draft FOLDER

Prints how many drafted tokens were kept, tokens a second with and without drafts, and whether
greedy tokens are the same. Without folders two tiny models are trained first, into build/. Drafts
gain the more, the larger the target beside the draft is, and the more alike the two are.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoint import DTYPES, Checkpoint, load_or_exit
from tiny_checkpoint import make_checkpoint

from flash_attn.utils.generation import decode, decode_speculative

PROMPT = "import sys\n\n\nclass Reader:\n    def __init__(self, path, encoding=None):\n"
TARGET, DRAFT = Path("build/tiny_target"), Path("build/tiny_draft")
TINY = {TARGET: {"layers": 3, "width": 128}, DRAFT: {"layers": 1, "width": 128}}


@dataclass
class Result:
    """What drafts did.

    Attributes:
        plain, drafted: tokens without and with a draft, prompt included.
        calls: of the target, after the prompt's.
        num_drafted, num_kept: tokens.
        plain_seconds, seconds: without and with a draft.
    """

    plain: list[int]
    drafted: list[int]
    calls: int
    num_drafted: int
    num_kept: int
    plain_seconds: float
    seconds: float


def _counted(model) -> tuple[list[int], object]:
    """Return a list that gets the tokens of each call of a model, and the hook's handle."""
    counts: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
    return counts, handle


def compare(
    target: Checkpoint, draft: Checkpoint, prompt: str, max_tokens: int, lookahead: int, **sampling
) -> Result:
    """Generate with and without a draft.

    Args:
        sampling: ``temperature``, ``top_k``, ``top_p``; of random draws each run has its own.

    Raises:
        ValueError: the two have different tokenizers.
    """
    if target.tokenizer.get_vocab() != draft.tokenizer.get_vocab():
        raise ValueError("the draft's tokenizer has other tokens than the target's")
    ids = torch.tensor([target.tokenizer.encode(prompt).ids])
    target.check_length(ids.shape[1] + max_tokens)
    stop = sorted(target.stop_tokens) or None
    options = {"max_new_tokens": max_tokens, "eos_token_id": stop, **sampling}
    options["vocab_size"] = target.vocab_size
    for model in (target.model, draft.model):  # the first call of a model makes its tables
        decode(ids, model, None, max_new_tokens=2)
    start = time.perf_counter()
    plain = decode(ids, target.model, None, **options).sequences[0].tolist()
    middle = time.perf_counter()
    counts, handle = _counted(target.model)
    out = decode_speculative(
        *(ids, target.model, draft.model, None, lookahead), output_scores=False, **options
    )
    end = time.perf_counter()
    handle.remove()
    drafted = out.sequences[0].tolist()
    calls = counts[1:]  # without the prompt's, which gives the first token
    kept = len(drafted) - ids.shape[1] - 1 - len(calls)
    timing = {"plain_seconds": middle - start, "seconds": end - middle}
    return Result(plain, drafted, len(calls), sum(calls) - len(calls), kept, **timing)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, help="folder; default: a tiny model")
    parser.add_argument("--draft", type=Path, help="folder; default: a tinier one")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=160, help="new tokens")
    parser.add_argument("--lookahead", type=int, default=3, help="tokens of a draft")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--seconds", type=float, default=15.0, help="of training a tiny model")
    return parser.parse_args(arguments)


def _folder(given: Path | None, tiny: Path, seconds: float) -> Path:
    if given is not None:
        return given
    if not (tiny / "config.json").is_file():
        print(f"training a tiny model into {tiny}", file=sys.stderr, flush=True)
        make_checkpoint(tiny, seconds=seconds, **TINY[tiny])
    return tiny


def main() -> None:
    options = parse_arguments()
    target = load_or_exit(_folder(options.target, TARGET, options.seconds), options.dtype)
    draft = load_or_exit(_folder(options.draft, DRAFT, options.seconds), options.dtype)
    is_greedy = options.temperature == 0.0
    sampling = {"temperature": options.temperature, "top_k": 1 if is_greedy else 0}
    result = compare(
        *(target, draft, options.prompt, options.max_tokens, options.lookahead), **sampling
    )
    num_prompt = len(target.tokenizer.encode(options.prompt).ids)
    new, new_plain = len(result.drafted) - num_prompt, len(result.plain) - num_prompt
    print(target.tokenizer.decode(result.drafted))
    print(f"{new} tokens by {result.calls} calls of the target after the prompt's")
    rate = result.num_kept / max(result.num_drafted, 1)
    print(f"{result.num_kept} of {result.num_drafted} drafted tokens kept ({rate:.0%})")
    rates = new / result.seconds, new_plain / result.plain_seconds
    print("{:.0f} tokens a second, {:.0f} without a draft".format(*rates))
    if is_greedy:
        print(f"equal to plain greedy decoding: {result.drafted == result.plain}")


if __name__ == "__main__":
    main()
