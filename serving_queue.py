"""One engine, one queue: films from many requests meet here and leave in small batches.

The engine runs in one thread, or in several where it computes several batches at once. A thread takes what waits, at
most what fits the latency budget, and never waits while it is idle. Admission is bounded, in films and in time: what
cannot be answered in time is refused at once. A request whose future was cancelled is dropped before it costs
anything. Knows no HTTP and no model.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from errors import RequestError
from runtime import log

Run = Callable[[Sequence[Any]], Sequence[Any]]


class TimeModel:
    """Seconds a batch takes, a·n + b, fitted on the fly: least squares over the recent batches."""

    MEMORY = 0.98
    """Weight of the past against one new batch: about the last fifty count."""

    def __init__(self) -> None:
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def observe(self, count: int, seconds: float) -> None:
        """Learn from one batch."""
        keep = self.MEMORY
        self._weight = keep * self._weight + 1.0
        self._n, self._t = keep * self._n + count, keep * self._t + seconds
        self._nn, self._nt = keep * self._nn + count**2, keep * self._nt + count * seconds

    def coefficients(self) -> tuple[float, float]:
        """(a, b), both at least 0. With batches of one size all time is laid to the films."""
        if not self._weight:
            return 0.0, 0.0
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n**2
        slope = (self._nt / self._weight - mean_n * mean_t) / variance if variance > 1e-6 else mean_t / mean_n
        slope = min(max(slope, 0.0), mean_t / mean_n)
        return slope, max(0.0, mean_t - slope * mean_n)

    def fitting(self, budget_s: float, *, most: int) -> int:
        """The largest batch, in 1..most, predicted to end within `budget_s`."""
        a, b = self.coefficients()
        return most if a <= 0 else min(most, max(1, int((budget_s - b) / a)))


class Pace:
    """Seconds between two answers while films are on their way: decoding, engine and all else that they wait for."""

    def __init__(self) -> None:
        self._since = self._busy_s = self._answers = 0.0

    def resume(self) -> None:
        """The first film arrives where there was none."""
        self._since = time.perf_counter()

    def answered(self) -> None:
        """One film has left; about the last fifty count."""
        now = time.perf_counter()
        self._busy_s = TimeModel.MEMORY * self._busy_s + now - self._since
        self._answers = TimeModel.MEMORY * self._answers + 1.0
        self._since = now

    def seconds(self, count: int) -> float:
        """Predicted time until the last of `count` films is answered; 0 as long as nothing is known."""
        return count * self._busy_s / self._answers if self._answers else 0.0


@dataclass(slots=True)
class Job:
    """One film on its way through the engine, or a function to run in the engine's thread."""

    item: Any
    future: asyncio.Future[Any]
    arrived: float = field(default_factory=time.perf_counter)
    is_call: bool = False


