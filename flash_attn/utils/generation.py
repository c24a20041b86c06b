"""Generation with a model that keeps a cache of keys and values.

A model is called as ``model(input_ids, position_ids=None, inference_params=None,
num_last_tokens=0)`` and returns an object with ``logits`` ``(batch, seqlen, vocab)``, of the last
``num_last_tokens`` tokens where that is not 0; ``inference_params`` is an ``InferenceParams``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Callable, Optional, Union

import torch
from torch import Tensor, nn

from flash_attn.utils._cuda_graphs import DecodingCGCache, capture_graph, update_graph_cache
from flash_attn.utils._decoding import Cached, Decoding, assembled
from flash_attn.utils._generated import DecoderOnlyOutput, as_output, stream_to, timing
from flash_attn.utils._inference_params import InferenceParams, Packing
from flash_attn.utils._prompts import Prompts, Request, check_names, make_request
from flash_attn.utils._sampling import (
    Sampling,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)
from flash_attn.utils._speculative import checked_lookahead, sample_speculative, speculate
from flash_attn.utils.distributed import group_size

__all__ = [
    "DecoderOnlyOutput",
    "DecodingCGCache",
    "GenerationMixin",
    "InferenceParams",
    "Packing",
    "Sampling",
    "allocate_inference_cache",
    "capture_graph",
    "decode",
    "decode_speculative",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "sample_speculative",
    "update_graph_cache",
]


def _check_group(model: nn.Module, tensor_parallel: int) -> None:
    size = group_size(getattr(model, "process_group", None))
    if tensor_parallel not in (1, size):
        raise ValueError(
            f"tensor_parallel ({tensor_parallel}) must be the size of the model's process_group "
            f"({size})"
        )


def _wants_graphs(cg: bool, device: torch.device) -> bool:
    if cg and device.type != "cuda":
        warnings.warn(
            f"cg=True has no effect on {device.type}: CUDA graphs need a GPU", stacklevel=2
        )
        return False
    return cg


def _cached(model, prompts: Prompts, request: Request, cg: bool, cache, tensor_parallel: int):
    """Return the model with a cache for a request."""
    if cache is not None:
        if cg:
            raise ValueError("cg does not go together with cache")
        from flash_attn.utils._paged_batch import PagedBatch

        return PagedBatch(model, cache, prompts, request.limits)
    graphs = None
    if _wants_graphs(cg, prompts.device):
        graphs = _graphs(model, prompts, request, (1,), tensor_parallel)
    return Cached(model, prompts, request.max_length, graphs)


def _graphs(
    model, prompts: Prompts, request: Request, seqlens: Sequence[int], tensor_parallel: int
) -> DecodingCGCache:
    """Return the graphs that a model keeps, made to fit a request."""
    model._decoding_cache = update_graph_cache(
        model,
        getattr(model, "_decoding_cache", None),
        len(prompts),
        prompts.longest,
        request.max_length,
        seqlens,
        tensor_parallel=tensor_parallel,
    )
    return model._decoding_cache


def _decoding(
    input_ids,
    model: nn.Module,
    max_length: Optional[int],
    sampling: Sampling,
    *,
    lengths=None,
    tensor_parallel: int = 1,
    cg: bool = False,
    cache=None,
    **options,
) -> tuple[Prompts, Decoding]:
    """Check a call of ``decode`` and prepare its steps."""
    prompts = Prompts(input_ids, lengths)
    request = make_request(model, prompts, max_length, sampling, **options)
    _check_group(model, tensor_parallel)
    cached = _cached(model, prompts, request, cg, cache, tensor_parallel)
    return prompts, Decoding(model, prompts, request, cached)


def _decode(*call, enable_timing: bool = False, streamer=None, keep_scores: bool = True, **options):
    """``decode`` without its output's class: ``(sequences, scores)``."""
    prompts, decoding = _decoding(*call, **options)
    if hasattr(streamer, "put"):  # a streamer of transformers awaits the prompt first
        streamer.put(prompts.padded(decoding.pad).cpu())
    steps = []
    with timing(enable_timing, prompts.device):
        for step in decoding:
            steps.append(step if keep_scores else step._replace(logits=None))
            stream_to(streamer, step.tokens)
    if hasattr(streamer, "end"):
        streamer.end()
    return assembled(prompts, steps, decoding.counts), tuple(step.logits for step in steps)


def _sampling(top_k, top_p, temperature, *args, **options) -> Sampling:
    """Return how tokens are chosen; warn the caller's caller, from one line once, of what
    has no effect."""
    sampling = Sampling(top_k, top_p, temperature, *args, **options)
    if sampling.top_k == 1 and sampling.temperature != 0.0:
        without_effect = {"temperature": (1.0,), "top_p": (0.0, 1.0), "min_p": (0.0,)}
        values = {name: getattr(sampling, name) for name in without_effect}
        given = [f"{n}={x}" for n, x in values.items() if x not in without_effect[n]]
        if given:
            warnings.warn(
                f"{', '.join(given)} without effect: top_k=1, the default, takes the most likely "
                "token; pass top_k=0 to draw from all tokens",
                stacklevel=3,
            )
    return sampling


