"""What became of jobs since this process first looked, counted from their events, each once: a look reads the new ones only.

Every API process counts the same jobs: take the maximum over replicas, not the sum.
"""

from __future__ import annotations

import threading
from collections import Counter

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.models import STATUSES, JobEvent

# What an attempt's end without the job's may be called (service/jobs.py, worker/supervise.py); a run's own words count as `other`.
REASONS = (
    "lease_expired",
    "run_crashed",
    "no_result",
    "adapter_damaged",
    "run_folder_busy",
    "attempt_failed",
    "disk_full",
    "worker_stopping",
    "device_wanted",
    "device_busy",
    "resumed",
    "other",
)
_LATE = 1000  # a transaction may commit after one with a higher id: so many ids back are looked at again


class JobCounts:
    """Thread-safe."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def more(self, session: Session) -> tuple[Counter[str], Counter[str]]:
        """(entries by status, attempts that ended without the job's end by reason) since the last call."""
        entered, lost = Counter(dict.fromkeys(STATUSES, 0)), Counter(dict.fromkeys(REASONS, 0))
        with self._lock:
            if self._last is None:
                self._last = session.scalar(select(func.max(JobEvent.id))) or 0
                recent = select(JobEvent.id).where(JobEvent.id > self._last - _LATE)
                self._seen = set(session.scalars(recent))
                return entered, lost
            query = select(JobEvent.id, JobEvent.data).where(
                JobEvent.id > self._last - _LATE, JobEvent.type == "status"
            )
            for number, data in session.execute(query.order_by(JobEvent.id)):
                if number in self._seen:
                    continue
                self._seen.add(number)
                self._last = max(self._last, number)
                status, reason = data.get("status"), data.get("reason")
                if status in STATUSES:
                    entered[status] += 1
                if status == "failed":
                    reason = (data.get("error") or {}).get("code")
                    reason = reason if reason in ("lease_expired", "run_crashed") else None
                if reason is not None:
                    lost[reason if reason in REASONS else "other"] += 1
            self._seen = {n for n in self._seen if n > self._last - _LATE}
        return entered, lost
