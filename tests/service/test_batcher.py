"""The batcher: what is answered together, what is refused, what a failure reaches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass
from typing import Any

import pytest

from hscr.answers import Delta
from hscr.gathering import STEPS
from service.batcher import Batcher, Closed, Entry, Full, Whole
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


@dataclass(eq=False)
class Job:
    """Takes so many steps and tokens; fails where it is told to."""

    steps: int = 1
    cost: int = 1
    fails: bool = False


class Steps:
    """An engine that works in steps, one at each `go`; notes who shared each of them."""

    joins = True

    def __init__(self) -> None:
        self.running: list[Entry[Job, str]] = []
        self.shared: list[list[Job]] = []
        self.left: list[Job] = []
        self.go = threading.Semaphore(0)

    def cost(self, job: Job) -> int:
        return job.cost

    def join(self, entries: Sequence[Entry[Job, str]]) -> None:
        self.running += entries

    def step(self) -> None:
        assert self.go.acquire(timeout=10)
        self.shared.append([e.item for e in self.running])
        if any(e.item.fails for e in self.running):
            self.running = []
            raise RuntimeError("a step fails")
        for entry in self.running:
            entry.item.steps -= 1
            entry.tell(Delta("a", [1]))
            if not entry.item.steps:
                entry.finish("done")
        self.running = [e for e in self.running if e.item.steps]

    def leave(self, entries: Sequence[Entry[Job, str]]) -> None:
        self.left += [e.item for e in entries]
        self.running = [e for e in self.running if e not in entries]


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def stepping(steps: Steps) -> Iterator[Callable[..., Batcher[Job, str]]]:
    made: list[Batcher[Job, str]] = []

    def start(**changes: Any) -> Batcher[Job, str]:
        made.append(Batcher(steps, **({"batch_max": 4, "window_s": 0, "queue_max": 8} | changes)))
        made[-1].start()
        assert made[-1].ready.wait(5)
        return made[-1]

    yield start
    for _ in range(1000):
        steps.go.release()
    for batcher in made:
        batcher.close()


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
    batcher = make(window_s=1)
    futures = [batcher.submit(0)]
    wait_for(lambda: not batcher.depth, 5, "the first is taken, and waits for others")
    futures += [batcher.submit(n) for n in range(1, 6)]
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


def test_items_join_between_steps_and_leave_when_they_are_done(steps: Steps, stepping: Any) -> None:
    firsts: list[float] = []
    batcher = stepping(on_first=firsts.append)
    long, short = Job(steps=3), Job(steps=1)
    slow = batcher.submit(long)
    steps.go.release()
    wait_for(lambda: len(steps.shared) == 1, 5)
    quick = batcher.submit(short)
    # The step under way goes on without the newcomer, the next one has it.
    steps.go.release()
    steps.go.release()
    assert (quick.result(5), slow.result(5)) == ("done", "done")
    assert [short in shared for shared in steps.shared].count(True) == 1
    assert [long in shared for shared in steps.shared] == [True] * 3
    assert len(firsts) == 2


def many_run(batcher: Batcher[Job, str], steps: Steps, n: int = 8, first: int = 100) -> list[Job]:
    """n jobs whose step is under way, the first of them for so many steps from it on."""
    jobs = [Job(steps=1 + first), *(Job(steps=100) for _ in range(n - 1))]
    batcher.submit(jobs[0])
    wait_for(lambda: steps.running, 5)
    for job in jobs[1:]:
        batcher.submit(job)
    stepped(steps, 1)  # the first alone; then all others join
    wait_for(lambda: len(steps.running) == n, 5)
    return jobs


def stepped(steps: Steps, n: int) -> None:
    for _ in range(n):
        before = len(steps.shared)
        steps.go.release()
        wait_for(lambda before=before: len(steps.shared) > before, 5)


def test_few_newcomers_wait_a_few_steps_for_more_where_many_run(steps: Steps, stepping: Any) -> None:
    batcher = stepping(batch_max=16, queue_max=16)
    many_run(batcher, steps, 9)
    late, begun = [Job(), Job()], len(steps.shared)
    futures = [batcher.submit(job) for job in late]
    stepped(steps, STEPS + 2)  # the one under way, those they wait, their own
    assert [f.result(5) for f in futures] == ["done"] * 2
    assert [late[0] in shared for shared in steps.shared[begun:]] == [False] * (1 + STEPS) + [True]
    assert steps.shared[-1][9:] == late  # in the order they came


def test_newcomers_that_are_many_beside_what_runs_join_at_once(steps: Steps, stepping: Any) -> None:
    batcher = stepping(batch_max=16, queue_max=16)
    many_run(batcher, steps)
    pair, begun = [Job(), Job()], len(steps.shared)
    futures = [batcher.submit(job) for job in pair]
    stepped(steps, 2)
    assert [f.result(5) for f in futures] == ["done"] * 2
    assert [pair[0] in shared for shared in steps.shared[begun:]] == [False, True]


def test_places_that_become_free_are_filled_together(steps: Steps, stepping: Any) -> None:
    """A full batch with a queue behind it: one that ends is not replaced at once, though many have waited for long."""
    batcher = stepping(batch_max=8, queue_max=16)
    jobs = many_run(batcher, steps, first=2)
    waiting = [Job(steps=100) for _ in range(4)]
    for job in waiting:
        batcher.submit(job)
    wait_for(lambda: batcher.depth == 4, 5)
    begun = len(steps.shared)
    stepped(steps, 2 + STEPS + 1)
    sizes = [len(shared) for shared in steps.shared[begun:]]
    assert jobs[0].steps == 0
    assert sizes[-1] == 8
    assert sizes.count(7) == STEPS
    assert waiting[0] in steps.shared[-1]
    assert waiting[1] not in steps.shared[-1]


def test_the_first_begins_at_once_where_others_may_join(steps: Steps, stepping: Any) -> None:
    batcher = stepping(window_s=30)
    steps.go.release()
    assert batcher.submit(Job()).result(5) == "done"


def test_tokens_bound_what_runs_and_the_order_is_kept(steps: Steps, stepping: Any) -> None:
    batcher = stepping(tokens_max=10, batch_max=8)
    jobs = [Job(cost=c) for c in (6, 4, 30, 5, 5, 1)]
    blocker = batcher.submit(Job())
    wait_for(lambda: steps.running, 5)
    futures = [batcher.submit(job) for job in jobs]
    for _ in range(6):
        steps.go.release()
    assert [f.result(5) for f in [blocker, *futures]] == ["done"] * 7
    costs = [[job.cost for job in shared] for shared in steps.shared]
    # 6 joins the blocker (1); 6 + 4 is all that fits; 30 does not fit beside anything and runs alone, and 5 does not pass it.
    assert costs[0][0] == 1
    assert all(sum(c) <= 10 or len(c) == 1 for c in costs)
    assert [c for shared in costs for c in shared] == [1, 6, 4, 30, 5, 5, 1]


def test_who_leaves_while_running_makes_room_between_steps(steps: Steps, stepping: Any) -> None:
    batcher = stepping(batch_max=1)
    gone, stays = Job(steps=100), Job()
    leaver, waiting = batcher.submit(gone), batcher.submit(stays)
    steps.go.release()
    wait_for(lambda: steps.shared, 5)
    assert leaver.cancel()
    steps.go.release()
    steps.go.release()
    assert waiting.result(5) == "done"
    assert steps.left == [gone]
    assert len(steps.shared) <= 3


def test_exception_at_a_leaving_reaches_who_ran_beside_it_and_the_next_is_answered(
    steps: Steps, stepping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(entries: Sequence[Entry[Job, str]]) -> None:
        steps.running = []
        raise RuntimeError("a leaving fails")

    monkeypatch.setattr(steps, "leave", broken)
    batcher = stepping(batch_max=2)
    leaver, beside = batcher.submit(Job(steps=100)), batcher.submit(Job(steps=100))
    wait_for(lambda: len(steps.running) == 2, 5)
    assert leaver.cancel()
    steps.go.release()
    with pytest.raises(RuntimeError, match="a leaving fails"):
        beside.result(5)
    later = batcher.submit(Job())
    steps.go.release()
    assert later.result(5) == "done"


def test_exception_in_a_step_reaches_who_shared_it_only(steps: Steps, stepping: Any) -> None:
    batcher = stepping(batch_max=2)
    futures = [batcher.submit(Job()), batcher.submit(Job(fails=True))]
    wait_for(lambda: steps.running, 5)
    later = batcher.submit(Job())
    for _ in range(4):
        steps.go.release()
    outcomes = [type(f.exception(5)) for f in futures]
    assert outcomes in ([RuntimeError] * 2, [type(None), RuntimeError])  # the first may have been alone in its step
    assert later.result(5) == "done"


def test_listener_that_fails_hears_no_more_and_breaks_nothing(steps: Steps, stepping: Any) -> None:
    heard: list[str] = []

    def broken(delta: Delta) -> None:
        heard.append("broken")
        raise OSError

    batcher = stepping()
    steps.go.release()
    steps.go.release()
    steps.go.release()
    futures = [
        batcher.submit(Job(steps=2), broken),
        batcher.submit(Job(steps=2), lambda delta: heard.append(delta.text)),
    ]
    assert [f.result(5) for f in futures] == ["done"] * 2
    assert sorted(heard) == ["a", "a", "broken"]


def test_who_left_takes_no_place_in_the_queue(steps: Steps, stepping: Any) -> None:
    batcher = stepping(batch_max=1, queue_max=2)
    running = batcher.submit(Job())
    wait_for(lambda: steps.running, 5)
    for _ in range(20):
        assert batcher.submit(Job()).cancel()
    assert batcher.depth == 0
    assert len(batcher._waiting) <= 2  # their items are let go
    kept = [batcher.submit(Job()) for _ in range(2)]
    with pytest.raises(Full):
        batcher.submit(Job())
    for _ in range(3):
        steps.go.release()
    assert [f.result(5) for f in [running, *kept]] == ["done"] * 3


def test_retry_after_grows_with_the_time_an_item_takes(steps: Steps, stepping: Any) -> None:
    batcher = stepping(batch_max=1, queue_max=30)
    assert batcher.full_for_s is None
    first = [batcher.submit(Job()) for _ in range(12)]
    for _ in first:
        time.sleep(0.15)
        steps.go.release()
    wait(first, 5)
    quick = batcher._item_s
    assert 0.05 < quick != 0.5  # no more the first guess
    waiting = [batcher.submit(Job())]
    wait_for(lambda: steps.running, 5)
    waiting += [batcher.submit(Job()) for _ in range(30)]
    assert batcher.full_for_s == max(1, round(31 * quick))
    for _ in waiting:
        steps.go.release()
    wait(waiting, 5)