class EngineQueue:
    """Bounded admission, a waiting line and the engine's threads."""

    def __init__(
        self,
        run: Run,
        *,
        max_queue: int,
        max_batch: int,
        budget_s: float,
        max_wait_s: float = math.inf,
        least_queue: int = 1,
        lanes: int = 1,
        warm_up: Callable[[], None] = lambda: None,
        on_batch: Callable[[int, float, float], None] = lambda count, seconds, waited: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._warm_up, self._on_batch, self._on_failure = run, warm_up, on_batch, on_failure
        self.max_queue, self.max_batch, self.budget_s = max_queue, max_batch, budget_s
        self.max_wait_s, self.least_queue, self.lanes = max_wait_s, least_queue, lanes
        self.times, self.pace = TimeModel(), Pace()
        self.admitted = 0
        """Films taken on and not yet answered: being decoded, waiting or computed."""
        self.ready = self.stopping = False
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._calling = threading.Lock()
        self._thread = threading.Thread(target=self._begin, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the engine's thread from within the event loop that submits."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Finish what was taken on, then end the threads."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def depth(self) -> int:
        """Films waiting for the engine."""
        return len(self._waiting)

    # --- from the event loop ---

    def require_room(self, count: int = 1) -> None:
        """RequestError 503 when `count` more films cannot be taken on now."""
        if self.stopping:
            raise RequestError(503, "the server is stopping; try again", retry_after=5)
        if not self.ready:
            raise RequestError(503, "the model is warming up; try again", retry_after=2)
        if not self._has_room(count):
            wait = max(1, math.ceil(self.pace.seconds(self.admitted)))
            raise RequestError(503, "all places in the queue are taken; try again", retry_after=wait)

    def _has_room(self, count: int = 1) -> bool:
        films = self.admitted + count
        in_time = films <= self.least_queue or self.pace.seconds(films) <= self.max_wait_s
        return films <= self.max_queue and in_time

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place for one film, from before it is decoded until it is answered; RequestError 503 when none is left."""
        self.require_room()
        if not self.admitted:
            self.pace.resume()
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1
            self.pace.answered()

    async def place(self) -> AbstractContextManager[None]:
        """As `admit`, but waits for a place while the queue is full; the caller's deadline ends the wait."""
        while self.ready and not self.stopping and not self._has_room():
            await asyncio.sleep(0.01)
        return self.admit()

    def submit(self, item: Any, *, is_call: bool = False) -> asyncio.Future[Any]:
        """The future answer to one film. Cancelling it takes the film out of the line."""
        assert self._loop is not None
        job = Job(item, self._loop.create_future(), is_call=is_call)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    # --- in the engine's threads ---

    def _begin(self) -> None:
        """Warm up, then work with the other threads until all is done."""
        try:
            self._warm_up()
        except Exception:
            log.exception("the engine failed to warm up")
            self._on_failure()
            return
        others = [threading.Thread(target=self._work, name="engine", daemon=True) for _ in range(self.lanes - 1)]
        for thread in others:
            thread.start()
        self.ready = True
        self._work()
        for thread in others:
            thread.join()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._answer(batch)

    def _next_batch(self) -> list[Job] | None:
        """The next films to compute together, or one call; None when all is done and the queue is closed."""
        was_idle = False
        with self._changed:
            while not self._waiting:
                if self.stopping and not self.admitted:
                    return None
                was_idle = True
                # The time-out lets a closing queue see that its last film was answered elsewhere.
                self._changed.wait(0.1 if self.stopping else None)
            if self._waiting[0].is_call:
                return [self._waiting.popleft()]
            most = self.times.fitting(self.budget_s, most=self.max_batch)
            if not was_idle:
                self._wait_for_more(most)
            return self._take(most)

    def _wait_for_more(self, most: int) -> None:
        """Give films still being decoded a moment, while a fuller batch saves more than the wait costs."""
        a, b = self.times.coefficients()
        oldest = self._waiting[0].arrived
        while len(self._waiting) < min(most, self.admitted):
            count = len(self._waiting)
            slack = oldest + self.budget_s - time.perf_counter() - (a * (count + 1) + b)
            # One film more saves its own fixed cost, b; count films wait for it.
            patience = min(slack, b / (count + 1))
            if patience < 1e-3 or not self._changed.wait(patience):
                return

    def _take(self, most: int) -> list[Job]:
        batch: list[Job] = []
        while self._waiting and len(batch) < most and not self._waiting[0].is_call:
            job = self._waiting.popleft()
            if not job.future.cancelled():
                batch.append(job)
        return batch

    def _answer(self, batch: list[Job]) -> None:
        started = time.perf_counter()
        try:
            if batch[0].is_call:
                with self._calling:
                    results: Sequence[Any] = [batch[0].item()]
            else:
                results = self._run([job.item for job in batch])
                seconds = time.perf_counter() - started
                with self._changed:
                    self.times.observe(len(batch), seconds)
                self._on_batch(len(batch), seconds, started - batch[0].arrived)
            self._deliver(batch, results, None)
        except Exception as error:
            self._deliver(batch, [], error)

    def _deliver(self, batch: list[Job], results: Sequence[Any], error: Exception | None) -> None:
        def settle() -> None:
            for index, job in enumerate(batch):
                if job.future.done():
                    continue
                if error is not None:
                    job.future.set_exception(error)
                else:
                    job.future.set_result(results[index])

        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(settle)
