"""Where a job's runs lie: DATA/runs/<job>/attempt-<fence>/. The worker writes there (worker/attempt.py), the API only reads."""

from __future__ import annotations

import re
from pathlib import Path

_ATTEMPT = re.compile(r"^attempt-(\d+)$")


def folder(data_dir: Path, job_id: str) -> Path:
    return data_dir / "runs" / job_id


def attempts(job_folder: Path) -> list[Path]:
    """Attempt folders of a job, oldest first; none where it was never claimed."""
    if not job_folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in job_folder.iterdir() if (m := _ATTEMPT.match(p.name))]
    return [path for _, path in sorted(found)]
