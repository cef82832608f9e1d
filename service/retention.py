"""What is not kept for ever: deleted jobs, the folders of ended runs, old idempotency keys, artifacts that no row points at.

Rows first, files after: whoever dies in between leaves files that the sweep's next round removes. Everything here may be done twice and by
two processes at once.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

from sqlalchemy import ColumnElement, delete, or_, select
from sqlalchemy.orm import Session

from service import jobs, run_folders
from service.artifact_store import ADAPTERS, DATASETS, REPORTS, ArtifactStore, LocalStore, open_store
from service.db import Database, alone, now
from service.errors import Problem
from service.models import (
    AdapterVersion,
    Dataset,
    GenerationShard,
    IdempotencyKey,
    Job,
    JobEvent,
    Outbox,
    PreferenceEdit,
    WebhookDelivery,
)
from service.settings import Settings

BATCH = 100
_HOLD = "artifacts"
_COLUMNS = {ADAPTERS: AdapterVersion.digest, REPORTS: Job.report, DATASETS: Dataset.digest}


def delete_job(session: Session, job_id: str) -> bool:
    """Forget an ended job: its events, its words and, by `free`, its files; False where it is forgotten already. Raises Problem.

    Its row stays, without what the caller wrote: versions, data sets and the audit lead to it.
    """
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if job is None:
        raise Problem("job_not_found", "No job has this id; GET /jobs lists them.")
    if job.status not in jobs.ENDED:
        raise Problem("job_not_ended", "Cancel the job first: POST /jobs/{id}/cancel.")
    if job.deleted_at is not None:
        return False
    job.deleted_at, job.meta, job.report, job.progress, job.webhook = now(), {}, None, None, None
    job.promote = None
    for table in (JobEvent, IdempotencyKey, Outbox, PreferenceEdit, WebhookDelivery, GenerationShard):
        session.execute(delete(table).where(table.job_id == job_id))
    session.flush()
    return True


def free(database: Database, data_dir: Path, job_id: str) -> bool:
    """Remove an ended job's folder; False where the job goes on or a process still holds the folder.

    The rename happens under the row's lock, so that no retry comes in between.
    """
    with database.write() as session:
        job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
        if job is None or job.status not in jobs.ENDED:
            return False
        try:
            gone = run_folders.put_aside(data_dir, job_id)
        except run_folders.Busy:
            return False
        job.files_removed_at = now()
    run_folders.discard(gone)
    return True


def clean(database: Database, settings: Settings) -> int:
    """One round of the sweep; how many things went."""
    with database.read() as session:
        due: ColumnElement[bool] = Job.deleted_at.is_not(None)
        if settings.keep_runs_s is not None:
            due = or_(due, Job.finished_at < now() - timedelta(seconds=settings.keep_runs_s))
        query = select(Job.id).where(Job.files_removed_at.is_(None), Job.status.in_(jobs.ENDED), due)
        ids = session.scalars(query.order_by(Job.finished_at).limit(BATCH)).all()
    done = sum(free(database, settings.data_dir, job_id) for job_id in ids)
    with database.write() as session:
        old = IdempotencyKey.created_at < now() - timedelta(seconds=settings.keep_idempotency_s)
        done += session.execute(delete(IdempotencyKey).where(old)).rowcount  # type: ignore[attr-defined]
    done += run_folders.clear_aside(settings.data_dir / "runs")
    return done + collect(database, settings.data_dir, open_store(settings))


@contextmanager
def artifacts_held(data_dir: Path, database: Database | None = None) -> Iterator[None]:
    """While an artifact is stored and its row not yet committed: nothing is collected. Many may hold it together.

    With `database` also against other hosts that share it.
    """
    with _lock_file(data_dir).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with database.shared(_HOLD) if database else nullcontext():
            yield


def collect(database: Database, data_dir: Path, store: ArtifactStore | None = None) -> int:
    """Remove artifacts that no row points at: of deleted jobs, and of attempts and uploads that died before their rows; how many.

    Does nothing while anybody publishes. `store`: the data folder's own where None. Raises Problem where it is away.
    """
    store = store or LocalStore.below(data_dir)
    with _lock_file(data_dir).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        gone = 0
        with database.read() as session:
            if not alone(session, _HOLD):
                return 0
            for kind, column in _COLUMNS.items():
                names = {name if kind == REPORTS else name.replace("-", ":", 1): name for name in store.names(kind)}
                for some in (list(names)[i : i + 500] for i in range(0, len(names), 500)):
                    kept = set(session.scalars(select(column).where(column.in_(some))))
                    gone += sum(store.remove(kind, names[name]) for name in some if name not in kept)
    store.clear()
    return gone


def collect_now(database: Database, data_dir: Path, store: ArtifactStore) -> None:
    """`collect` for a caller who waits for it; left to the sweep where the store is away."""
    with suppress(Problem):
        collect(database, data_dir, store)


def _lock_file(data_dir: Path) -> Path:
    path = data_dir / "artifacts" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
