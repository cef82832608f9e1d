"""Publishing a run's report: its page and its numbers, under the digest of their content. The predictions stay in the run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from hscr.artifacts import write_manifest
from service import artifact_store
from service.artifact_store import ArtifactStore
from service.reports import FILES


def store_report(store: ArtifactStore, work: Path) -> str | None:
    """Store the report's files; its name, or None where the run wrote none."""
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
