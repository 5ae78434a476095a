"""serving_queue.py: batches that fit their budget, a queue that never grows, work that is dropped when nobody waits."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from errors import RequestError
from serving_queue import EngineQueue, Pace, TimeModel


def run(
    test: Callable[[EngineQueue], Awaitable[None]], compute: Callable[[Sequence[Any]], Any], **settings: Any
) -> None:
    """Run `test` in an event loop with a started queue, and close the queue after it."""
    values = {"max_queue": 8, "max_batch": 4, "budget_s": 10.0} | settings

    async def main() -> None:
        queue = EngineQueue(compute, **values)
        queue.start()
        while not queue.ready:
            await asyncio.sleep(0.001)
        try:
            await test(queue)
        finally:
            await asyncio.get_running_loop().run_in_executor(None, queue.close)

    asyncio.run(main())


class Gate:
    """An engine that computes only when let, and remembers its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.open.wait(10)
        return [item * 10 for item in items]

    async def entered(self, count: int) -> None:
        while len(self.batches) < count:
            await asyncio.sleep(0.001)


def test_the_time_of_a_batch_is_fitted_as_slope_and_offset() -> None:
    times = TimeModel()
    for count in [1, 4, 2, 8, 3] * 10:
        times.observe(count, 0.002 * count + 0.005)
    assert times.coefficients() == pytest.approx((0.002, 0.005))
    assert times.fitting(0.0151, most=64) == 5 and times.fitting(0.001, most=64) == 1 and times.fitting(9, most=8) == 8


def test_the_fit_follows_an_engine_that_becomes_slower() -> None:
    times = TimeModel()
    for step in range(400):
        count = 1 + step % 4
        times.observe(count, (0.001 if step < 200 else 0.003) * count)
    assert times.coefficients()[0] == pytest.approx(0.003, rel=0.05)


def test_coefficients_are_never_negative_whatever_the_noise() -> None:
    rng, times = np.random.default_rng(0), TimeModel()
    assert times.coefficients() == (0.0, 0.0)
    for _ in range(200):
        times.observe(int(rng.integers(1, 9)), float(rng.uniform(0, 1)))
        a, b = times.coefficients()
        assert a >= 0 and b >= 0


def test_each_film_gets_its_own_answer() -> None:
    async def test(queue: EngineQueue) -> None:
        answers = await asyncio.gather(*(queue.submit(number) for number in range(50)))
        assert answers == [number * 10 for number in range(50)]

    run(test, lambda items: [item * 10 for item in items])


def test_an_idle_engine_starts_at_once_and_what_came_meanwhile_goes_together() -> None:
    engine = Gate()

    async def test(queue: EngineQueue) -> None:
        first = queue.submit(0)
        await engine.entered(1)
        rest = [queue.submit(number) for number in range(1, 7)]
        engine.open.set()
        await asyncio.gather(first, *rest)
        assert engine.batches == [[0], [1, 2, 3, 4], [5, 6]]

    run(test, engine)


def test_a_batch_is_kept_within_the_latency_budget() -> None:
    engine = Gate()

    async def test(queue: EngineQueue) -> None:
        for count in (1, 2, 3, 4) * 5:
            queue.times.observe(count, 1.0 * count)
        first = queue.submit(0)
        await engine.entered(1)
        rest = [queue.submit(number) for number in range(1, 5)]
        engine.open.set()
        await asyncio.gather(first, *rest)
        assert [len(batch) for batch in engine.batches[:2]] == [1, 2]

    run(test, engine, budget_s=2.5)


