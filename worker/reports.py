"""Publishing a run's report: its page and its numbers, under the digest of their content. The predictions stay in the run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from hscr.artifacts import write_manifest
from service.adapters import sync_tree
from service.reports import FILES, folder


def store_report(data_dir: Path, work: Path) -> str | None:
    """Copy the report's files to their place; its name, or None where the run wrote none."""
    present = [name for name in FILES if (work / name).is_file()]
    if not present:
        return None
    incoming = folder(data_dir, f".{work.parent.name}.{work.name}")
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    for name in present:
        shutil.copyfile(work / name, incoming / name)
    digest = write_manifest(incoming).replace(":", "-")
    sync_tree(incoming)
    final = folder(data_dir, digest)
    try:
        incoming.rename(final)
    except OSError:  # an earlier attempt stored the same report
        shutil.rmtree(incoming, ignore_errors=True)
    return digest
