"""The batcher: what is answered together, what is refused, what a failure reaches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest

from service.batcher import Batcher, Closed, Full, Whole
from tests.conftest import wait_for


class Work:
    """Doubles numbers; holds while the gate is shut; fails on negative ones."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int | Exception]:
        self.batches.append(items)
        assert self.gate.wait(10)
        if any(item < -100 for item in items):
            raise RuntimeError("the batch fails")
        return [ValueError("negative") if item < 0 else 2 * item for item in items]


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def make(work: Work) -> Iterator[Callable[..., Batcher[int, int]]]:
    made: list[Batcher[int, int]] = []

    def start(**changes: Any) -> Batcher[int, int]:
        made.append(Batcher(Whole(work), **({"batch_max": 4, "window_s": 0.05, "queue_max": 8} | changes)))
        made[-1].start()
        assert made[-1].ready.wait(5)
        return made[-1]

    yield start
    work.gate.set()
    for batcher in made:
        batcher.close()


def test_items_within_the_window_are_answered_together_in_order(work: Work, make: Any) -> None:
    batcher = make(window_s=0.3)
    futures = [batcher.submit(n) for n in range(6)]
    assert [f.result(5) for f in futures] == [0, 2, 4, 6, 8, 10]
    assert work.batches == [[0, 1, 2, 3], [4, 5]]


def test_full_queue_refuses_at_once_and_says_when(work: Work, make: Any) -> None:
    batcher = make(window_s=0, batch_max=1)
    work.gate.clear()
    first = batcher.submit(0)
    wait_for(lambda: work.batches, 5)
    futures = [batcher.submit(n) for n in range(8)]
    with pytest.raises(Full) as refusal:
        batcher.submit(9)
    assert refusal.value.retry_after_s >= 1
    work.gate.set()
    wait([first, *futures], 5)
    assert batcher.submit(10).result(5) == 20


def test_departed_clients_item_is_dropped(work: Work, make: Any) -> None:
    batcher = make(batch_max=1, window_s=0)
    work.gate.clear()
    first, gone, last = batcher.submit(1), batcher.submit(2), batcher.submit(3)
    wait_for(lambda: work.batches, 5)
    assert gone.cancel()
    work.gate.set()
    assert (first.result(5), last.result(5)) == (2, 6)
    assert work.batches == [[1], [3]]


def test_exception_reaches_its_own_item_or_batch_only(work: Work, make: Any) -> None:
    batcher = make(window_s=0.2)
    good, bad = batcher.submit(1), batcher.submit(-1)
    assert good.result(5) == 2
    with pytest.raises(ValueError, match="negative"):
        bad.result(5)
    together = [batcher.submit(n) for n in (-1000, 1)]
    for future in together:
        with pytest.raises(RuntimeError):
            future.result(5)
    assert batcher.submit(4).result(5) == 8


def test_close_answers_what_waits_and_takes_nothing_more(work: Work, make: Any) -> None:
    batcher = make(batch_max=1, window_s=0)
    work.gate.clear()
    futures = [batcher.submit(n) for n in range(4)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_for(lambda: batcher._closing.is_set(), 5)
    with pytest.raises(Closed):
        batcher.submit(9)
    work.gate.set()
    assert [f.result(5) for f in futures] == [0, 2, 4, 6]
    closing.join(5)


def test_close_that_runs_out_of_time_cancels_what_waits(work: Work, make: Any) -> None:
    batcher = make(batch_max=1, window_s=0)
    work.gate.clear()
    batcher.submit(0)
    wait_for(lambda: work.batches, 5)
    waiting = batcher.submit(1)
    batcher.close(0.1)
    with pytest.raises(CancelledError):
        waiting.result(5)


def test_failing_setup_is_remembered() -> None:
    def setup() -> None:
        raise OSError("no model")

    batcher: Batcher[int, int] = Batcher(Whole(lambda items: items), batch_max=1, window_s=0, queue_max=1, setup=setup)
    batcher.start()
    wait_for(lambda: batcher.failure, 5)
    assert not batcher.ready.is_set()
    batcher.close()
