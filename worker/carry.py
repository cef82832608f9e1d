"""Work of the artifact store's that may take long, beside the attempt that needs it: in a thread, while the attempt renews its lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from service.errors import Problem

Result = TypeVar("Result")
TICK_S = 0.1
PAUSE_MAX_S = 30.0


class Interrupted(Exception):
    """The attempt is asked to stop; what was begun may be left as it is, for nothing points at it."""


def carry(work: Callable[[], Result], tend: Callable[[], bool], *, wait_s: float, grace_s: float) -> Result:
    """The work's result. Where the store is away it is tried again, with growing pauses, until `wait_s` are over.

    `tend` is called all the while and says whether the attempt is asked to stop: work under way gets `grace_s`, a pause ends at once.
    Raises Interrupted, Problem, and what the work raises.
    """
    until, pause = time.monotonic() + wait_s, 1.0
    while True:
        try:
            return _beside(work, tend, grace_s)
        except Problem as problem:
            if problem.code != "artifacts_unavailable" or time.monotonic() + pause > until:
                raise
        end = time.monotonic() + pause
        while time.monotonic() < end:
            if tend():
                raise Interrupted
            time.sleep(TICK_S)
        pause = min(2 * pause, PAUSE_MAX_S)


def _beside(work: Callable[[], Result], tend: Callable[[], bool], grace_s: float) -> Result:
    ended: list[Result] = []
    failed: list[BaseException] = []

    def begin() -> None:
        try:
            ended.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=begin, daemon=True, name="artifacts")
    thread.start()
    asked_at: float | None = None
    thread.join(TICK_S)
    while thread.is_alive():
        if tend():
            asked_at = asked_at or time.monotonic()
            if time.monotonic() - asked_at > grace_s:
                raise Interrupted
        thread.join(TICK_S)
    if failed:
        raise failed[0]
    return ended[0]
