"""OpenAI's completions: what a request may say, and what an answer looks like."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Optional, Union

# Each token's text is looked through for the beginning of each stop string.
STOPS, STOP_LENGTH = 16, 256


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, or None.
    """

    def __init__(self, message: str, param: Optional[str] = None, status: int = 400):
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return error_body(str(self), kind, self.param)


def error_body(message: str, kind: str, param: Optional[str] = None) -> dict:
    """Return an error as OpenAI's clients read it."""
    param = None if param is None else _encodable(param)
    return {"error": {"message": _encodable(message), "type": kind, "param": param, "code": None}}


def _encodable(text: str) -> str:
    """Return a text with halves of surrogate pairs, which JSON may bring, written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x) -> bool:
    return _is_int(x) or (isinstance(x, float) and math.isfinite(x))


def _is_tokens(x) -> bool:
    return isinstance(x, list) and bool(x) and all(map(_is_int, x))


def _is_prompt(x) -> bool:
    if isinstance(x, str) or _is_tokens(x):
        return True
    if not isinstance(x, list) or not x:
        return False
    return all(isinstance(part, str) for part in x) or all(map(_is_tokens, x))


def _is_stop(x) -> bool:
    if isinstance(x, str):
        return 1 <= len(x) <= STOP_LENGTH
    return (
        isinstance(x, list)
        and len(x) <= STOPS
        and all(isinstance(s, str) and 1 <= len(s) <= STOP_LENGTH for s in x)
    )


def _is_stream_options(x) -> bool:
    known = {"include_usage"}
    return isinstance(x, dict) and set(x) <= known and all(isinstance(v, bool) for v in x.values())


@dataclass(frozen=True)
class Kind:
    """What a field may be."""

    holds: Callable[[Any], bool]
    expected: str


def _int(low: int, high: int) -> Kind:
    return Kind(lambda x: _is_int(x) and low <= x <= high, f"an integer from {low} to {high}")


def _number(low: float, high: float) -> Kind:
    return Kind(lambda x: _is_number(x) and low <= x <= high, f"a number from {low} to {high}")


FLAG = Kind(lambda x: isinstance(x, bool), "true or false")
KINDS = {
    "prompt": Kind(
        _is_prompt,
        "a string, a list of strings, a list of tokens or a list of such lists, not empty",
    ),
    "model": Kind(lambda x: isinstance(x, str), "a string"),
    "max_tokens": _int(1, 1 << 30),
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _int(-1, 1 << 30),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "n": _int(1, 128),
    "seed": _int(-(1 << 63), (1 << 63) - 1),
    "stop": Kind(
        _is_stop, f"a string or a list of at most {STOPS}, of 1 to {STOP_LENGTH} characters each"
    ),
    "stream": FLAG,
    "stream_options": Kind(_is_stream_options, 'an object such as {"include_usage": true}'),
    "ignore_eos": FLAG,
    "return_token_ids": FLAG,
    "user": Kind(lambda x: isinstance(x, str), "a string"),
}
# Of OpenAI's fields those that are not done, with the values that ask for nothing.
NOT_DONE = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (0,),
    "presence_penalty": (0,),
    "suffix": ("",),
}


@dataclass
class CompletionRequest:
    """A request of ``/v1/completions``, with OpenAI's defaults.

    Beyond OpenAI's: ``top_k`` (0 or -1: all tokens), ``min_p``, ``repetition_penalty``;
    ``ignore_eos``, to generate ``max_tokens`` in any case; ``return_token_ids``, to have
    ``token_ids`` beside the text.
    """

    prompt: Union[str, list]
    model: Optional[str] = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    seed: Optional[int] = None
    stop: Union[str, list[str]] = field(default_factory=list)
    stream: bool = False
    stream_options: dict = field(default_factory=dict)
    ignore_eos: bool = False
    return_token_ids: bool = False
    user: str = ""

    @property
    def prompts(self) -> list[Union[str, list[int]]]:
        """One or several prompts, each a string or tokens."""
        if isinstance(self.prompt, str) or _is_tokens(self.prompt):
            return [self.prompt]
        return self.prompt

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return self.stream_options.get("include_usage", False)


def _check_field(name: str, value: Any) -> None:
    if name in NOT_DONE:
        if value not in NOT_DONE[name]:
            raise RequestError(f"{name} is not supported, got {json.dumps(value)[:80]}", name)
        return
    if name not in KINDS:
        raise RequestError(f"{name[:80]} is no field of a completion request", name[:80])
    if not KINDS[name].holds(value):
        got = json.dumps(value)[:80]
        raise RequestError(f"{name} must be {KINDS[name].expected}, got {got}", name)


def parse(body: bytes) -> CompletionRequest:
    """Read a request.

    Raises:
        RequestError: it is no JSON object, or a field is unknown, wrong or missing; the message
            names it.
    """
    try:
        given = json.loads(body)
    except ValueError as error:  # of the text's encoding, too
        raise RequestError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise RequestError("the body is not JSON that can be read: it is nested too deep") from None
    if not isinstance(given, dict):
        raise RequestError(f"the body must be a JSON object, got {json.dumps(given)[:80]}")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        _check_field(name, value)
    if "prompt" not in given:
        raise RequestError("prompt is missing", "prompt")
    if given.get("stream_options") and not given.get("stream"):
        raise RequestError("stream_options needs stream to be true", "stream_options")
    known = {each.name for each in fields(CompletionRequest)}
    return CompletionRequest(**{name: value for name, value in given.items() if name in known})


class Answer:
    """The JSON objects of one request's answer."""

    def __init__(self, model: str):
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        self._head.update(created=int(time.time()), model=model)

    def of(self, choices: list[dict], usage: Optional[dict] = None) -> dict:
        """Return the answer, or a part of a stream."""
        return {**self._head, "choices": choices, **({"usage": usage} if usage else {})}


def choice(index: int, text: str, finish_reason: Optional[str], token_ids=None) -> dict:
    """Return one of an answer's choices."""
    tokens = {} if token_ids is None else {"token_ids": token_ids}
    head = {"index": index, "text": text, "logprobs": None}
    return {**head, "finish_reason": finish_reason, **tokens}


def usage(generations) -> dict:
    """Return how many tokens there were; each prompt counts once, whatever ``n``."""
    # Of a prompt's choices the first brought it; the others found all of it.
    prompts = {id(g.prompt): g for g in reversed(generations)}.values()
    num_prompt = sum(len(g.prompt) for g in prompts)
    num_new = sum(len(g.new_tokens) for g in generations)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(g.num_reused or 0 for g in prompts)},
    }
