"""The HTTP side: OpenAI's /v1/completions and /v1/models, /health, and /metrics for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

from flash_attn.utils.generation import Sampling
from serving.engine import BusyError, Completion, Engine, EngineClosedError
from serving.generation import Generation
from serving.protocol import (
    Answer,
    CompletionRequest,
    RequestError,
    choice,
    error_body,
    parse,
    usage,
)
from serving.text import StopText, TokenText

# Bytes. The whole process waits for json.loads, which takes some 10 ms for each 2^20.
MAX_BODY = 4 << 20


@dataclass
class Served:
    """What is served.

    Attributes:
        engine: generates.
        tokenizer: of the model.
        name: of the model, for clients.
        vocab_size: tokens that there are.
        stop_tokens: that end a sequence.
    """

    engine: Engine
    tokenizer: Tokenizer
    name: str
    vocab_size: int
    stop_tokens: frozenset[int] = frozenset()


async def _body(request: Request) -> bytes:
    """Return the body.

    Raises:
        RequestError: it is too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RequestError(f"the body has more than {MAX_BODY} bytes", status=413)
    return bytes(body)


def _encoded(served: Served, prompt) -> list[int]:
    """Return a prompt's tokens.

    Raises:
        RequestError: there is none, or one that the model does not have.
    """
    if isinstance(prompt, str):
        try:
            # Unlike encode, it lets other threads run.
            tokens = served.tokenizer.encode_batch([prompt])[0].ids
        except (UnicodeError, TypeError):  # halves of surrogate pairs are valid JSON
            raise RequestError("prompt is not valid Unicode", "prompt") from None
    else:
        tokens = prompt
    if not tokens:
        raise RequestError("prompt has no token", "prompt")
    wrong = next((t for t in tokens if not 0 <= t < served.vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"prompt has token {wrong}, the model those from 0 to {served.vocab_size - 1}", "prompt"
        )
    return tokens


def _sampling(request: CompletionRequest, index: int) -> Sampling:
    generator = None
    if request.temperature > 0.0:
        generator = torch.Generator()
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed((request.seed + index) % (1 << 63))
    return Sampling(
        top_k=max(request.top_k, 0),
        top_p=request.top_p,
        temperature=request.temperature,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        generator=generator,
    )


def _generations(served: Served, request: CompletionRequest) -> list[list[Generation]]:
    """Return what is to be generated, for each prompt its choices."""
    prompts = []
    asked, most = len(request.prompts) * request.n, served.engine.max_waiting
    if asked > most:
        raise RequestError(
            f"prompt and n ask for {asked} sequences, at most {most} at once are served", "prompt"
        )
    for i, prompt in enumerate(request.prompts):
        tokens = _encoded(served, prompt)
        indices = range(i * request.n, (i + 1) * request.n)
        prompts.append(
            [
                Generation(
                    index=index,
                    prompt=tokens,
                    max_tokens=request.max_tokens,
                    sampling=_sampling(request, index),
                    text=TokenText(served.tokenizer, tokens),
                    stop_text=StopText(request.stops),
                    stop_tokens=frozenset() if request.ignore_eos else served.stop_tokens,
                )
                for index in indices
            ]
        )
    return prompts


async def _submitted(served: Served, request: CompletionRequest) -> Completion:
    if request.model is not None and request.model != served.name:
        raise RequestError(
            f"model {request.model!r:.80} is not here, {served.name!r} is", "model", status=404
        )
    # Long prompts take a while to encode, and others wait for the event loop.
    prompts = await asyncio.to_thread(_generations, served, request)
    try:
        return served.engine.submit(prompts)
    except ValueError as error:
        raise RequestError(str(error), "max_tokens") from None
    except (BusyError, EngineClosedError) as error:
        raise RequestError(str(error), status=503) from None


async def _gathered(completion: Completion) -> list[list]:
    """Return text and finish reason of each choice when all are done."""
    choices = [["", None] for _ in completion.generations]
    async for event in completion.events():
        state = choices[event.generation.index]
        state[0] += event.text
        state[1] = event.finish_reason
    return choices


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(
    served: Served, request: CompletionRequest, completion: Completion, http: Request
) -> Response:
    """Answer when all is generated, unless the client goes before."""
    answer = asyncio.ensure_future(_gathered(completion))
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)  # nobody reads it
        try:
            choices = answer.result()
        except Exception as error:
            status = 503 if isinstance(error, EngineClosedError) else 500
            return JSONResponse(error_body(str(error), "server_error"), status_code=status)
    finally:
        answer.cancel()
        gone.cancel()
        served.engine.cancel(completion)
    generations = completion.generations
    with_ids = request.return_token_ids
    made = [
        choice(g.index, text, reason, g.new_tokens if with_ids else None)
        for g, (text, reason) in zip(generations, choices)
    ]
    return JSONResponse(Answer(served.name).of(made, usage(generations)))


