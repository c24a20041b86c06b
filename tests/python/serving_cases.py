"""A tiny model, its tokenizer, and a server of it for tests, over a real socket."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager

import torch
import uvicorn
from scripts import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config

from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.utils.paged_cache import PagedKVCache

INFERENCE = ROOT / "examples" / "inference"
if str(INFERENCE) not in sys.path:
    sys.path.append(str(INFERENCE))

from serving.app import Served, make_app  # noqa: E402
from serving.engine import Engine  # noqa: E402
from serving.generation import Generation  # noqa: E402
from serving.scheduler import Scheduler  # noqa: E402
from serving.text import StopText, TokenText  # noqa: E402

from flash_attn.utils.generation import Sampling  # noqa: E402

VOCAB = 320
# Between the two likeliest tokens: logits are below 16, and sums in another order move them by some
# units of 2^-21, 5e-7.
GAP = 1e-4


def tiny_model(seed: int = 0) -> GPTLMHeadModel:
    """A GPT whose greedy choices are clear: its logits are spread widely."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=0,
        n_embd=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.rotary_emb_fraction, config.n_head_kv = 1.0, 2
    model = GPTLMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embeddings" in name else 0.3)
    return model


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE with all bytes and a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the cache of the model has the keys of the tokens"] * 3, trainer
    )
    return tokenizer


@torch.inference_mode()
def reference(model, prompt: list[int], max_tokens: int, stop=()) -> list[int]:
    """Greedy tokens after a prompt without any cache, one sequence alone; each choice is clear."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        (first, second), places = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        assert first - second > GAP, "take another seed: the reference itself is in doubt"
        tokens.append(int(places[0]))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def generation(tokenizer, prompt, max_tokens, *, index=0, stop=(), stop_tokens=(), **sampling):
    """A generation for a scheduler that is driven by hand."""
    return Generation(
        index=index,
        prompt=list(prompt),
        max_tokens=max_tokens,
        sampling=Sampling(**sampling),
        text=TokenText(tokenizer),
        stop_text=StopText(list(stop)),
        stop_tokens=frozenset(stop_tokens),
    )


def make_scheduler(model, num_blocks=64, block_size=4, **options) -> Scheduler:
    options = {"max_running": 8, "max_step_tokens": 32, "vocab_size": VOCAB, **options}
    return Scheduler(model, PagedKVCache.for_model(model, num_blocks, block_size), **options)


def run(scheduler: Scheduler) -> list:
    """Step until nothing is left; return all events."""
    events = []
    while scheduler.has_work:
        events += scheduler.step()
        assert scheduler.counts.steps < 10_000
    return events


@contextmanager
def serving(scheduler: Scheduler, tokenizer: Tokenizer, stop_tokens=(), max_waiting=256):
    """A server on a free port of this machine: ``(url, engine)``."""
    engine = Engine(scheduler, max_waiting)
    served = Served(engine, tokenizer, "tiny", VOCAB, frozenset(stop_tokens))
    config = uvicorn.Config(make_app(served), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        thread.join()


def until(holds, seconds: float = 20.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