def decode(
    input_ids: Union[Tensor, Sequence[Tensor]],
    model: nn.Module,
    max_length: Optional[int],
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: Union[int, Sequence[int], None] = None,
    teacher_outputs: Optional[Tensor] = None,
    vocab_size: Optional[int] = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
    *,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    generator: Optional[torch.Generator] = None,
    lengths: Optional[Union[Tensor, Sequence[int]]] = None,
    max_new_tokens: Optional[int] = None,
    pad_token_id: Optional[int] = None,
    streamer: Optional[Callable[[Tensor], object]] = None,
    cache=None,
):
    """Generate tokens after prompts, with a cache.

    Args:
        input_ids: int64 or int32 ``(batch, seqlen)``, or, for prompts of different lengths, a list
            of ``(seqlen,)``.
        model: described at the head of this module.
        max_length: tokens of each sequence, prompt and result together; None: ``max_new_tokens``.
        top_k: 1: take the most likely token; 0: draw from all; else from the ``top_k`` likeliest.
        top_p: draw from the likeliest tokens that have this probability together; 0: from all.
        temperature: logits are divided by it; 0: take the most likely token.
        eos_token_id: a token, or several, that ends a sequence. The others go on.
        teacher_outputs: int64 ``(batch, seqlen)``, sequences to follow where they have a token.
        vocab_size: how many logits are tokens, where the model has more; None: all.
        tensor_parallel: processes of the model's group. All return the tokens of the first.
        cg: whether to decode through CUDA graphs. On a CPU it has no effect but a warning.
        enable_timing: whether to print how long it took.
        min_p: draw from tokens that have this share of the likeliest one's probability.
        repetition_penalty: divides positive logits of tokens that a sequence has, multiplies
            negative ones; 1: none.
        generator: draws the random numbers; None: torch's default one.
        lengths: tokens of each row of ``(batch, seqlen)``; what is behind them is padding.
        max_new_tokens: tokens after each prompt, rather than ``max_length``.
        pad_token_id: what stands behind the end of a sequence while others go on; None: the first
            of ``eos_token_id``, else 0.
        streamer: called with the tokens of each step, int64 ``(batch,)`` on the CPU. One with
            ``put`` and ``end`` is a streamer of transformers, and gets the prompts first.
        cache: a ``flash_attn.utils.paged_cache.PagedKVCache`` to keep keys and values in, and to
            find those of prefixes that it has seen; None: memory of this call's own.

    Returns:
        transformers' ``GenerateDecoderOnlyOutput``, or without transformers an object like it:
        ``sequences``, int64 ``(batch, seqlen)``, for prompts of a list or with ``lengths`` a list
        of ``(seqlen,)`` without padding; ``scores``, for each new token the logits ``(batch,
        vocab)`` as the model gave them.

    Raises:
        ValueError: an argument is out of range, or the sequences get longer than the model or the
            cache has room for.
    """
    sampling = _sampling(top_k, top_p, temperature, min_p, repetition_penalty, generator)
    return as_output(
        *_decode(
            input_ids,
            model,
            max_length,
            sampling,
            lengths=lengths,
            tensor_parallel=tensor_parallel,
            cg=cg,
            cache=cache,
            enable_timing=enable_timing,
            streamer=streamer,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            teacher_outputs=teacher_outputs,
            vocab_size=vocab_size,
            max_new_tokens=max_new_tokens,
        )
    )


def decode_speculative(
    input_ids: Union[Tensor, Sequence[Tensor]],
    model: nn.Module,
    model_draft: nn.Module,
    max_length: Optional[int],
    speculative_lookahead: int = 3,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    eos_token_id: Union[int, Sequence[int], None] = None,
    vocab_size: Optional[int] = None,
    tensor_parallel: int = 1,
    cg: bool = False,
    enable_timing: bool = False,
    debug: bool = False,
    *,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    generator: Optional[torch.Generator] = None,
    lengths: Optional[Union[Tensor, Sequence[int]]] = None,
    max_new_tokens: Optional[int] = None,
    pad_token_id: Optional[int] = None,
    output_scores: bool = True,
):
    """Generate tokens as ``decode`` does, with fewer calls of the model: a small one drafts tokens,
    and the model looks at them in one call.

    Tokens have the distribution that they have without a draft; greedy ones are the same.

    Args:
        model_draft: like ``model``, with the same vocabulary.
        speculative_lookahead: tokens of a draft.
        debug: whether to print how many drafted tokens were kept.
        output_scores: whether to return ``scores``.

    The other arguments, the result and what is raised are those of ``decode``. The logits of a
    sequence that is over are 0.
    """
    lookahead = checked_lookahead(speculative_lookahead)
    prompts = Prompts(input_ids, lengths)
    sampling = _sampling(top_k, top_p, temperature, min_p, repetition_penalty, generator)
    options = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    options.update(vocab_size=vocab_size, max_new_tokens=max_new_tokens)
    request = make_request(model, prompts, max_length, sampling, **options)
    make_request(model_draft, prompts, max_length, sampling, **options)
    _check_group(model, tensor_parallel)
    graphs = (None, None)
    if _wants_graphs(cg, prompts.device):
        if model is model_draft:
            raise ValueError(
                "cg needs model and model_draft to be two: each has a cache of its own"
            )
        calls = ((model, (1, lookahead + 1)), (model_draft, (1, 2)))
        graphs = tuple(_graphs(m, prompts, request, n, tensor_parallel) for m, n in calls)
    with timing(enable_timing, prompts.device):
        result = speculate(
            *(model, model_draft, prompts, request, lookahead),
            graphs=graphs,
            keep_scores=output_scores,
        )
    if debug:
        print(
            f"{result.num_calls} calls of the model after the prompt's, {result.num_kept} of "
            f"{result.num_drafted} drafted tokens kept"
        )
    return as_output(result.sequences(prompts.are_one_tensor), result.scores())