def settle(queue: EngineQueue, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the queue have answered one film after `seconds`; time stands still afterwards."""
    now = [0.0]
    monkeypatch.setattr("serving_queue.time.perf_counter", lambda: now[0])
    with queue.admit():
        now[0] = seconds


def test_the_pace_is_the_time_between_answers_while_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("serving_queue.time.perf_counter", lambda: now[0])
    pace = Pace()
    assert pace.seconds(5) == 0
    for start in (0.0, 100.0, 2000.0):  # idle in between
        now[0] = start
        pace.resume()
        for step in (1, 2, 3):
            now[0] = start + 0.5 * step
            pace.answered()
    assert pace.seconds(5) == pytest.approx(2.5)


def test_a_full_queue_refuses_at_once_with_the_time_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(queue: EngineQueue) -> None:
        settle(queue, monkeypatch, 1.5)
        with queue.admit(), queue.admit():
            with pytest.raises(RequestError, match="places in the queue are taken") as caught, queue.admit():
                pass
            assert caught.value.status == 503 and caught.value.retry_after == 3
        with queue.admit():
            assert queue.admitted == 1

    run(test, lambda items: items, max_queue=2)


def test_a_film_that_would_wait_too_long_is_refused_but_the_least_queue_is_always_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(queue: EngineQueue) -> None:
        settle(queue, monkeypatch, 0.5)
        with contextlib.ExitStack() as places:
            for _ in range(3):
                places.enter_context(queue.admit())
            with pytest.raises(RequestError, match="places in the queue are taken") as caught:
                queue.require_room()
            assert caught.value.retry_after == 2
            queue.least_queue = 5
            for _ in range(2):
                places.enter_context(queue.admit())
            with pytest.raises(RequestError, match="places in the queue are taken"):
                queue.require_room()

    run(test, lambda items: items, max_queue=8, max_wait_s=1.6)


def test_lanes_compute_at_the_same_time_and_each_takes_the_next_film_as_soon_as_it_is_free() -> None:
    meet = threading.Barrier(2)
    slow = threading.Event()
    seen: list[int] = []

    def compute(items: Sequence[int]) -> list[int]:
        if items[0] < 2:
            meet.wait(10)  # broken unless both films are in work together
        if items[0] == 0:
            assert slow.wait(10)
        seen.extend(items)
        return [item * 10 for item in items]

    async def test(queue: EngineQueue) -> None:
        first, *rest = [queue.submit(number) for number in range(6)]
        assert await asyncio.gather(*rest) == [10, 20, 30, 40, 50]
        assert not first.done()
        slow.set()
        assert await first == 0 and seen == [1, 2, 3, 4, 5, 0]

    run(test, compute, max_batch=1, lanes=2)


def test_calls_never_run_at_the_same_time() -> None:
    inside: list[int] = []
    most: list[int] = []

    def call() -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()

    async def test(queue: EngineQueue) -> None:
        await asyncio.gather(*(queue.submit(call, is_call=True) for _ in range(6)))
        assert max(most) == 1

    run(test, lambda items: items, lanes=3)


def test_a_film_waits_for_a_place_where_its_request_was_admitted() -> None:
    async def test(queue: EngineQueue) -> None:
        with queue.admit():
            waiting = asyncio.ensure_future(queue.place())
            await asyncio.sleep(0.03)
            assert not waiting.done()
        with await waiting:
            assert queue.admitted == 1

    run(test, lambda items: items, max_queue=1)


def test_cancelled_films_never_reach_the_engine() -> None:
    engine = Gate()

    async def test(queue: EngineQueue) -> None:
        first = queue.submit(0)
        await engine.entered(1)
        rest = [queue.submit(number) for number in range(1, 4)]
        rest[1].cancel()
        engine.open.set()
        await asyncio.gather(first, rest[0], rest[2])
        assert engine.batches == [[0], [1, 3]]

    run(test, engine)


def test_a_failing_batch_fails_its_films_and_no_others() -> None:
    def compute(items: Sequence[int]) -> list[int]:
        if 13 in items:
            raise ValueError("no")
        return list(items)

    async def test(queue: EngineQueue) -> None:
        with pytest.raises(ValueError, match="no"):
            await queue.submit(13)
        assert await queue.submit(1) == 1

    run(test, compute)


def test_a_call_runs_in_the_engines_thread_between_batches() -> None:
    async def test(queue: EngineQueue) -> None:
        names = await asyncio.gather(
            queue.submit(1), queue.submit(lambda: threading.current_thread().name, is_call=True), queue.submit(2)
        )
        assert names == [1, "engine", 2]

    run(test, lambda items: list(items))


def test_closing_finishes_what_was_taken_on_and_refuses_the_rest() -> None:
    answered: list[int] = []

    async def main() -> None:
        queue = EngineQueue(
            lambda items: [time.sleep(0.01) or item for item in items], max_queue=20, max_batch=2, budget_s=1.0
        )
        queue.start()
        while not queue.ready:
            await asyncio.sleep(0.001)

        async def client(number: int) -> None:
            with queue.admit():
                await asyncio.sleep(0.005)  # decoding
                answered.append(await queue.submit(number))

        clients = [asyncio.ensure_future(client(number)) for number in range(10)]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, queue.close)
        await asyncio.gather(*clients)
        with pytest.raises(RequestError, match="stopping"):
            queue.require_room()

    asyncio.run(main())
    assert sorted(answered) == list(range(10))


def test_nothing_is_taken_on_before_the_engine_is_warm_and_a_failed_warm_up_is_told() -> None:
    failed = threading.Event()

    def warm_up() -> None:
        raise RuntimeError("cold")

    async def main() -> None:
        queue = EngineQueue(
            lambda items: items, max_queue=1, max_batch=1, budget_s=1.0, warm_up=warm_up, on_failure=failed.set
        )
        queue.start()
        await asyncio.get_running_loop().run_in_executor(None, failed.wait, 5)
        with pytest.raises(RequestError, match="warming up"):
            queue.require_room()

    asyncio.run(main())
    assert failed.is_set()
