"""Two real workers and the real `hscr` on one job: the preferences are those of one process, byte for byte."""

from __future__ import annotations

import io
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from benchmarks.bench_sharing import CONFIG, inputs, packed, workers
from hscr.artifacts import file_digest
from hscr.data_set import DataSet
from hscr.model import load_model
from hscr.shard import generate_shards
from service import jobs
from service.archive import ArchiveLimits
from service.datasets import import_upload
from service.db import Database, upgrade
from service.models import GenerationShard, JobEvent
from tests.conftest import wait_for

N = 12  # three batches


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_preferences_of_two_workers_are_one_processes(tmp_path: Path) -> None:
    """The job's run is put to sleep in its second batch until the helper has made the third."""
    model, data = inputs(tmp_path, N)
    alone = tmp_path / "alone.jsonl"
    list(generate_shards(load_model(model, device="cpu"), DataSet(data), CONFIG, [(0, N)], out=alone))
    folder = tmp_path / "service"
    folder.mkdir()
    url = f"sqlite:///{folder / 'hscr.db'}"
    upgrade(url)
    database = Database(url)
    stored = import_upload(database, folder, io.BytesIO(packed(data)), "x", ArchiveLimits(2**30, 1000), 1000)[0]
    with workers(folder, model, 2, worth=0.01):
        with database.write() as session:
            given = {"adapter_name": "x", "model": "x", "config": CONFIG.to_dict(), "review": True}
            job_id = jobs.create(session, dataset_id=stored.id, **given).id

        def shards() -> list[str]:
            with database.read() as session:
                return list(session.scalars(select(GenerationShard.status).where(GenerationShard.job_id == job_id)))

        def status() -> str:
            with database.read() as session:
                return jobs.get(session, job_id).status

        assert wait_for(shards, 300, "shards are offered") == ["open"]
        (run,) = (p for p in psutil.process_iter(["cmdline"]) if is_run_of(job_id, p.info["cmdline"] or []))
        run.suspend()
        wait_for(lambda: shards() == ["done"], 300, "the helper has made its shard")
        run.resume()
        wait_for(lambda: status() == "awaiting_review", 300, "the generation ends")
    (made,) = (folder / "runs" / job_id).glob("attempt-*/preferences.jsonl")
    with database.read() as session:
        parts = session.scalars(select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "part")).all()
    database.close()
    assert parts == [{"stage": "generating", "first": 9, "last": 12}]
    assert file_digest(made) == file_digest(alone)


def is_run_of(job_id: str, line: list[str]) -> bool:
    return "--out" in line and any(job_id in part for part in line)
