"""What a run that is done leaves: its adapter and its report, stored under the digests of their content before any row names them.

The predictions stay in the run's folder. Knows no database.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hscr.artifacts import file_digest, write_manifest
from service import artifact_store, preferences, reviews
from service.artifact_store import ArtifactStore
from service.events import ResultEvent
from service.reports import FILES
from worker.command import REVIEW


class AdapterDamaged(Exception):
    """The adapter's files are not what its manifest says."""


def store_made(
    store: ArtifactStore, work: Path, result: ResultEvent, carry: Callable[[Callable[[], Any]], Any]
) -> dict[str, Any]:
    """Store the adapter (if any) and the report; what the job's row says of them. Raises AdapterDamaged, and what `carry` raises."""
    if result.adapter is not None:
        made, source = artifact_store.adapter(result.digest), work / result.adapter
        try:
            carry(lambda: store.put(made, source))
        except ValueError:
            raise AdapterDamaged from None
    report = carry(lambda: store_report(store, work))
    return {"digest": result.digest, "result": result.metrics, "report": report}


def store_report(store: ArtifactStore, work: Path) -> str | None:
    """Store the report's files, its page and its numbers; its name, or None where the run wrote none."""
    present = [name for name in FILES if (work / name).is_file()]
    if not present:
        return None
    made = work / ".report"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        for name in present:
            shutil.copyfile(work / name, made / name)
        name = write_manifest(made).replace(":", "-")
        store.put(artifact_store.report(name), made, give=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return name


def learnt(work: Path, review: dict[str, Any] | None) -> dict[str, Any]:
    """What the adapter was optimised on, and what a person had changed of it."""
    generated = work / preferences.FILE
    used = generated if review is None else work / preferences.REVIEWED
    values: dict[str, Any] = {"preferences_digest": file_digest(used) if used.is_file() else None}
    if review is not None:
        digests = {"digest": file_digest(work.parent / REVIEW), "generated_digest": file_digest(generated)}
        values["review"] = digests | reviews.counts(review)
    return values
