"""The events of jobs for whoever follows them: one look at the database a job and half second, however many streams are open.

A follower who is behind reads its own pages until it has caught up; from then on it gets what the job's one poll found, already written
as server-sent events. Lives in the API's event loop; the database is asked in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from service import jobs
from service.db import Database
from service.event_stream import event

POLL_S, PAGE = 0.5, 500


@dataclass
class _Tail:
    """What the last poll of a job found: the events after `start` up to `end`. `over`: the job has ended and `end` is its last."""

    start: int
    end: int
    followers: int = 0
    events: list[tuple[int, str]] = field(default_factory=list)
    over: bool = False
    error: BaseException | None = None
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    def __init__(self, database: Database, view: Callable[[jobs.EventRow], dict[str, object]]) -> None:
        """`view` gives an event its public form."""
        self._database, self._view = database, view
        self._tails: dict[str, _Tail] = {}
        self._polls: set[asyncio.Task[None]] = set()

    async def follow(self, job_id: str, after: int) -> AsyncGenerator[str | None, None]:
        """Text of the events after `after`, as they come, and None at least twice a second; ends with the job. Raises what a poll met."""
        while True:
            events, over = await asyncio.to_thread(self._look, job_id, after)
            if events:
                after = events[-1][0]
                yield "".join(text for _, text in events)
            if over:
                return
            if len(events) < PAGE:
                break
        tail = self._join(job_id, after)
        try:
            while True:
                turn = tail.turn
                if tail.error is not None:
                    raise tail.error
                if after < tail.start:  # fell behind: the poll is two looks further
                    events, _ = await asyncio.to_thread(self._look, job_id, after)
                else:
                    events = [event for event in tail.events if event[0] > after]
                if events:
                    after = events[-1][0]
                    yield "".join(text for _, text in events)
                    continue
                if tail.over:
                    return
                await turn.wait()
                yield None
        finally:
            tail.followers -= 1

    def _join(self, job_id: str, after: int) -> _Tail:
        tail = self._tails.get(job_id)
        if tail is None:
            tail = self._tails[job_id] = _Tail(after, after)
            poll = asyncio.create_task(self._poll(job_id, tail))
            self._polls.add(poll)  # the loop itself holds tasks weakly
            poll.add_done_callback(self._polls.discard)
        tail.followers += 1
        return tail

    async def _poll(self, job_id: str, tail: _Tail) -> None:
        try:
            while tail.followers > 0 and not tail.over:
                found, tail.over = await asyncio.to_thread(self._look, job_id, tail.end)
                if found:
                    tail.start, tail.end, tail.events = tail.end, found[-1][0], found
                tail.turn.set()
                tail.turn = asyncio.Event()
                if len(found) < PAGE and not tail.over:
                    await asyncio.sleep(POLL_S)
        except Exception as error:
            tail.error = error
        finally:
            if self._tails.get(job_id) is tail:
                del self._tails[job_id]
            tail.turn.set()

    def _look(self, job_id: str, after: int) -> tuple[list[tuple[int, str]], bool]:
        """The next events, and whether they are the last. An earlier ending is not the last where the job was retried."""
        with self._database.read() as session:
            job = jobs.look(session, job_id)  # first: what is written after it is found by the next look
            rows = jobs.events_after(session, job_id, after, PAGE)
            last = rows[-1].seq if rows else after
            over = job.status in jobs.ENDED and (last >= job.last_seq or job.deleted_at is not None)
        return [(row.seq, self._text(row)) for row in rows], over

    def _text(self, row: jobs.EventRow) -> str:
        return event(row.type, self._view(row), row.seq)
