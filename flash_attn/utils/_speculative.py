"""Speculative decoding (https://arxiv.org/abs/2211.17192): a small model drafts tokens, the model
looks at all of them in one call, and rejection sampling keeps its distribution exactly."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor, nn

from flash_attn._arguments import as_int, check_tensors
from flash_attn.utils._decoding import Cached, tokens_from_first
from flash_attn.utils._prompts import Prompts, Request
from flash_attn.utils._sampling import Sampling


def accept(p: Tensor, q: Tensor, tokens_draft: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Keep drafted tokens as long as they may come from ``p``, and draw one more.

    Token i is kept with probability ``min(1, p_i / q_i)``; the first that is not is drawn anew from
    what ``p`` has more than ``q``. The tokens that result are distributed as ``p``.

    Args:
        p: the model's distributions, ``(batch, seqlen + 1, vocab)``.
        q: those that the draft was drawn from, ``(batch, seqlen, vocab)``.
        tokens_draft: int64 ``(batch, seqlen)``.
        sampling: has the generator.

    Returns:
        tokens, int64 ``(batch, seqlen + 1)``, and how many of each row count, int64 ``(batch,)``.
    """
    batch, seqlen = tokens_draft.shape
    chosen = tokens_draft[..., None]
    p_draft, q_draft = p[:, :-1].gather(-1, chosen)[..., 0], q.gather(-1, chosen)[..., 0]
    u = torch.rand(batch, seqlen, generator=sampling.generator, dtype=p.dtype, device=p.device)
    kept = (u * q_draft < p_draft).long().cumprod(1).sum(1)
    row = torch.arange(batch, device=p.device)
    # After a draft that was kept whole there is nothing to take away from p.
    q = torch.cat((q, torch.zeros_like(p[:, -1:])), 1)
    here = p[row, kept]
    rest = (here - q[row, kept]).clamp_(min=0.0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0.0, rest, here)
    tokens = torch.cat((tokens_draft, tokens_draft.new_zeros(batch, 1)), 1)
    tokens[row, kept] = sampling.draw(rest)
    return tokens, kept + 1


def sample_speculative(
    logits: Tensor,
    logits_draft: Tensor,
    tokens_draft: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    temperature: float = 1.0,
    *,
    min_p: float = 0.0,
    generator: Optional[torch.Generator] = None,
) -> tuple[Tensor, Tensor]:
    """Keep drafted tokens that may come from the model's logits, and draw one more.

    Args:
        logits: the model's, after each drafted token and before the first, ``(batch, seqlen + 1,
            vocab)``.
        logits_draft: those that the draft was drawn from by the same arguments, ``(batch, seqlen,
            vocab)``.
        tokens_draft: the draft, int64 ``(batch, seqlen)``.

    The other arguments are those of ``sample``.

    Returns:
        tokens, int64 ``(batch, seqlen + 1)``, and how many of each row count, int64 ``(batch,)``:
        from 1 to seqlen + 1.

    Raises:
        ValueError: shapes do not fit, or an argument is out of range.
    """
    check_tensors(logits=logits, logits_draft=logits_draft, tokens_draft=tokens_draft)
    sampling = Sampling(top_k, top_p, temperature, min_p, generator=generator)
    shape = tuple(tokens_draft.shape)
    fits = len(shape) == 2 and logits.dim() == 3 and logits_draft.shape[:-1] == shape
    if not fits or logits.shape != (shape[0], shape[1] + 1, logits_draft.shape[-1]):
        raise ValueError(
            "logits (batch, seqlen + 1, vocab), logits_draft (batch, seqlen, vocab) and "
            f"tokens_draft (batch, seqlen) do not fit: {tuple(logits.shape)}, "
            f"{tuple(logits_draft.shape)}, {shape}"
        )
    p, q = sampling.probabilities(logits), sampling.probabilities(logits_draft)
    return accept(p, q, tokens_draft, sampling)