def allocate_inference_cache(
    max_batch_size: int,
    max_seqlen: int,
    nheads: int,
    headdim: int,
    layers: Union[int, Sequence[int]],
    device,
    dtype: torch.dtype = torch.float16,
) -> dict[int, Tensor]:
    """Return a cache for ``InferenceParams.key_value_memory_dict``, not initialised.

    Args:
        max_batch_size, max_seqlen: sequences, and tokens of the longest.
        nheads: of keys and values.
        layers: their number, or their indices.

    Returns:
        For each layer ``(max_batch_size, max_seqlen, 2, nheads, headdim)``.
    """
    shape = (max_batch_size, max_seqlen, 2, nheads, headdim)
    indices = range(layers) if isinstance(layers, int) else layers
    return {i: torch.empty(shape, device=device, dtype=dtype) for i in indices}


def _taken(options: dict, *names: str) -> dict:
    """Take options out of a dict, as far as it has them."""
    return {name: options.pop(name) for name in names if name in options}


_SAMPLING_OPTIONS = ("min_p", "repetition_penalty", "generator")
# Those of ``decode`` that methods of a model pass on.
_OPTIONS = frozenset(signature(decode).parameters) - {"input_ids", "model", "max_length"}


class GenerationMixin:
    """``generate`` and ``stream`` of a model that is called as this module's head says."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Optional[torch.dtype] = None, **kwargs
    ) -> dict[int, Tensor]:
        """Return a cache for ``InferenceParams.key_value_memory_dict``."""
        raise NotImplementedError

    def _with_vocab_size(self, options: dict) -> dict:
        """Leave logits out that only fill up the vocabulary."""
        config = getattr(self, "config", None)
        if options.get("vocab_size") is None and getattr(config, "pad_vocab_size_multiple", 1) > 1:
            options["vocab_size"] = config.vocab_size
        return options

    def generate(
        self,
        input_ids: Union[Tensor, Sequence[Tensor]],
        max_length: Optional[int] = None,
        top_k: int = 1,
        top_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs,
    ):
        """Generate tokens after prompts; the arguments are those of ``decode``.

        Args:
            max_length: or else ``max_new_tokens``, one of them is needed.
            return_dict_in_generate: whether to return what ``decode`` does.
            output_scores: whether that has ``scores``.

        Returns:
            ``sequences`` of ``decode``, or its output.
        """
        check_names("generate", kwargs, _OPTIONS)
        sampling = _sampling(top_k, top_p, temperature, **_taken(kwargs, *_SAMPLING_OPTIONS))
        keeps = {"keep_scores": return_dict_in_generate and output_scores}
        call = (input_ids, self, max_length, sampling)
        sequences, scores = _decode(*call, **keeps, **self._with_vocab_size(kwargs))
        if not return_dict_in_generate:
            return sequences
        return as_output(sequences, scores if output_scores else None)

    def stream(
        self,
        input_ids: Union[Tensor, Sequence[Tensor]],
        max_length: Optional[int] = None,
        top_k: int = 1,
        top_p: float = 0.0,
        temperature: float = 1.0,
        **kwargs,
    ) -> Iterator[Tensor]:
        """Generate tokens and yield those of each step, int64 ``(batch,)``, as they come.

        The arguments are those of ``decode``, without ``enable_timing`` and ``streamer``, and are
        checked at once. The cache goes when the iterator does.
        """
        check_names("stream", kwargs, _OPTIONS - {"enable_timing", "streamer"})
        sampling = _sampling(top_k, top_p, temperature, **_taken(kwargs, *_SAMPLING_OPTIONS))
        _, decoding = _decoding(
            input_ids, self, max_length, sampling, **self._with_vocab_size(kwargs)
        )
        return _tokens_of(decoding)


def _tokens_of(decoding: Decoding) -> Iterator[Tensor]:
    try:
        for step in decoding:
            yield step.tokens.clone()  # a usual tensor, rather than one of inference mode
    finally:
        decoding.close()
