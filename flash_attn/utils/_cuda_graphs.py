"""Decoding through CUDA graphs: one launch a token, rather than one a kernel."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Callable, Optional, Union

import torch
from torch import Tensor, nn

from flash_attn.utils._inference_params import InferenceParams


@dataclass
class DecodingCGCache:
    """Graphs of a model's decoding, and the cache that they read and write.

    Attributes:
        max_batch_size, max_seqlen: what the cache has room for.
        device, dtype: of the cache.
        callables: from (batch_size, decoding_seqlen) to what ``capture_graph`` returned.
        mempool: the memory that the graphs share.
        inference_params: of the cache; its ``lengths_per_sample`` is what graphs read.
        run: ``run(input_ids, position_ids, seqlen)``, the graph of their shape: logits ``(batch,
            seqlen, vocab)``.
    """

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: Optional[torch.device] = None
    dtype: Optional[torch.dtype] = None
    callables: dict = field(default_factory=dict)
    mempool: Optional[object] = None
    inference_params: Optional[InferenceParams] = None
    run: Optional[Callable] = None


def _remade(model, cache: DecodingCGCache, batch_size: int, max_seqlen: int, device, dtype) -> None:
    """Give ``cache`` memory for a larger batch or longer sequences, and forget its graphs."""
    cache.callables, cache.mempool, cache.inference_params = {}, None, None
    gc.collect()
    cache.device, cache.dtype = device, dtype
    cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
    memory = model.allocate_inference_cache(batch_size, max_seqlen, dtype)
    lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
    cache.inference_params = InferenceParams(
        max_seqlen=max_seqlen,
        max_batch_size=batch_size,
        key_value_memory_dict=memory,
        lengths_per_sample=lengths,
    )
    cache.mempool = torch.cuda.graph_pool_handle()


def update_graph_cache(
    model: nn.Module,
    cache: Optional[DecodingCGCache],
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Sequence[int] = (1,),
    tensor_parallel: int = 1,
    dtype: Optional[torch.dtype] = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Return graphs for a batch: those of ``cache`` where they do, else new ones.

    Args:
        model: on a GPU, with ``allocate_inference_cache``.
        cache: what an earlier call returned, or None. It is changed.
        batch_size: sequences.
        seqlen_og: tokens of the longest prompt, which graphs do not depend on.
        max_seqlen: tokens of the longest sequence.
        decoding_seqlens: new tokens a call, a graph for each.
        tensor_parallel: processes of the model's group, which its own cache already minds.
        dtype: of the cache; None: that of the model's parameters.
        n_warmups: calls before the capture.

    Raises:
        ValueError: the model is not on a GPU.
    """
    cache = DecodingCGCache() if cache is None else cache
    parameter = next(iter(model.parameters()))
    device, dtype = parameter.device, dtype or parameter.dtype
    _check_device(device)
    is_too_small = batch_size > cache.max_batch_size or max_seqlen > cache.max_seqlen
    if (device, dtype) != (cache.device, cache.dtype) or is_too_small:
        _remade(model, cache, batch_size, max_seqlen, device, dtype)
    for decoding_seqlen in decoding_seqlens:
        if (batch_size, decoding_seqlen) not in cache.callables:
            cache.callables[batch_size, decoding_seqlen] = capture_graph(
                model,
                cache.inference_params,
                batch_size,
                max_seqlen,
                decoding_seqlen=decoding_seqlen,
                mempool=cache.mempool,
                n_warmups=n_warmups,
            )

    def run(input_ids: Tensor, position_ids: Tensor, seqlen: Union[int, Tensor]) -> Tensor:
        return cache.callables[tuple(input_ids.shape)](input_ids, position_ids, seqlen)

    cache.run = run
    cache.inference_params.reset(cache.max_seqlen, batch_size)
    return cache


def _captured(
    function: Callable[[], Tensor], device: torch.device, mempool, n_warmups: int
) -> tuple[Tensor, Callable[[], None]]:
    """Return a function's result, and what computes it anew into the same memory."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(max(n_warmups, 1)):
            function()
        stream.synchronize()
        if torch.distributed.is_initialized():  # no process may capture while another warms up
            torch.distributed.barrier()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        result = function()
    return result, graph.replay


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need the model on a GPU, it is on {device}")


def capture_graph(
    model: nn.Module,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool=None,
    n_warmups: int = 2,
) -> Callable[[Tensor, Tensor, Union[int, Tensor]], Tensor]:
    """Capture a graph of one decoding call.

    Args:
        inference_params: with ``lengths_per_sample``, which the graph reads.
        max_seqlen: tokens of the longest sequence.
        decoding_seqlen: new tokens a call.
        mempool: memory to share with other graphs, or None.
        n_warmups: calls before the capture.

    Returns:
        ``run(input_ids, position_ids, seqlen)``: logits ``(batch_size, decoding_seqlen, vocab)``
        of tokens ``(batch_size, decoding_seqlen)`` after ``seqlen`` ones in the cache, an int or
        int32 ``(batch_size,)``.
    """
    params, device = inference_params, next(iter(model.parameters())).device
    input_ids = torch.zeros(batch_size, decoding_seqlen, dtype=torch.long, device=device)
    position_ids = torch.zeros_like(input_ids)
    offset = params.seqlen_offset
    params.seqlen_offset = max_seqlen - decoding_seqlen
    params.lengths_per_sample[:] = params.seqlen_offset

    @torch.inference_mode()
    def logits_of_call() -> Tensor:
        return model(
            input_ids,
            position_ids=position_ids,
            inference_params=params,
            num_last_tokens=decoding_seqlen,
        ).logits

    logits, replay = _captured(logits_of_call, device, mempool, n_warmups)
    params.seqlen_offset = offset

    def run(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: Union[int, Tensor]) -> Tensor:
        params.lengths_per_sample[:batch_size] = seqlen
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)
        replay()
        return logits.clone()

    return run
