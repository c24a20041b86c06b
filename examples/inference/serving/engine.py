"""A scheduler on a thread of its own, and the asyncio side of what it generates."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator

from serving.generation import Event, Generation
from serving.scheduler import Scheduler

logger = logging.getLogger(__name__)


class EngineClosedError(RuntimeError):
    """The engine takes no more requests, or has ended before one was done."""


class BusyError(RuntimeError):
    """Too many sequences wait already."""


class Completion:
    """The generations of one request, and a queue of their events."""

    def __init__(self, generations: list[Generation]):
        self.generations = generations
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        for generation in generations:
            generation.sink = self._events.put_nowait

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of all generations as they come, to the last.

        Raises:
            Exception: what one failed with.
        """
        left = len(self.generations)
        while left:
            event = await self._events.get()
            if event.error is not None:
                raise event.error
            left -= event.finish_reason is not None
            yield event


class Engine:
    """Runs a scheduler as long as there is work. To be used from one event loop."""

    def __init__(self, scheduler: Scheduler, max_waiting: int = 1024):
        """Make the engine; ``start`` starts its thread.

        Args:
            max_waiting: sequences that may wait; more are turned away.
        """
        self.scheduler, self.max_waiting = scheduler, max_waiting
        self.busy_seconds = 0.0
        self._new: deque[Generation] = deque()
        self._wake = threading.Condition()
        self._is_closed = True
        self._thread: threading.Thread | None = None

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return not self._is_closed

    @property
    def num_waiting(self) -> int:
        return len(self._new) + len(self.scheduler.waiting)

    def start(self) -> None:
        """Start the thread; call it in the event loop that ``submit`` is called in."""
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give up what is being generated and end the thread."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, prompts: list[list[Generation]]) -> Completion:
        """Generate; of each prompt's sequences the first brings the others as its siblings.

        Raises:
            ValueError: one can get longer than the cache has room for; none was taken.
            BusyError: too many wait.
            EngineClosedError: the engine is closed.
        """
        generations = [generation for choices in prompts for generation in choices]
        for generation in generations:
            self.scheduler.check(len(generation.prompt), generation.max_tokens)
        completion = Completion(generations)
        with self._wake:
            if self._is_closed:
                raise EngineClosedError("the server is shutting down")
            if self.num_waiting >= self.max_waiting:
                raise BusyError(f"{self.num_waiting} sequences are waiting already")
            for first, *siblings in prompts:
                first.siblings = siblings
                self._new.append(first)
            self._wake.notify()
        return completion

    def cancel(self, completion: Completion) -> None:
        """Stop what is still being generated; its blocks are free after the step that runs now."""
        for generation in completion.generations:
            generation.is_cancelled = True
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        error: BaseException = EngineClosedError("the server has shut down")
        try:
            while self._take_new():
                start = time.perf_counter()
                events = self.scheduler.step()
                self.busy_seconds += time.perf_counter() - start
                for event in events:
                    if event.error is not None:
                        logger.error("a step failed", exc_info=event.error)
                self._deliver(events)
        except BaseException as unexpected:
            logger.exception("the engine has failed")
            error = unexpected
        finally:
            with self._wake:
                self._is_closed = True
                for generation in self._new:
                    self.scheduler.submit(generation)
                self._new.clear()
            self._deliver(self.scheduler.abort(error))

    def _take_new(self) -> bool:
        """Wait for work and hand new sequences on; False: the engine was closed."""
        with self._wake:
            while not (self._is_closed or self._new or self.scheduler.has_work):
                self._wake.wait()
            while self._new:
                self.scheduler.submit(self._new.popleft())
            return not self._is_closed

    def _deliver(self, events: list[Event]) -> None:
        if events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_give_out, events)


def _give_out(events: list[Event]) -> None:
    for event in events:
        event.generation.sink(event)
