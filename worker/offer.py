"""Whether a run's generation is worth sharing, and in which shards: seen from how long it takes, and how long it took to begin.

Who helps must load the model first, so what is left shall take several times that. Shards are small, for at the end somebody works on one
that the run makes itself. Knows no rows.
"""

from __future__ import annotations

import time

from hscr.parts import shard_bounds
from service.events import ProgressEvent, RunEvent

MOST = 64  # parts of one generation
SHORTEST_S = 0.2  # of a part: to claim it, tell it and book it takes one or two hundredths of a second


class Offer:
    """Fed with a run's events, it says once what to offer.

    `batch_size` is the generation's; it is shared where what is left takes `worth` times as long as a run's start.
    """

    def __init__(self, batch_size: int, worth: float) -> None:
        self._batch_size, self._worth = batch_size, worth
        self._began = time.monotonic()
        self._start_s: float | None = None
        self._at_first = 0
        self.parts = 0
        self.bounds: list[tuple[int, int, int]] = []  # (number, start, stop) of each shard, once they are known

    def take(self, event: RunEvent) -> None:
        """The first word of the generation says how long the start took, the next one how fast it goes."""
        if not isinstance(event, ProgressEvent) or event.stage != "generating" or self.parts:
            return
        if self._start_s is None:
            self._start_s, self._at_first = time.monotonic() - self._began, event.done
        elif event.done > self._at_first and event.eta_s is not None:
            whole_s = event.eta_s * event.total / max(1, event.total - event.done)
            most = min(MOST, int(whole_s / SHORTEST_S), -(-event.total // self._batch_size))
            self.parts = max(1, most) if event.eta_s >= self._worth * self._start_s else 1
            found = ((n, *shard_bounds(event.total, self._batch_size, n, self.parts)) for n in range(2, self.parts + 1))
            self.bounds = [(n, start, stop) for n, start, stop in found if start > event.done]
