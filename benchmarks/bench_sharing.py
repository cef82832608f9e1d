"""One job's generation on one and on more workers of the service: real processes, the real `hscr`, the very bytes compared first.

Everything is on this machine, one thread a worker, so it takes idle cores to see the gain; the load is printed beside the times.

python -m benchmarks.bench_sharing [--records 96] [--workers 2] [--repeats 2] [--worth 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from benchmarks.llava import Shape, report, save_data, save_llava
from hscr.artifacts import file_digest
from hscr.config import AlignConfig, preset
from service import jobs
from service.archive import ArchiveLimits
from service.datasets import import_upload
from service.db import Database, upgrade
from service.models import Job, JobEvent
from service.up import _free_port, valkey_binary

HERE = Path(__file__).resolve().parent.parent
TOKENS = 24
CONFIG = AlignConfig.from_dict(
    {
        "preference": {
            "similarity": "token_f1",
            "continuation": "redecode",
            "max_new_tokens": TOKENS,
            "batch_size": 4,
        }
    },
    preset("recommended"),
)


@dataclass(frozen=True)
class Shared:
    """What one job's generation took, what it made, and how many of its records came from helpers."""

    seconds: float
    digest: str
    taken: int


@contextmanager
def workers(folder: Path, model: Path, n: int, worth: float) -> Iterator[None]:
    """Valkey, sweep and n workers that are ready, on the database and data folder in `folder`."""
    port = _free_port()
    environment = dict(os.environ) | {
        "DATABASE_URL": f"sqlite:///{folder / 'hscr.db'}",
        "REDIS_URL": f"redis://127.0.0.1:{port}/0",
        "HSCR_DATA_DIR": str(folder),
        "HSCR_MODEL": str(model),
        "HSCR_FEATURE_CACHE": "off",
        "HSCR_SHARE_WORTH": str(worth),
        "HSCR_SWEEP_INTERVAL_S": "0.2",
        "PYTHONPATH": str(HERE),
        "HF_HUB_OFFLINE": "1",
    }
    worker = [sys.executable, "-m", "celery", "-A", "worker.tasks", "worker", "--concurrency=1", "--loglevel=INFO"]
    worker += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-n"]
    commands = [[valkey_binary(), "--bind", "127.0.0.1", "--port", str(port), "--save", ""]]
    commands += [[*worker, f"w{i}@here"] for i in range(n)] + [[sys.executable, "-m", "worker.sweep"]]
    logs = [folder / f"process-{i}.log" for i in range(len(commands))]
    started = []
    try:
        for command, path in zip(commands, logs, strict=True):
            with path.open("wb") as log:
                started.append(subprocess.Popen(command, cwd=HERE, env=environment, stdout=log, stderr=log))
        until = time.monotonic() + 120
        while not all(b"ready" in path.read_bytes() for path in logs[1:-1]):
            if time.monotonic() > until:
                raise SystemExit("the workers did not start")
            time.sleep(0.1)
        yield
    finally:
        for process in reversed(started):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def packed(data: Path) -> bytes:
    """A data set's folder as it is uploaded."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(p for p in data.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(data).as_posix())
    return out.getvalue()


def share(folder: Path, model: Path, data: Path, n: int, worth: float = 1.0) -> Shared:
    """One job, up to the end of its generation, on n workers."""
    folder.mkdir()
    database = Database(f"sqlite:///{folder / 'hscr.db'}")
    upgrade(f"sqlite:///{folder / 'hscr.db'}")
    stored = import_upload(database, folder, io.BytesIO(packed(data)), "bench", ArchiveLimits(2**30, 10_000), 10_000)[0]
    with workers(folder, model, n, worth):
        with database.write() as session:
            given = {"adapter_name": "bench", "model": "bench", "config": CONFIG.to_dict(), "review": True}
            job_id = jobs.create(session, dataset_id=stored.id, **given).id  # type: ignore[arg-type]
        while True:
            with database.read() as session:
                job = session.get_one(Job, job_id)
            if job.status not in ("queued", "running"):
                break
            time.sleep(0.2)
    if job.status != "awaiting_review":
        raise SystemExit(f"the job is {job.status}: {job.error_message}")
    (made,) = (folder / "runs" / job_id).glob("attempt-*/preferences.jsonl")
    with database.read() as session:
        parts = session.scalars(select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "part")).all()
    database.close()
    taken = sum(part["last"] - part["first"] + 1 for part in parts)
    return Shared(job.stage_seconds["generating"], file_digest(made), taken)


def inputs(folder: Path, n: int) -> tuple[Path, Path]:
    """A model and a data set of n records without graded answers."""
    model, data = save_llava(folder / "model", Shape()), folder / "data"
    save_data(data, n, TOKENS, 3)
    (data / "preferences.jsonl").unlink()
    return model, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=96)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--worth", type=float, default=1.0, help="as HSCR_SHARE_WORTH; the default of 4 wants long jobs"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, data = inputs(folder, args.records)
        found: dict[int, list[Shared]] = {1: [], args.workers: []}
        for turn in range(args.repeats):
            for n, made in found.items():
                made.append(share(folder / f"{n}-{turn}", model, data, n, args.worth))
                print(f"{n} workers: {made[-1].seconds:.1f} s, {made[-1].taken} records from helpers, load {load()}")
        assert len({made.digest for several in found.values() for made in several}) == 1, "not one worker's bytes"
        alone = statistics.median(made.seconds for made in found[1])
        rows: list[dict[str, object]] = []
        for n, several in found.items():
            seconds = statistics.median(made.seconds for made in several)
            taken = statistics.median(made.taken for made in several)
            rows.append({"workers": n, "clock s": seconds, "speed": alone / seconds, "from helpers": taken})
        report(f"Generation of {args.records} records by workers of the service; load {load()}", rows, args.json)


def load() -> str:
    return "/".join(f"{value:.1f}" for value in os.getloadavg())


if __name__ == "__main__":
    main()