def _sse(data: dict | str) -> str:
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n"


async def _parts(
    served: Served, request: CompletionRequest, completion: Completion
) -> AsyncIterator[str]:
    """Yield server-sent events: a part of a choice each, at the end ``[DONE]``."""
    answer = Answer(served.name)
    try:
        async for event in completion.events():
            if event.text or event.finish_reason or request.return_token_ids:
                ids = [event.token] if request.return_token_ids else None
                part = choice(event.generation.index, event.text, event.finish_reason, ids)
                yield _sse(answer.of([part]))
    except Exception as error:
        yield _sse(error_body(str(error), "server_error"))
        return
    if request.includes_usage:
        yield _sse(answer.of([], usage(completion.generations)))
    yield _sse("[DONE]")


class _EventStream(StreamingResponse):
    """Server-sent events; whatever ends them ends the generation."""

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncIterator[str], engine: Engine, completion: Completion):
        super().__init__(parts, headers={"cache-control": "no-cache"})
        self._engine, self._completion = engine, completion

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine.cancel(self._completion)


def _metrics(engine: Engine) -> str:
    """Return figures in Prometheus' text format."""
    scheduler, counts = engine.scheduler, engine.scheduler.counts
    cache = scheduler.cache
    rows = [
        ("running", "gauge", "sequences that go through the model", len(scheduler.running)),
        ("waiting", "gauge", "sequences that wait for their turn", engine.num_waiting),
        ("cache_blocks", "gauge", "blocks of the cache", cache.num_blocks),
        ("cache_blocks_free", "gauge", "blocks that no sequence holds", cache.num_free_blocks),
        ("steps_total", "counter", "calls of the model", counts.steps),
        ("busy_seconds_total", "counter", "time of these steps", engine.busy_seconds),
        ("prompt_tokens_total", "counter", "tokens of prompts", counts.prompt_tokens),
        ("reused_tokens_total", "counter", "of these found in the cache", counts.reused_tokens),
        ("new_tokens_total", "counter", "tokens generated", counts.new_tokens),
        ("preemptions_total", "counter", "sequences that gave blocks back", counts.preemptions),
        ("finished_total", "counter", "sequences done", counts.finished),
        ("cancelled_total", "counter", "sequences whose client went", counts.cancelled),
        ("failed_total", "counter", "sequences that met an error", counts.failed),
    ]
    lines = []
    for name, kind, text, value in rows:
        name = f"flash_attn_serve_{name}"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
    return "\n".join(lines) + "\n"


def _routes(served: Served) -> list[Route]:
    engine = served.engine

    async def completions(http: Request) -> Response:
        try:
            # A long body takes a while, and others wait for the event loop.
            request = await asyncio.to_thread(parse, await _body(http))
            completion = await _submitted(served, request)
        except RequestError as error:
            retry = {"retry-after": "1"} if error.status == 503 else None
            return JSONResponse(error.body(), status_code=error.status, headers=retry)
        except ClientDisconnect:
            return Response(status_code=499)
        if request.stream:
            return _EventStream(_parts(served, request, completion), engine, completion)
        return await _whole(served, request, completion, http)

    async def models(http: Request) -> Response:
        model = {"id": served.name, "object": "model", "owned_by": "local", "created": 0}
        # The last token of a sequence needs no place in the cache.
        model["max_model_len"] = engine.scheduler.cache.max_seqlen + 1
        return JSONResponse({"object": "list", "data": [model]})

    async def health(http: Request) -> Response:
        if engine.is_open:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "closed"}, status_code=503)

    async def metrics(http: Request) -> Response:
        return PlainTextResponse(_metrics(engine), media_type="text/plain; version=0.0.4")

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]


def make_app(served: Served) -> Starlette:
    """Return the application; its engine runs from its start to its end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        served.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(served.engine.close)

    return Starlette(routes=_routes(served), lifespan=lifespan)
