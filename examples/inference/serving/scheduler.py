"""Continuous batching: which tokens of which sequences go through the model in a step."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flash_attn.utils.paged_cache import CacheFullError, PagedKVCache
from serving.generation import Event, Generation


@dataclass
class Counts:
    """What a scheduler has done so far."""

    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Scheduler:
    """Generates many sequences at once, with blocks of a paged cache.

    Each step calls the model once. Sequences whose prompt is through get their next token first;
    the rest of ``max_step_tokens`` goes to prompts, in parts if need be, oldest first, so that a
    long prompt keeps nobody waiting for long. A sequence is let in when there are blocks for its
    prompt, and one for each of those that run. When they run out later, the youngest gives its own
    back and waits; it starts over with the tokens that it has, those of blocks that nobody took
    found again.

    Not safe to call from several threads.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: PagedKVCache,
        *,
        max_running: int = 64,
        max_step_tokens: int = 512,
        vocab_size: int | None = None,
    ):
        """Make the scheduler.

        Args:
            model: as ``PagedKVCache.step`` takes it.
            max_running: sequences that go through the model at once.
            max_step_tokens: tokens that do; at least ``max_running``.
            vocab_size: how many logits are tokens; None: all.

        Raises:
            ValueError: a number is too small.
        """
        if max_running < 1:
            raise ValueError(f"max_running must be at least 1, got {max_running}")
        if max_step_tokens < max_running:
            raise ValueError(
                f"max_step_tokens must be at least max_running ({max_running}), got "
                f"{max_step_tokens}"
            )
        self.model, self.cache = model, cache
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        self.vocab_size = vocab_size
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []  # oldest first
        self.counts = Counts()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, num_prompt: int, max_tokens: int) -> None:
        """Raise ValueError for a sequence that the cache has no room for.

        The last token of a sequence is not run through the model, and needs none.
        """
        if num_prompt + max_tokens - 1 > self.cache.max_seqlen:
            raise ValueError(
                f"{num_prompt} tokens of the prompt and {max_tokens} new ones (max_tokens) exceed "
                f"the {self.cache.max_seqlen + 1} that a sequence can have"
            )

    def submit(self, generation: Generation) -> None:
        """Let a sequence wait for its turn.

        Raises:
            ValueError: it can get longer than the cache has room for.
        """
        self.check(len(generation.prompt), generation.max_tokens)
        self.waiting.append(generation)

    def step(self) -> list[Event]:
        """Let sequences in and run the model once.

        Returns:
            What it did, an event for each sequence that has a new token.
        """
        self._drop_cancelled()
        self._admit()
        batch = self._with_room()
        if not batch:
            return []
        try:
            logits = self.cache.step(
                self.model,
                [generation.cached for generation, _ in batch],
                [generation.pending(count) for generation, count in batch],
            )
        except Exception as error:
            return self._failed([generation for generation, _ in batch], error)
        self.counts.steps += 1
        return self._take(batch, logits[..., : self.vocab_size])

    def abort(self, error: BaseException) -> list[Event]:
        """Give up all sequences."""
        return self._failed([*self.running, *self.waiting], error)

    def _free(self, generation: Generation) -> None:
        if generation.cached is not None:
            self.cache.free(generation.cached)
            generation.cached = None

    def _drop_cancelled(self) -> None:
        cancelled = [g for g in (*self.running, *self.waiting) if g.is_cancelled]
        if not cancelled:
            return
        for generation in cancelled:
            self._free(generation)
            self.counts.cancelled += 1 + len(generation.siblings)
        self.running = [g for g in self.running if not g.is_cancelled]
        self.waiting = deque(g for g in self.waiting if not g.is_cancelled)

    def _failed(self, generations: list[Generation], error: BaseException) -> list[Event]:
        events = []
        for generation in generations:
            self._free(generation)
            events += [Event(g, error=error) for g in (generation, *generation.siblings)]
        self.counts.failed += len(events)
        gone = set(map(id, generations))
        self.running = [g for g in self.running if id(g) not in gone]
        self.waiting = deque(g for g in self.waiting if id(g) not in gone)
        return events

    def _admit(self) -> None:
        """Let waiting sequences in, first come first served, as long as there are blocks."""
        while self.waiting and len(self.running) < self.max_running:
            if self._budget_left() < 1 or not self._admitted(self.waiting[0]):
                return
            self.running.append(self.waiting.popleft())

    def _budget_left(self) -> int:
        return self.max_step_tokens - sum(g.num_pending for g in self.running)

    def _admitted(self, generation: Generation) -> bool:
        cached = self.cache.add(generation.tokens)
        count = generation.num_tokens - cached.length
        spare = len(self.running)
        if self.cache.blocks_needed(cached, count) + spare > self.cache.num_free_blocks:
            self.cache.free(cached)
            return False
        self.cache.reserve([cached], [count])
        generation.cached = cached
        if generation.num_reused is None:
            generation.num_reused = cached.length
            self.counts.prompt_tokens += len(generation.prompt)
            self.counts.reused_tokens += cached.length
        return True

    def _batch(self) -> list[tuple[Generation, int]]:
        """Return the sequences of the next step and how many tokens of each."""
        left = self.max_step_tokens - sum(g.num_pending == 1 for g in self.running)
        batch = []
        for generation in self.running:
            count = generation.num_pending
            if count > 1:
                count = min(count, left)
                left -= count
            if count > 0:
                batch.append((generation, count))
        return batch

    def _with_room(self) -> list[tuple[Generation, int]]:
        """Return a batch that there are blocks for; the youngest sequences make room."""
        while self.running:
            batch = self._batch()
            try:
                self.cache.reserve([g.cached for g, _ in batch], [count for _, count in batch])
                return batch
            except CacheFullError:
                self._preempt()
        return []

    def _preempt(self) -> None:
        generation = self.running.pop()
        self._free(generation)
        self.waiting.appendleft(generation)
        self.counts.preemptions += 1

    def _take(self, batch: list[tuple[Generation, int]], logits: Tensor) -> list[Event]:
        """Choose the next token of each sequence that has gone through the model as a whole."""
        whole = [i for i, (generation, _) in enumerate(batch) if generation.num_pending == 0]
        rows = []  # (generation, row of the logits)
        for i in whole:
            generation = batch[i][0]
            rows.append((generation, i))
            rows += [(sibling, i) for sibling in self._split_off(generation)]
        events = [
            self._appended(g, token) for (g, _), token in zip(rows, self._chosen(rows, logits))
        ]
        for event in events:
            if event.error is not None:
                self.counts.failed += 1
            else:
                self.counts.new_tokens += 1
                self.counts.finished += event.generation.is_over
            if event.generation.is_over:
                self._free(event.generation)
        self.running = [g for g in self.running if not g.is_over]
        self.waiting = deque(g for g in self.waiting if not g.is_over)
        return events

    def _split_off(self, generation: Generation) -> list[Generation]:
        """Give the siblings of a sequence its blocks; those that cannot run now wait."""
        siblings, generation.siblings = generation.siblings, []
        waiting = []
        for sibling in siblings:
            sibling.num_reused = len(sibling.prompt)
            if len(self.running) < self.max_running:
                sibling.cached = self.cache.fork(generation.cached)
                self.running.append(sibling)
            else:
                waiting.append(sibling)
        self.waiting.extendleft(reversed(waiting))
        return siblings

    @staticmethod
    def _appended(generation: Generation, token: int | Exception) -> Event:
        """Give a sequence its token; what is wrong with one ends that one alone."""
        error = token
        if not isinstance(token, Exception):
            try:
                return generation.append(token)
            except Exception as raised:  # of the tokenizer
                error = raised
        generation.is_over = True
        return Event(generation, error=error)

    @staticmethod
    def _chosen(rows: list[tuple[Generation, int]], logits: Tensor) -> list[int | Exception]:
        """Return the next token of each sequence, or why it has none."""
        tokens: list[int | Exception] = [0] * len(rows)
        greedy = []
        for place, (generation, row) in enumerate(rows):
            sampling = generation.sampling
            if sampling.is_greedy and not sampling.penalizes:
                greedy.append(place)
                continue
            try:
                seen = generation.is_seen(logits.shape[-1])
                # On the CPU, whose generators draw alike on every machine.
                tokens[place] = int(sampling(logits[row].cpu(), seen))
            except Exception as error:
                tokens[place] = error
        if greedy:
            largest = logits[torch.tensor([rows[place][1] for place in greedy])].max(-1)
            found = zip(greedy, largest.values.tolist(), largest.indices.tolist())
            for place, value, token in found:
                is_sound = math.isfinite(value)
                tokens[place] = token if is_sound else ValueError(f"the largest logit is {value}")
        return tokens
