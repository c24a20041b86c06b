"""Serve a language model over HTTP, with OpenAI's completions.

    python examples/inference/serve.py FOLDER            # of Hugging Face's layout
    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"prompt": "import", "max_tokens": 32, "temperature": 0}'

Requests join the batch at any step (continuous batching). Keys and values lie in blocks of a paged
cache, which requests that begin alike share. README.md beside this file says more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import uvicorn
from checkpoint import DTYPES, Checkpoint, load_or_exit
from serving.app import Served, make_app
from serving.engine import Engine
from serving.scheduler import Scheduler
from tiny_checkpoint import folder_or_tiny

from flash_attn.utils.paged_cache import PagedKVCache


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="default: a tiny model, trained first")
    parser.add_argument("--name", help="of the model, for clients; default: the folder's")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache-tokens", type=int, default=16384, help="room for all sequences")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a cache's block")
    parser.add_argument("--max-running", type=int, default=64, help="sequences of a step")
    parser.add_argument("--max-step-tokens", type=int, default=512, help="tokens of a step")
    parser.add_argument("--max-waiting", type=int, default=1024, help="sequences that may wait")
    parser.add_argument("--grace", type=int, default=30, help="seconds to end requests at shutdown")
    return parser.parse_args(arguments)


def served_of(checkpoint: Checkpoint, name: str, options: argparse.Namespace) -> Served:
    """Return what the application serves."""
    num_blocks = options.cache_tokens // max(options.block_size, 1)  # 0 is refused below
    # The last token of a sequence needs no place in the cache.
    most = None if checkpoint.max_seqlen is None else checkpoint.max_seqlen - 1
    limit = {} if most is None else {"max_seqlen": most}
    cache = PagedKVCache.for_model(checkpoint.model, num_blocks, options.block_size, **limit)
    scheduler = Scheduler(
        checkpoint.model,
        cache,
        max_running=options.max_running,
        max_step_tokens=options.max_step_tokens,
        vocab_size=checkpoint.vocab_size,
    )
    return Served(
        engine=Engine(scheduler, options.max_waiting),
        tokenizer=checkpoint.tokenizer,
        name=name,
        vocab_size=checkpoint.vocab_size,
        stop_tokens=checkpoint.stop_tokens,
    )


def main() -> None:
    options = parse_arguments()
    folder = folder_or_tiny(options.folder)
    checkpoint = load_or_exit(folder, options.dtype, options.device)
    try:
        served = served_of(checkpoint, options.name or folder.resolve().name, options)
    except ValueError as error:  # an option out of range
        raise SystemExit(f"serve.py: {error}") from None
    # At SIGTERM or control-C it takes no more connections and ends what runs, or gives it up.
    uvicorn.run(
        make_app(served),
        host=options.host,
        port=options.port,
        timeout_graceful_shutdown=options.grace,
    )


if __name__ == "__main__":
    main()
