"""Backup and restore of a whole service while it runs: database, data sets, adapters, reports, and the folders of jobs that stand still.

The database first, then the files that its rows name: rows are written after their files are whole, files never change under their digest,
and nothing is collected meanwhile, so each row of the copy finds its files. A job that runs goes on in the copy from its beginning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from hscr import __version__
from hscr.artifacts import MANIFEST, verify_manifest, write_json, write_manifest
from service import artifact_store, audit, run_folders, snapshot
from service.artifact_store import KINDS, Artifact, ArtifactStore, LocalStore, open_store, sync_tree
from service.db import Database, now
from service.errors import Problem
from service.retention import artifacts_held
from service.settings import Settings

ABOUT, DATABASE, DATA = "backup.json", "database", "data"
FORMAT = 1
_STILL = "SELECT id FROM jobs WHERE status NOT IN ('queued', 'running') AND files_removed_at IS NULL"
_BEGUN = "SELECT id FROM jobs WHERE status = 'running' OR (status = 'queued' AND attempts > 0) ORDER BY id"


@dataclass(frozen=True)
class Report:
    """What a backup holds or a restore brought back; `damaged` and `busy` are digests and job ids that it does not hold whole."""

    counts: dict[str, int]
    audit: str
    damaged: list[str]
    busy: list[str]


def backup(settings: Settings, out: Path) -> Report:
    """Write a backup into the new folder `out`, whole or not at all. ValueError where it exists, or there is nothing to back up."""
    if out.exists():
        raise ValueError(f"{out.name}: exists already; a backup is a folder of its own")
    if not settings.data_dir.is_dir():
        raise ValueError("there is no such data folder; nothing to back up")
    incoming = out.with_name(f".{out.name}.{uuid4().hex[:8]}.tmp")
    (incoming / DATABASE).mkdir(parents=True)
    try:
        with _held(settings), snapshot.take(settings.database, incoming / DATABASE) as taken:
            damaged = _copy_artifacts(open_store(settings), incoming / DATA, taken)
            still = taken.rows(_STILL)
            busy = taken.rows(_BEGUN)
            busy += [job for job in still if not _copy_run(settings.data_dir, incoming / DATA, job)]
            counts = {name: taken.rows(f'SELECT count(*) FROM "{name}"')[0] for name in taken.tables}
            end = [taken.rows(f"SELECT {column} FROM audit_head")[0] for column in ("number", "digest")]
            report = Report(counts, f"{end[0]}:{end[1]}", damaged, busy)
            about = {"format": FORMAT, "hscr": __version__, "created_at": now().isoformat(), "database": taken.kind}
            about |= {"revision": taken.revision, "tables": taken.tables, "counts": counts, "audit": report.audit}
        write_json(incoming / ABOUT, {**about, "damaged": damaged, "busy": busy})
        write_manifest(incoming)
        sync_tree(incoming)
        incoming.rename(out)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return report


def restore(settings: Settings, source: Path) -> Report:
    """Bring a backup back into an empty data folder and an empty database. ValueError where something is in the way, or it is damaged.

    The database comes last: what a restore that was cut off leaves has none.
    """
    about = _about(source)
    place = settings.data_dir
    in_the_way = [name for name in ("datasets", "artifacts", "runs") if (place / name).exists()]
    if in_the_way:
        raise ValueError(f"the data folder has {', '.join(in_the_way)} already; restore into an empty one")
    snapshot.check_empty(settings.database)
    place.mkdir(parents=True, exist_ok=True)
    incoming = place / f".restoring-{uuid4().hex[:8]}"
    try:
        shutil.copytree(source / DATA / "runs", incoming / "runs")
        sync_tree(incoming)
        _store_artifacts(LocalStore.below(source / DATA), open_store(settings))
        (incoming / "runs").rename(place / "runs")
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    snapshot.put_back(settings.database, source / DATABASE, about["database"], about["revision"], about["tables"])
    database = Database(settings.database)
    try:
        with database.read() as session:
            number, _, digest = about["audit"].partition(":")
            seen = audit.verify(session, (int(number), digest) if int(number) else None)
    finally:
        database.close()
    if seen.findings:
        raise ValueError(f"the audit does not hold: {'; '.join(seen.findings)}")
    return Report(about["counts"], about["audit"], about["damaged"], about["busy"])


def _about(source: Path) -> dict[str, Any]:
    """What the backup says of itself, after every byte of it was checked."""
    if not (source / ABOUT).is_file():
        raise ValueError(f"{source.name}: is no backup of this service (it has no {ABOUT})")
    verify_manifest(source)
    about: dict[str, Any] = json.loads((source / ABOUT).read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{source.name}: is a backup of another form; restore it with the version that made it")
    return about


@contextmanager
def _held(settings: Settings) -> Iterator[None]:
    """Nothing is collected meanwhile, by this host or another."""
    database = Database(settings.database)
    try:
        with artifacts_held(settings.data_dir, database):
            yield
    finally:
        database.close()


def _copy_artifacts(store: ArtifactStore, out: Path, taken: snapshot.Taken) -> list[str]:
    """Copy what the rows name out of the store; the digests of what is missing or changed. Raises Problem where the store is away."""
    digests = taken.rows("SELECT digest FROM datasets GROUP BY digest ORDER BY digest")
    files = taken.rows("SELECT max(files_digest) FROM datasets GROUP BY digest ORDER BY digest")
    named = [(d, artifact_store.data_set(d, known)) for d, known in zip(digests, files, strict=True)]
    named += [(d, artifact_store.adapter(d)) for d in taken.rows("SELECT DISTINCT digest FROM adapter_versions")]
    reports = taken.rows("SELECT DISTINCT report FROM jobs WHERE report IS NOT NULL")
    named += [(name, artifact_store.report(name)) for name in reports]
    damaged = [digest for digest, artifact in named if not _copied(store, artifact, out)]
    for name in ("datasets", "artifacts", "runs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    return damaged


def _copied(store: ArtifactStore, artifact: Artifact, out: Path) -> bool:
    """Whether a whole copy is there now; without a manifest (a data set stored by an earlier version) nobody can say."""
    target = LocalStore.below(out).folder(artifact)
    try:
        with store.lent(artifact) as folder:
            shutil.copytree(folder, target)
        if artifact.files is not None or (target / MANIFEST).is_file():
            verify_manifest(target, artifact.files)
    except (Problem, ValueError) as error:
        if isinstance(error, Problem) and error.code != "artifact_damaged":
            raise
        return False
    return True


def _store_artifacts(source: LocalStore, store: ArtifactStore) -> None:
    """Bring a backup's artifacts into the store of this deployment, wherever it lies."""
    for kind in KINDS:
        for name in source.names(kind):
            folder = source.fetch(Artifact(kind, name, None))
            if (folder / MANIFEST).is_file():
                store.put(Artifact(kind, name, verify_manifest(folder)), folder)
            else:  # of an earlier version
                with TemporaryDirectory() as scratch:
                    copy = Path(shutil.copytree(folder, Path(scratch) / name))
                    write_manifest(copy)
                    store.put(Artifact(kind, name, None), copy)


def _copy_run(data_dir: Path, out: Path, job_id: str) -> bool:
    """Copy the folder of a job that no process works on; False where one does. A job without a folder has nothing to copy."""
    source = run_folders.folder(data_dir, job_id)
    if not source.is_dir():
        return True
    with (source / run_folders.LOCK).open("a") as file:
        if not run_folders.try_lock(file.fileno()):
            return False
        # Without parts: a helper may still be writing one, and what is missing of them the run makes itself.
        left_out = shutil.ignore_patterns(run_folders.LOCK, run_folders.HELPERS, run_folders.PARTS)
        shutil.copytree(source, run_folders.folder(out, job_id), ignore=left_out)
    return True
