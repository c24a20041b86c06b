"""The server over a socket: its answers, its refusals, and clients that go."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from dataclasses import dataclass, field

import httpx
import pytest
import torch
from serving_cases import (
    VOCAB,
    make_scheduler,
    reference,
    serving,
    tiny_model,
    tiny_tokenizer,
    until,
)

BLOCKS = 48


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Gate(torch.nn.Module):
    """A model that waits, or fails, as a test says."""

    takes_packed_tokens = True

    def __init__(self, model):
        super().__init__()
        self.model, self.opens, self.fails = model, threading.Event(), False
        self.opens.set()

    def forward(self, input_ids, **options):
        assert self.opens.wait(30)
        if self.fails:
            raise RuntimeError("out of memory")
        return self.model(input_ids, **options)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    """A server whose cache is too small for all that it is asked at once."""
    sizes = {"num_blocks": BLOCKS, "max_running": 16, "max_step_tokens": 64}
    scheduler = make_scheduler(Gate(model), **sizes)
    with serving(scheduler, tokenizer, max_waiting=100) as server:
        yield server


@pytest.fixture
def url(server):
    url, engine = server
    yield url
    until(lambda: engine.scheduler.cache.num_free_blocks == BLOCKS)


def post(url, **body):
    return httpx.post(f"{url}/v1/completions", json=body, timeout=30)


def sse(lines):
    """The objects of a stream of server-sent events."""
    data = [line[6:] for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return list(map(json.loads, data[:-1]))


def streamed(url, **body):
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return sse(response.iter_lines())


# ---------------------------------------------------------------------------------- load


def text_after(tokenizer, prompt, tokens):
    """What tokens add to a prompt's text; a prompt may end in a part of a character."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole[len(before if whole.startswith(before) else before.rstrip("\ufffd")) :]


@dataclass
class Client:
    """One of many: what it asks, and what it got."""

    prompt: list[int]
    max_tokens: int
    streams: bool
    goes_after: int = 0  # events; 0: it stays
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""

    @property
    def body(self) -> dict:
        asked = {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0}
        return {**asked, "stream": self.streams, "return_token_ids": True}

    def take(self, part: dict) -> None:
        (choice,) = part["choices"]
        self.tokens += choice["token_ids"]
        self.text += choice["text"]
        self.finish_reason = choice["finish_reason"] or self.finish_reason


def clients_of_all_kinds(count: int) -> list[Client]:
    """Short and long prompts, some with a common beginning, a quarter of them gone early."""
    draw = random.Random(0)
    common = [draw.randrange(1, VOCAB) for _ in range(24)]
    made = []
    for i in range(count):
        own = [draw.randrange(1, VOCAB) for _ in range(draw.choice([1, 3, 8, 20, 60]))]
        goes = draw.randrange(1, 6) if i % 4 == 3 else 0
        prompt = common + own if i % 3 == 0 else own
        made.append(Client(prompt, draw.randrange(8, 24), bool(goes) or i % 2 == 0, goes))
    return made


async def ask(http: httpx.AsyncClient, client: Client, delay: float) -> None:
    await asyncio.sleep(delay)
    if not client.streams:
        response = await http.post("/v1/completions", json=client.body)
        assert response.status_code == 200, response.text
        client.take(response.json())
        return
    events = 0
    async with http.stream("POST", "/v1/completions", json=client.body) as response:
        assert response.status_code == 200
        lines = []
        async for line in response.aiter_lines():
            lines.append(line)
            events += line.startswith("data: ")
            if events == client.goes_after:
                return  # closes the connection
        for part in sse(lines):
            client.take(part)


