"""The loop that turns a model's logits into tokens, one call of the model a token."""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_attn.utils._inference_params import InferenceParams, Packing
from flash_attn.utils._prompts import Prompts, Request
from flash_attn.utils.distributed import group_size


def takes_packing(model: nn.Module) -> bool:
    """Whether the model reads ``InferenceParams.packing`` and ``block_table``."""
    from flash_attn.modules._heads import HeadAttention

    mixers = [m for m in model.modules() if isinstance(m, HeadAttention)]
    can = getattr(model, "takes_packed_tokens", False)
    return can and bool(mixers) and all(m.use_flash_attn for m in mixers)


def tokens_from_first(model: nn.Module, tokens: Tensor) -> Tensor:
    """Give every process of a tensor-parallel group the tokens that its first one drew."""
    group = getattr(model, "process_group", None)
    if group_size(group) > 1:
        dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
    return tokens


class Cached:
    """A model with a cache of its own for a batch, where sequence i has row i.

    A prompt of several lengths is packed where the model can, and otherwise filled up on the right,
    where causal attention keeps what is behind from mattering.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, max_length: int, graphs=None):
        """Make the cache.

        Args:
            max_length: tokens of the longest sequence.
            graphs: a ``DecodingCGCache`` to decode through, or None.
        """
        self._model, self._prompts, self._graphs = model, prompts, graphs
        if graphs is None:
            self.params = InferenceParams(max_seqlen=max_length, max_batch_size=len(prompts))
        else:
            self.params = graphs.inference_params
            self.params.reset(max_length, len(prompts))
        self._is_even = prompts.are_even
        self._places = torch.arange(max_length, device=prompts.device)[:, None]
        self._lengths: Optional[Tensor] = None

    def prefill(self) -> Tensor:
        """Run the prompts: logits ``(batch, vocab)`` after the last token of each."""
        params, prompts = self.params, self._prompts
        if self._is_even:
            tokens = torch.stack(prompts.rows)
            logits = self._model(tokens, inference_params=params, num_last_tokens=1).logits
            params.seqlen_offset = prompts.longest
            return logits[:, -1]
        self._lengths = torch.tensor(prompts.lengths, dtype=torch.int32, device=prompts.device)
        if params.lengths_per_sample is not None:  # the graphs' own
            params.lengths_per_sample.zero_()
        logits = self._prefill_packed() if takes_packing(self._model) else self._prefill_padded()
        params.seqlen_offset = prompts.longest
        if self._graphs is None:
            params.lengths_per_sample = self._lengths
        return logits

    def _prefill_packed(self) -> Tensor:
        params = self.params
        params.packing = packing = Packing(self._prompts.lengths, device=self._prompts.device)
        logits = self._model(
            self._prompts.packed(),
            position_ids=packing.positions[None],
            inference_params=params,
            num_last_tokens=1,
        ).logits
        params.packing = None
        return logits[:, -1]

    def _prefill_padded(self) -> Tensor:
        logits = self._model(self._prompts.padded(), inference_params=self.params).logits
        return logits[torch.arange(len(logits), device=logits.device), self._lengths.long() - 1]

    def step(self, tokens: Tensor, is_over: Optional[Tensor]) -> Tensor:
        """Run one more token of each sequence: logits ``(batch, vocab)``.

        Args:
            tokens: int64 ``(batch,)``.
            is_over: bool ``(batch,)``, sequences whose logits nobody reads; None: none.
        """
        params, length = self.params, self.params.seqlen_offset
        if self._is_even:
            position_ids = self._places[length].expand(len(tokens), 1)
        else:
            length = self._lengths
            position_ids = length[:, None].long()
        if self._graphs is not None:
            logits = self._graphs.run(tokens[:, None], position_ids, length)
        else:
            logits = self._model(
                tokens[:, None],
                position_ids=position_ids,
                inference_params=params,
                num_last_tokens=1,
            ).logits
        params.seqlen_offset += 1
        if not self._is_even:  # one that is over stays where it is, within the cache
            self._lengths += 1 if is_over is None else ~is_over
        return logits[:, -1]

    def close(self) -> None:
        """Let go of what the model need not keep."""


class Step(NamedTuple):
    """What one call of the model led to.

    Attributes:
        tokens: int64 ``(batch,)``; ``pad`` in sequences that were over.
        logits: ``(batch, vocab)``, as the model gave them.
    """

    tokens: Tensor
    logits: Tensor


class Decoding:
    """An iterator over the steps of a request."""

    def __init__(self, model: nn.Module, prompts: Prompts, request: Request, cached):
        """Prepare the steps.

        Args:
            cached: the model with its cache, such as ``Cached``.
        """
        self._model, self._prompts, self._request, self._cached = model, prompts, request, cached
        device = prompts.device
        self._tokens: Optional[Tensor] = None
        self._is_seen: Optional[Tensor] = None
        self._steps = 0
        self._left = [limit - n for limit, n in zip(request.limits, prompts.lengths)]
        self._stop = torch.tensor(request.stop, device=device) if request.stop else None
        ends_apart = self._stop is not None or len(set(self._left)) > 1
        self._is_over = (
            torch.zeros(len(prompts), dtype=torch.bool, device=device) if ends_apart else None
        )
        self._starts = torch.tensor(prompts.lengths, device=device)
        self._limits = torch.tensor(self._left, device=device)
        self.counts = torch.zeros_like(self._starts)

    @property
    def pad(self) -> int:
        """The token behind the end of a sequence."""
        return self._request.pad

    def __iter__(self) -> Decoding:
        return self

    @torch.inference_mode()
    def __next__(self) -> Step:
        if self._is_finished():
            self._cached.close()
            raise StopIteration
        try:
            if self._tokens is None:
                logits = self._cached.prefill()
            else:
                logits = self._cached.step(self._tokens, self._is_over)
        except BaseException:
            self._cached.close()
            raise
        logits = logits[..., : self._request.vocab_size]
        self._tokens = self._choose(logits)
        self._note(self._tokens)
        return Step(self._tokens, logits)

    def close(self) -> None:
        """Stop before the end."""
        self._left = [0]
        self._cached.close()

    def _is_finished(self) -> bool:
        if self._steps >= max(self._left):
            return True
        return self._stop is not None and self._steps > 0 and bool(self._is_over.all())

    def _seen(self, logits: Tensor) -> Optional[Tensor]:
        """Return which tokens each sequence has, bool ``(batch, vocab)``."""
        if not self._request.sampling.penalizes:
            return None
        if self._is_seen is None:
            self._is_seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in zip(self._is_seen, self._prompts.rows):
                row[prompt] = True
        return self._is_seen

    def _choose(self, logits: Tensor) -> Tensor:
        teacher = self._request.teacher
        if teacher is not None and self._prompts.longest + self._steps < teacher.shape[1]:
            tokens = self._taught(teacher)
        else:
            tokens = self._request.sampling(logits, self._seen(logits))
            if not self._request.sampling.is_greedy:
                tokens = tokens_from_first(self._model, tokens)
            if teacher is not None and self._steps + min(self._prompts.lengths) < teacher.shape[1]:
                is_taught = self._starts + self._steps < teacher.shape[1]
                tokens = torch.where(is_taught, self._taught(teacher), tokens)
        if self._is_over is not None and self._steps > 0:
            tokens = tokens.masked_fill(self._is_over, self._request.pad)
        return tokens

    def _taught(self, teacher: Tensor) -> Tensor:
        places = (self._starts + self._steps).clamp(max=teacher.shape[1] - 1)
        return teacher.gather(1, places[:, None])[:, 0]

    def _note(self, tokens: Tensor) -> None:
        """Keep account of a step's tokens."""
        self._steps += 1
        if self._is_seen is not None:
            self._is_seen.scatter_(1, tokens[:, None], True)
        if self._is_over is None:
            self.counts += 1
            return
        self.counts += ~self._is_over
        self._is_over = self._is_over | (self._limits <= self._steps)
        if self._stop is not None:
            self._is_over = self._is_over | torch.isin(tokens, self._stop)


def assembled(prompts: Prompts, steps: list[Step], counts: Tensor) -> Union[Tensor, list[Tensor]]:
    """Return prompts and tokens: int64 ``(batch, seqlen)``, or a list of ``(seqlen,)``."""
    tokens = torch.stack([step.tokens for step in steps], dim=1)
    if prompts.are_one_tensor:
        return torch.cat((torch.stack(prompts.rows), tokens), dim=1)
    rows = zip(prompts.rows, tokens, counts.tolist())
    return [torch.cat((prompt, row[:count])) for prompt, row, count in rows]
