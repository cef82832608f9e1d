"""Which stage a run is in, how long each took over all attempts at the job, and a span of each that is over."""

from __future__ import annotations

import time

from service import tracing
from service.events import StageEvent


class Stages:
    """`seconds` by stage are those of earlier attempts too, once they are put there."""

    def __init__(self, attempt: int) -> None:
        self.seconds: dict[str, float] = {}
        self.generated = False  # the preferences are whole
        self._attempt = attempt
        self._now: str | None = None
        self._entered = self._booked = time.monotonic()

    def take(self, event: StageEvent) -> None:
        """A stage begins or ends."""
        self.book()
        self.close()
        self._now = event.stage if event.status == "started" else None
        self.generated |= event.stage == "generating" and event.status != "started"

    def book(self) -> None:
        """Book the time since the last look to the stage that is under way."""
        instant = time.monotonic()
        if self._now is not None:
            self.seconds[self._now] = round(self.seconds.get(self._now, 0.0) + instant - self._booked, 3)
        self._booked = instant

    def close(self) -> None:
        """The stage that was under way is over."""
        instant = time.monotonic()
        if self._now is not None:
            tracing.past(f"job.{self._now}", self._entered, instant, attempt=self._attempt)
        self._entered = instant