def test_load(server, url, model, tokenizer):
    """64 clients at once: each answer is that of its prompt alone, and every block comes back."""
    clients, engine = clients_of_all_kinds(64), server[1]
    before = vars(engine.scheduler.counts).copy()
    gate = engine.scheduler.model
    gate.opens.clear()

    async def open_gate():
        """Let the first step begin when most are there, so that blocks run out on any machine."""
        while engine.num_waiting + len(engine.scheduler.running) < 48:
            await asyncio.sleep(0.01)
        gate.opens.set()

    async def all_of_them():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            asked = [ask(http, c, 0.0 if i < 48 else 0.01 * i) for i, c in enumerate(clients)]
            await asyncio.gather(*asked, open_gate())

    asyncio.run(all_of_them())
    stayed = [c for c in clients if not c.goes_after]
    for client in stayed:
        expected = reference(model, client.prompt, client.max_tokens)
        assert client.tokens == expected
        assert client.text == text_after(tokenizer, client.prompt, expected)
        assert client.finish_reason == "length"
    until(lambda: not engine.scheduler.has_work)
    counts = {name: n - before[name] for name, n in vars(engine.scheduler.counts).items()}
    assert counts["finished"] + counts["cancelled"] == len(clients) > counts["finished"]
    assert counts["failed"] == 0 and counts["finished"] >= len(stayed)
    # It was tight, and common beginnings went through the model once.
    assert counts["preemptions"] > 0
    assert counts["reused_tokens"] > 0
    assert engine.scheduler.cache.num_free_blocks == BLOCKS


def test_client_that_goes_while_it_waits_for_the_whole(server, url):
    """Blocks of an answer that nobody reads are free at once, not when it would be done."""
    scheduler = server[1].scheduler
    cancelled = scheduler.counts.cancelled
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": [5] * 9, "max_tokens": 180, "temperature": 0}
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.05)
    until(lambda: scheduler.counts.cancelled == cancelled + 1)
    assert scheduler.cache.num_free_blocks == BLOCKS


# ------------------------------------------------------------------------------- answers


def test_answer(url, model, tokenizer):
    prompt = tokenizer.encode("the cache of").ids
    expected = reference(model, prompt, 10)
    response = post(url, model="tiny", prompt="the cache of", max_tokens=10, temperature=0)
    answer = response.json()
    assert response.status_code == 200 and answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-") and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["text"] == tokenizer.decode(expected) and choice["index"] == 0
    assert choice["finish_reason"] == "length" and "token_ids" not in choice
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(prompt) and usage["completion_tokens"] == 10
    assert usage["total_tokens"] == len(prompt) + 10


def test_reused_tokens_are_those_found_by_the_first_choice(model, tokenizer):
    with serving(make_scheduler(model), tokenizer) as (url, _):
        body = {"prompt": [[9] * 10, [8] * 6], "max_tokens": 2, "n": 3, "temperature": 0}
        reused = [post(url, **body).json()["usage"]["prompt_tokens_details"] for _ in range(2)]
        # Blocks of 4 tokens; the last token of a prompt always goes through the model.
        assert [each["cached_tokens"] for each in reused] == [0, 8 + 4]


def test_stream_equals_the_whole(url):
    body = {"prompt": ["the cache", "of the"], "n": 2, "max_tokens": 12, "seed": 3}
    whole = post(url, **body).json()["choices"]
    parts = streamed(url, **body, stream_options={"include_usage": True})
    assert len({part["id"] for part in parts}) == 1
    texts = ["", "", "", ""]
    for part in parts[:-1]:
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert texts == [choice["text"] for choice in whole] and len(set(texts)) == 4
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 48
    again = post(url, **{**body, "prompt": "of the"}).json()["choices"]
    assert [choice["text"] for choice in again] != texts[2:]  # choice i has seed + i
    assert post(url, **{**body, "seed": 4}).json()["choices"] != whole


