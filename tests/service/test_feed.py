"""Many followers of a job cost one look at the database each half second, and each gets every event once, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from service import jobs
from service.db import Database
from service.events import MetricsEvent
from service.feed import Feed

pytestmark = pytest.mark.either_database

NewJob = Callable[..., str]
FOLLOWERS = 20


def write(database: Database, mine: jobs.Claim, first: int, n: int) -> None:
    events = [MetricsEvent(stage="optimizing", step=step, values={}) for step in range(first, first + n)]
    with database.write() as session:
        jobs.heartbeat(session, mine, 60, events)


def test_followers_share_the_looks_and_miss_nothing(database: Database, new_job: NewJob) -> None:
    job_id = new_job()
    with database.write() as session:
        mine = jobs.claim(session, job_id, 60)
    assert mine is not None
    looks, feed = [0], Feed(database, lambda row: {"seq": row.seq})
    look = feed._look

    def counted(job_id: str, after: int) -> Any:
        looks[0] += 1
        return look(job_id, after)

    feed._look = counted  # type: ignore[method-assign]

    async def follow(after: int, wait_s: float) -> list[int]:
        await asyncio.sleep(wait_s)
        seen: list[int] = []
        async for text in feed.follow(job_id, after):
            seen += [int(line[4:]) for line in (text or "").splitlines() if line.startswith("id: ")]
        return seen

    async def all_of_them() -> list[list[int]]:
        followers = [asyncio.create_task(follow(n % 2, n % 5 / 4)) for n in range(FOLLOWERS)]
        for number in range(4):
            await asyncio.to_thread(write, database, mine, 1 + 600 * number, 600)  # more than a page at once
            await asyncio.sleep(0.4)
        with database.write() as session:
            jobs.fail(session, mine, "x", "x")
        return await asyncio.wait_for(asyncio.gather(*followers), 60)

    for number, seen in enumerate(asyncio.run(all_of_them())):
        assert seen == list(range(1 + number % 2, 2 + 4 * 600 + 2))
    assert not feed._tails
    catching_up, polling = FOLLOWERS * 6, 30
    assert looks[0] < catching_up + polling


def test_what_a_look_meets_reaches_every_follower(database: Database, new_job: NewJob) -> None:
    job_id, feed = new_job(), Feed(database, lambda row: {})
    look = feed._look

    async def follow() -> None:
        async for text in feed.follow(job_id, 0):
            if text is None:
                feed._look = broken  # type: ignore[method-assign]

    def broken(job_id: str, after: int) -> Any:
        raise ConnectionError

    async def both() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(follow(), follow(), return_exceptions=True), 30)

    assert [type(error) for error in asyncio.run(both())] == [ConnectionError] * 2
    feed._look = look  # type: ignore[method-assign]
    with pytest.raises(asyncio.TimeoutError):  # a new follower starts anew: it waits for a job that nobody works on
        asyncio.run(asyncio.wait_for(follow_once(feed, job_id), 1))


async def follow_once(feed: Feed, job_id: str) -> None:
    async for _ in feed.follow(job_id, 0):
        pass
