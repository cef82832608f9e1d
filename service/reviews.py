"""Corrections of a job's generated preferences, while it awaits review: records and levels rejected, levels corrected.

They are rows until the run that optimises gets them as one file (hscr/review.py applies them). Words are kept with the job and go when it
is deleted; the audit and the version keep numbers and digests. No torch and no web framework here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hscr.artifacts import bytes_digest, json_digest
from hscr.records import PreferenceRecord, preference_record
from hscr.review import LevelReview, corrected_levels
from service import audit, preferences
from service.db import now
from service.errors import Problem
from service.models import Job, PreferenceEdit


def amend(
    session: Session,
    data_dir: Path,
    by: str,
    job_id: str,
    number: int,
    *,
    rejected: bool | None,
    levels: Mapping[int, Mapping[str, Any]],
) -> tuple[PreferenceRecord, PreferenceEdit | None]:
    """Lay a change over what was said of a record before; the record and what now stands (None: nothing). Raises Problem.

    Of a level, `rejected` and `text` are set where they are given; the text None takes a correction back.
    """
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)  # an approval waits, or has been
    if job is None:
        raise Problem("job_not_found", "No job has this id; GET /jobs lists them.")
    if job.status != "awaiting_review":
        rule = "Preferences can be corrected while the job awaits review (POST /align with review: true)"
        raise Problem("job_elsewhere", f"{rule}; this one is {job.status.replace('_', ' ')}.")
    line = _line(data_dir, job_id, number)
    preference, edit = preference_record(json.loads(line)), session.get(PreferenceEdit, (job_id, number))
    before = (edit.rejected, edit.levels) if edit else (False, {})
    after = (before[0] if rejected is None else rejected, _laid_over(before[1], levels))
    try:
        corrected_levels(preference, {int(n): LevelReview(**level) for n, level in after[1].items()})
    except ValueError as error:
        raise Problem("invalid_correction", f"{error}.") from None
    if after != before:
        edit = _stored(session, edit, by, job_id, number, bytes_digest(line), after)
        audit.record(session, by, "preference.review", job_id, record=number, **_told(after))
    return preference, edit


def of_records(session: Session, job_id: str, numbers: Sequence[int]) -> dict[int, PreferenceEdit]:
    query = select(PreferenceEdit).where(PreferenceEdit.job_id == job_id, PreferenceEdit.number.in_(numbers))
    return {edit.number: edit for edit in session.scalars(query)}


def for_run(session: Session, job_id: str) -> dict[str, Any] | None:
    """The review file of a job's run, the same for every attempt; None where nothing was corrected."""
    query = select(PreferenceEdit).where(PreferenceEdit.job_id == job_id).order_by(PreferenceEdit.number)
    rows = {str(e.number): {"line": e.line, "rejected": e.rejected, "levels": e.levels} for e in session.scalars(query)}
    return {"records": rows} if rows else None


def counts(review: dict[str, Any]) -> dict[str, int]:
    """How much a review changes: what the lineage says of it."""
    rows = list(review["records"].values())
    levels = [level for row in rows if not row["rejected"] for level in row["levels"].values()]
    rejected = sum(level["rejected"] for level in levels)
    return {
        "records_rejected": sum(row["rejected"] for row in rows),
        "levels_rejected": rejected,
        "levels_corrected": len(levels) - rejected,
    }


def _line(data_dir: Path, job_id: str, number: int) -> bytes:
    with preferences.opened(data_dir, job_id) as file:
        line = next(itertools.islice(file, number - 1, number), b"")
    if not line.endswith(b"\n"):
        raise Problem("record_not_found", "The job has no preference record of this number; they count from 1.")
    return line


def _laid_over(before: dict[str, Any], changes: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    levels = {int(n): LevelReview(**level) for n, level in before.items()}
    for number, change in changes.items():
        levels[number] = LevelReview(**{**asdict(levels.get(number, LevelReview())), **change})
    standing = sorted((n, level) for n, level in levels.items() if level != LevelReview())
    return {str(n): asdict(level) for n, level in standing}


def _stored(
    session: Session,
    edit: PreferenceEdit | None,
    by: str,
    job_id: str,
    number: int,
    line: str,
    after: tuple[bool, dict[str, Any]],
) -> PreferenceEdit | None:
    if edit is not None and after == (False, {}):
        session.delete(edit)
        session.flush()
        return None
    if edit is None:
        edit = PreferenceEdit(job_id=job_id, number=number)
        session.add(edit)
    edit.line, edit.actor, edit.updated_at = line, by, now()
    edit.rejected, edit.levels = after
    session.flush()
    return edit


def _told(after: tuple[bool, dict[str, Any]]) -> dict[str, Any]:
    """What the audit says: no word of a correction, but a digest that proves which it was."""
    rejected, levels = after
    gone = [int(n) for n, level in levels.items() if level["rejected"]]
    corrected = [int(n) for n, level in levels.items() if not level["rejected"]]
    return {
        "rejected": rejected,
        "levels_rejected": gone,
        "levels_corrected": corrected,
        "digest": json_digest([rejected, levels]),
    }