def test_stop(url, model, tokenizer):
    """Text ends before the first stop string, whether it comes in one token or in several."""
    prompt = tokenizer.encode("the cache of").ids
    text = tokenizer.decode(reference(model, prompt, 20))
    stop = text[7:9]
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "stop": ["\x00\x01", stop]}
    (choice,) = post(url, **body).json()["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    parts = streamed(url, **body)
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_stop_tokens_of_the_model(model, tokenizer):
    free = reference(model, [3, 4, 5], 12)
    with serving(make_scheduler(model), tokenizer, stop_tokens=[free[5]]) as (url, _):
        body = {"prompt": [3, 4, 5], "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        (choice,) = post(url, **body).json()["choices"]
        end = free.index(free[5]) + 1
        assert choice["token_ids"] == free[:end] and choice["finish_reason"] == "stop"
        (choice,) = post(url, **body, ignore_eos=True).json()["choices"]
        assert choice["token_ids"] == free and choice["finish_reason"] == "length"


def test_sampling_options(url, model):
    """Options that leave one token to draw from choose the greedy one."""
    expected = reference(model, [9, 8, 7], 8)
    body = {"prompt": [9, 8, 7], "max_tokens": 8, "return_token_ids": True}
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        (choice,) = post(url, **body, **options).json()["choices"]
        assert choice["token_ids"] == expected, options
    (choice,) = post(url, **body, seed=1, temperature=5.0, top_k=-1).json()["choices"]
    assert choice["token_ids"] != expected


def test_other_pages(server, url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["max_model_len"] == 4 * BLOCKS + 1
    post(url, prompt=[1, 2, 3], max_tokens=4)
    text = httpx.get(f"{url}/metrics").text
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    counts = server[1].scheduler.counts
    assert int(values["flash_attn_serve_cache_blocks"]) == BLOCKS
    assert int(values["flash_attn_serve_new_tokens_total"]) == counts.new_tokens > 0
    assert "# TYPE flash_attn_serve_new_tokens_total counter" in text
    assert httpx.get(f"{url}/v1/completions").status_code == 405
    assert httpx.get(f"{url}/nothing").status_code == 404


# ------------------------------------------------------------------------------ refusals

WRONG = [
    ({}, "prompt", "prompt is missing"),
    ({"prompt": ""}, "prompt", "prompt has no token"),
    ({"prompt": []}, "prompt", "prompt must be a string"),
    ({"prompt": 7}, "prompt", "prompt must be a string"),
    ({"prompt": [1, "a"]}, "prompt", "prompt must be a string"),
    ({"prompt": [[1], []]}, "prompt", "prompt must be a string"),
    ({"prompt": [1, VOCAB]}, "prompt", f"prompt has token {VOCAB}"),
    ({"prompt": [-1]}, "prompt", "prompt has token -1"),
    ({"prompt": "\ud800"}, "prompt", "prompt is not valid Unicode"),
    ({"prompt": ["a"] * 60, "n": 2}, "prompt", "prompt and n ask for 120 sequences, at most 100"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "max_tokens must be an integer from 1"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens must be an integer from 1"),
    ({"prompt": "a", "max_tokens": 2.5}, "max_tokens", "max_tokens must be an integer from 1"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "max_tokens must be an integer from 1"),
    ({"prompt": "a", "temperature": -0.1}, "temperature", "temperature must be a number from 0"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", "temperature must be a number from 0"),
    ({"prompt": "a", "top_p": 1.1}, "top_p", "top_p must be a number from 0 to 1, got 1.1"),
    ({"prompt": "a", "top_k": -2}, "top_k", "top_k must be an integer from -1"),
    ({"prompt": "a", "min_p": 2}, "min_p", "min_p must be a number from 0 to 1, got 2"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "must be a number from 0.01"),
    ({"prompt": "a", "n": 0}, "n", "n must be an integer from 1 to 128, got 0"),
    ({"prompt": "a", "seed": 1 << 64}, "seed", "seed must be an integer"),
    ({"prompt": "a", "stop": ["x", ""]}, "stop", "stop must be a string or a list"),
    ({"prompt": "a", "stop": "x" * 257}, "stop", "of 1 to 256 characters each, got"),
    ({"prompt": "a", "stop": ["b", "x" * 257]}, "stop", "of 1 to 256 characters each, got"),
    ({"prompt": "a", "stop": ["b"] * 17}, "stop", "a list of at most 16"),
    ({"prompt": "a", "temperature": 10**400}, "temperature", "must be a number from 0 to 100"),
    ({"prompt": "a", "min_p": -(10**400)}, "min_p", "must be a number from 0 to 1"),
    ({"prompt": "a", "presence_penalty": 10**400}, "presence_penalty", "is not supported"),
    ({"prompt": "a", "\ud800": 1}, "\\ud800", "\\ud800 is no field"),
    ({"prompt": "a", "x" * 100_000: 1}, "x" * 80, "xxx is no field"),
    ({"prompt": "a", "user": ["\ud800"]}, "user", "user must be a string"),
    ({"prompt": "a", "suffix": "\ud800"}, "suffix", "suffix is not supported"),
    ({"prompt": "a", "stream": 1}, "stream", "stream must be true or false, got 1"),
    ({"prompt": "a", "stream_options": {"x": True}, "stream": True}, "stream_options", "an object"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"prompt": "a", "logprobs": 3}, "logprobs", "logprobs is not supported, got 3"),
    ({"prompt": "a", "echo": True}, "echo", "echo is not supported, got true"),
    ({"prompt": "a", "max_token": 5}, "max_token", "max_token is no field"),
]


@pytest.mark.parametrize(("body", "param", "message"), WRONG)
def test_wrong_fields(url, body, param, message):
    response = httpx.post(f"{url}/v1/completions", content=json.dumps(body))
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param
    assert message in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b'{"prompt": "a"', "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'["a"]', 'the body must be a JSON object, got ["a"]'),
        (b'{"prompt": "a", "temperature": NaN}', "temperature must be a number"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "the body is not JSON"),
    ],
)
def test_malformed_bodies(url, body, message):
    response = httpx.post(f"{url}/v1/completions", content=body)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_null_is_no_value(url):
    """Clients send it for what was not set."""
    assert post(url, prompt="a", max_tokens=2, stop=None, logprobs=None, n=None).status_code == 200


def test_longer_than_the_cache(url):
    """Refused, not truncated; one token less is served whole."""
    room = 4 * BLOCKS
    body = {"prompt": [7] * (room - 4), "temperature": 0, "return_token_ids": True}
    for streams in (False, True):
        response = post(url, **body, max_tokens=6, stream=streams)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == (
            f"{room - 4} tokens of the prompt and 6 new ones (max_tokens) exceed the {room + 1} "
            "that a sequence can have"
        )
    (choice,) = post(url, **body, max_tokens=5).json()["choices"]
    assert len(choice["token_ids"]) == 5


def test_unknown_model(url):
    response = post(url, prompt="a", model="large")
    assert response.status_code == 404 and response.json()["error"]["param"] == "model"


def test_large_body(url):
    response = httpx.post(f"{url}/v1/completions", content=b" " * ((4 << 20) + 1))
    assert response.status_code == 413


# ---------------------------------------------------------------------------- in trouble


def test_too_many_wait(model, tokenizer):
    gate = Gate(model)
    gate.opens.clear()
    scheduler = make_scheduler(gate, max_running=1)
    with serving(scheduler, tokenizer, max_waiting=2) as (url, engine):
        body, answers = {"prompt": [1, 2], "max_tokens": 2}, []
        threads = [
            threading.Thread(target=lambda: answers.append(post(url, **body))) for _ in range(3)
        ]
        for i, thread in enumerate(threads):
            thread.start()
            until(lambda i=i: len(scheduler.running) == 1 and engine.num_waiting == i)
        refused = post(url, **body)
        gate.opens.set()
        for thread in threads:
            thread.join()
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert [answer.status_code for answer in answers] == [200] * 3


def test_failing_model(model, tokenizer):
    """Its clients hear of it, in the stream too; the server lives on."""
    gate = Gate(model)
    gate.fails = True
    with serving(make_scheduler(gate), tokenizer) as (url, engine):
        response = post(url, prompt=[1, 2])
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "out of memory"
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={"prompt": [1], "stream": True}
        ) as response:
            (line,) = filter(None, response.iter_lines())
        assert json.loads(line[6:])["error"]["message"] == "out of memory"
        gate.fails = False
        assert post(url, prompt=[1, 2]).status_code == 200
        assert engine.scheduler.cache.num_free_blocks == 64


def test_temperatures_of_all_sizes(url, model):
    """Also those whose inverse, or whose value, is none of fp32."""
    expected = reference(model, [9, 8, 7], 4)
    body = {"prompt": [9, 8, 7], "max_tokens": 4, "return_token_ids": True}
    for temperature in (1e-20, 1e-38, 1e-40, 1e-60, 5e-324):
        (choice,) = post(url, **body, temperature=temperature).json()["choices"]
        assert choice["token_ids"] == expected, temperature


class Watched:
    """A tokenizer that notes whether others run while it encodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.ran = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts):
        done = threading.Event()

        def count():
            while not done.wait(0.001):
                self.ran += 1

        thread = threading.Thread(target=count)
        thread.start()
        try:
            return self._tokenizer.encode_batch(texts)
        finally:
            done.set()
            thread.join()


def test_others_run_while_a_long_prompt_is_encoded(model, tokenizer):
    watched = Watched(tokenizer)
    with serving(make_scheduler(model), watched) as (url, _):
        response = post(url, prompt="the cache of the model " * 20_000)
    assert response.status_code == 400 and "exceed" in response.json()["error"]["message"]
    # It takes some 100 ms, in which a thread that the tokenizer kept waiting would not wake once.
    assert watched.ran >= 5
