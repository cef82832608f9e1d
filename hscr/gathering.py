"""Who waits for whom while answers are decoded: several newcomers cost little more than one, and all that run stand still for either."""

from __future__ import annotations

STEPS = 3


class Gathering:
    """Holds those who came until they are a quarter of what runs, or have waited STEPS steps. Asked once a step; decision 0064."""

    def __init__(self) -> None:
        self._held = 0  # steps that somebody has waited

    def holds(self, waiting: int, running: int) -> bool:
        """Whether those who wait do so for one step more."""
        hold = 0 < 4 * waiting < running and self._held < STEPS
        self._held = self._held + 1 if hold else 0
        return hold