class _Lane:
    """A model with a cache that can be called for several tokens of each sequence at once."""

    def __init__(self, model: nn.Module, prompts: Prompts, max_length: int, graphs=None):
        self._cached = Cached(model, prompts, max_length, graphs)
        self._model, self._graphs = model, graphs
        self.prefill = self._cached.prefill

    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Run ``(batch, seqlen)`` tokens behind ``lengths`` ones: logits of each."""
        count = tokens.shape[1]
        position_ids = lengths[:, None] + torch.arange(count, device=tokens.device)
        if self._graphs is not None and tuple(tokens.shape) in self._graphs.callables:
            return self._graphs.run(tokens, position_ids, lengths)
        params = self._cached.params
        if params.lengths_per_sample is None:
            params.lengths_per_sample = torch.empty_like(lengths, dtype=torch.int32)
        params.lengths_per_sample[: len(lengths)] = lengths
        return self._model(
            tokens, position_ids=position_ids, inference_params=params, num_last_tokens=count
        ).logits


class Speculation:
    """The state of a batch: its tokens so far, and the two models' caches.

    The model's cache has all tokens but the last. The draft's has all but the last two, at least:
    it runs these two again, so that all sequences of a batch have as many to run.
    """

    def __init__(
        self,
        lanes: tuple[_Lane, _Lane],
        model: nn.Module,
        prompts: Prompts,
        request: Request,
        lookahead: int,
        keep_scores: bool,
    ):
        self._lane, self._draft_lane = lanes
        self._model, self._request, self._lookahead = model, request, lookahead
        device, batch = prompts.device, len(prompts)
        self.tokens = torch.full((batch, request.max_length), request.pad, device=device)
        self.tokens[:, : prompts.longest] = prompts.padded(request.pad)
        self._starts = torch.tensor(prompts.lengths, device=device)
        self.lengths = self._starts.clone()
        self._limits = torch.tensor(request.limits, device=device)
        self._stop = torch.tensor(request.stop, dtype=torch.long, device=device)
        self._is_over = torch.zeros(batch, dtype=torch.bool, device=device)
        self._row = torch.arange(batch, device=device)
        self._keep_scores = keep_scores
        self._scores: list[tuple[Tensor, Tensor, Tensor]] = []
        self._is_seen: Optional[Tensor] = None
        self.num_calls, self.num_drafted, self.num_kept = 0, 0, 0

    def run(self) -> None:
        """Generate all tokens."""
        sampling = self._request.sampling
        logits = self._lane.prefill()[..., : self._request.vocab_size]
        self._draft_lane.prefill()
        if sampling.penalizes:
            self._is_seen = torch.zeros_like(logits, dtype=torch.bool)
            for seen, row, length in zip(self._is_seen, self.tokens, self.lengths.tolist()):
                seen[row[:length]] = True
        first = tokens_from_first(self._model, sampling(logits, self._is_seen))
        self._append(first[:, None], torch.ones_like(self.lengths), logits[:, None])
        while not bool(self._is_over.all()):
            self._step()

    def _step(self) -> None:
        """Draft tokens, look at them, and append those that are kept and one more."""
        sampling, max_length = self._request.sampling, self._request.max_length
        going = ~self._is_over
        longest = int(self.lengths[going].max())
        most = int((self._limits - self.lengths)[going].max()) - 1
        count = min(self._lookahead, most, max_length - longest)
        # A sequence that is over runs along, within the cache, and nobody reads what it gives.
        lengths = self.lengths.clamp(max=max_length - count)
        drafted, q, is_seen = self._drafted(lengths, count)
        last = self.tokens[self._row, lengths - 1][:, None]
        logits = self._lane(torch.cat((last, drafted), 1), lengths - 1)
        logits = logits[..., : self._request.vocab_size]
        if logits.shape[-1] != q.shape[-1]:
            raise ValueError(
                f"model has {logits.shape[-1]} logits and model_draft {q.shape[-1]}: they must "
                "have one vocabulary; vocab_size leaves out what fills it up"
            )
        p = sampling.probabilities(logits, is_seen)
        tokens, kept = accept(p, q, drafted, sampling)
        if not sampling.is_greedy:
            tokens = tokens_from_first(self._model, tokens)
            kept = tokens_from_first(self._model, kept)
        self.num_calls += 1
        self.num_drafted += count * int(going.sum())
        self.num_kept += int((kept - 1)[going].sum())
        self._append(tokens, kept, logits)

    def _drafted(self, lengths: Tensor, count: int):
        """Return drafted tokens ``(batch, count)``, the distributions that they were drawn from,
        and which tokens each place has before it, ``(batch, count + 1, vocab)`` or None."""
        sampling, is_seen = self._request.sampling, self._is_seen
        back = torch.tensor([-2, -1], device=lengths.device)
        new, start = self.tokens.gather(1, lengths[:, None] + back), lengths - 2
        drafted, distributions, seen = [], [], [is_seen]
        for _ in range(count):
            logits = self._draft_lane(new, start)[:, -1, : self._request.vocab_size]
            start = start + new.shape[1]
            distributions.append(sampling.probabilities(logits, is_seen))
            drawn = sampling.draw(distributions[-1])
            drafted.append(tokens_from_first(self._model, drawn))
            new = drafted[-1][:, None]
            if is_seen is not None:
                is_seen = is_seen.scatter(1, new, True)
                seen.append(is_seen)
        seen = None if is_seen is None else torch.stack(seen, 1)
        if not drafted:
            vocab = self._request.vocab_size
            return new[:, :0], self._no_distribution(lengths, vocab), seen
        return torch.stack(drafted, 1), torch.stack(distributions, 1), seen

    def _no_distribution(self, lengths: Tensor, vocab) -> Tensor:
        return torch.empty(len(lengths), 0, vocab or self._vocab, device=lengths.device)

    def _append(self, tokens: Tensor, count: Tensor, logits: Tensor) -> None:
        """Append up to ``count[i]`` of ``tokens[i]``, up to a stop token or the limit."""
        self._vocab = logits.shape[-1]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        count = count.minimum(self._limits - self.lengths).masked_fill(self._is_over, 0)
        is_stop = torch.isin(tokens, self._stop)
        stops_before = is_stop.cumsum(1) - is_stop.long()
        is_new = (place < count[:, None]) & (stops_before == 0)
        rows, columns = is_new.nonzero(as_tuple=True)
        places = self.lengths[rows] + columns
        self.tokens[rows, places] = tokens[rows, columns]
        if self._keep_scores:
            self._scores.append((rows, places - self._starts[rows], logits[rows, columns]))
        if self._is_seen is not None:
            self._is_seen[rows, tokens[rows, columns]] = True
        self.lengths = self.lengths + is_new.sum(1)
        self._is_over |= (is_new & is_stop).any(1) | (self.lengths >= self._limits)

    def sequences(self, are_one_tensor: bool) -> Union[Tensor, list[Tensor]]:
        """Return prompts and tokens as ``decode`` does, in memory of their own."""
        lengths = self.lengths.tolist()
        if are_one_tensor:
            return self.tokens[:, : max(lengths)].clone()
        return [row[:length].clone() for row, length in zip(self.tokens, lengths)]

    def scores(self) -> Optional[tuple[Tensor, ...]]:
        """Return the model's logits of each new token, ``(batch, vocab)``, 0 after the end."""
        if not self._keep_scores:
            return None
        steps = int((self.lengths - self._starts).max())
        out = self._scores[0][2].new_zeros(steps, len(self.tokens), self._vocab)
        for rows, places, logits in self._scores:
            out[places, rows] = logits
        return out.unbind(0)


@torch.inference_mode()
def speculate(
    model: nn.Module,
    model_draft: nn.Module,
    prompts: Prompts,
    request: Request,
    lookahead: int,
    *,
    graphs=(None, None),
    keep_scores: bool = True,
) -> Speculation:
    """Generate by drafts of ``lookahead`` tokens."""
    max_length = request.max_length
    models = zip((model, model_draft), graphs)
    lanes = tuple(_Lane(each, prompts, max_length, graph) for each, graph in models)
    speculation = Speculation(lanes, model, prompts, request, lookahead, keep_scores)
    speculation.run()
    return speculation


def checked_lookahead(lookahead) -> int:
    """Return ``speculative_lookahead``.

    Raises:
        ValueError: it is less than 1.
    """
    lookahead = as_int("speculative_lookahead", lookahead)
    if lookahead < 1:
        raise ValueError(f"speculative_lookahead must be at least 1, got {lookahead}")
    return lookahead
