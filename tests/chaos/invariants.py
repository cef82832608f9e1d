"""What must hold after any faults, read from the database, the store, the run folders and the witnesses of the runs."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import psutil
from sqlalchemy import func, select

from hscr.artifacts import verify_manifest
from service import adapters, audit, jobs
from service.db import Database
from service.models import AdapterVersion, IdempotencyKey, Job, Outbox


def check(database: Database, data_dir: Path, witness: Path, accepted: dict[str, str]) -> None:
    """`accepted`: the id that was answered for each Idempotency-Key. All jobs have ended. AssertionError says what is broken."""
    with database.read() as session:
        known = {job.id: job for job in session.scalars(select(Job))}
        assert set(accepted.values()) <= set(known), "an accepted job is lost"
        assert len(set(accepted.values())) == len(accepted), "two keys were answered with one job"
        n_keys = session.scalar(select(func.count()).select_from(IdempotencyKey))
        assert n_keys == len(known), "a request that was sent twice made two jobs"
        assert not session.scalars(select(Outbox.job_id)).all(), "bells that nobody rings"
        made = dict(session.execute(select(AdapterVersion.job_id, func.count()).group_by(AdapterVersion.job_id)).all())
        for job in known.values():
            assert job.status in ("succeeded", "cancelled"), f"{job.id} is {job.status}: {job.error_code}"
            assert made.get(job.id, 0) == (job.status == "succeeded"), (
                f"{job.id} is {job.status} with {made.get(job.id)} versions"
            )
            rows = jobs.events_after(session, job.id, 0, 100_000)
            assert [row.seq for row in rows] == list(range(1, len(rows) + 1)), f"{job.id}: its events have gaps"
            assert job.last_seq == len(rows)
            walk = [row.data["status"] for row in rows if row.type == "status"]
            assert (walk[0], walk[-1]) == ("queued", job.status)
            for before, after in pairwise(walk):
                assert after in jobs.TRANSITIONS[before], f"{job.id}: {before} -> {after}"
            fences = [row.fence for row in rows]
            assert fences == sorted(fences), f"{job.id}: a superseded attempt wrote"
        versions = session.scalars(select(AdapterVersion)).all()
        assert audit.verify(session).findings == []
    digests = {version.digest for version in versions}
    for digest in digests:
        verify_manifest(adapters.folder(data_dir, digest), digest)
    stored = {path.name.replace("-", ":", 1) for path in (data_dir / "artifacts" / "adapters").glob("*")}
    assert stored <= digests, "files that no row points at"
    assert not list((data_dir / "artifacts").rglob("*.tmp")), "half an artifact"
    assert {path.name for path in (data_dir / "runs").glob("*")} <= set(known), "run folders of no job"
    overlaps = [path.stem for path in witness.glob("*.overlap")]
    assert not overlaps, f"two runs of one job at once: {overlaps}"
    same: defaultdict[tuple[str, int], defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for version in versions:
        same[version.dataset_id, version.config["seed"]][version.digest].append(version.job_id or "")
    for (dataset, seed), found in same.items():
        odd = sorted(found.values(), key=len)[:-1]
        assert not odd, f"equal runs (data set {dataset}, seed {seed}) gave different adapters, others than most: {odd}"


def orphans(data_dir: Path, real_runs: int | None) -> list[str]:
    """Command lines of runs that work in this data folder; `real_runs` is the process that forks the real ones."""
    found = []
    for process in psutil.process_iter(["cmdline", "status", "ppid"]):
        line = " ".join(process.info["cmdline"] or [])
        of_ours = str(data_dir / "runs") in line or process.info["ppid"] == real_runs
        if of_ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found
