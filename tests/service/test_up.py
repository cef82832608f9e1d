"""`hscr up` as a process: it serves, restarts what dies, and leaves nothing running however it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.up import _free_port
from tests.conftest import STAND_IN, alive, dataset_zip, wait_for

ROOT = Path(__file__).parents[2]


class Service:
    """A running `hscr up`, its children and an HTTP client."""

    def __init__(self, tmp_path: Path) -> None:
        self.data, self.port = tmp_path / "data", _free_port()
        told = tmp_path / "stand_in.json"
        told.write_text(json.dumps({"steps": 5}))
        self.environment = {
            k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "REDIS_URL", "HSCR_API_KEY")
        } | {
            "HSCR_ENGINE": "none",
            "HSCR_RUN_COMMAND": f"{sys.executable} {STAND_IN}",
            "HSCR_LEASE_S": "2",
            "HSCR_SWEEP_INTERVAL_S": "0.2",
            "STAND_IN": str(told),
        }
        self.told = told
        self.out = tmp_path / "up.log"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10, trust_env=False)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "service.cli", "up", "--port", str(self.port), "--data", str(self.data)]
        with self.out.open("ab") as out:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=out, stderr=out)

    def ready(self) -> None:
        def asked() -> bool:
            assert self.process.poll() is None, self.out.read_text()
            try:
                return self.http.get("/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(asked, 40, "the service is ready")

    def children(self) -> dict[str, psutil.Process]:
        found = {}
        for child in psutil.Process(self.process.pid).children():
            line = " ".join(child.cmdline())
            for name, part in {
                "api": "service.serve",
                "worker": "celery",
                "sweep": "worker.sweep",
                "valkey": "-server",
            }.items():
                if part in line:
                    found[name] = child
        return found

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def align(self) -> str:
        dataset = self.http.post("/datasets", files={"file": ("x.zip", dataset_zip())}).json()["id"]
        answer = self.http.post("/align", json={"dataset": dataset, "adapter": "brain"})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ended(self, job_id: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            try:
                job = self.http.get(f"/jobs/{job_id}").json()
            except httpx.HTTPError:
                return None
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        return wait_for(look, 40, "the job ends")


def all_gone(family: list[psutil.Process], within_s: float = 10) -> None:
    """Every process has ended; who has not is named."""
    with suppress(AssertionError):
        wait_for(lambda: not any(alive(p.pid) for p in family), within_s)
    assert not [(p.pid, p.status(), p.cmdline()) for p in family if alive(p.pid)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path)
    try:
        running.ready()
        yield running
    finally:
        running.http.close()
        if running.process.poll() is None:
            family = running.family()
            running.process.kill()
            running.process.wait()
            all_gone(family)


@pytest.mark.thorough
def test_main_job_over_http_and_an_orderly_end(service: Service) -> None:
    job_id = service.align()
    seen = []
    with service.http.stream(
        "GET", f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}, timeout=60
    ) as stream:
        seen = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert [e["seq"] for e in seen] == list(range(1, len(seen) + 1))
    assert seen[-1]["data"]["adapter"]["version"] == 1
    assert service.http.get(f"/jobs/{job_id}/report").text == "<h1>report</h1>"
    assert service.http.get("/adapters/brain/versions/1/download").status_code == 200
    assert set(service.children()) == {"api", "worker", "sweep", "valkey"}
    secret = [" ".join(p.cmdline()) for p in service.children().values()]
    assert not any("requirepass" in line or "redis://" in line for line in secret)

    second = subprocess.run(
        [sys.executable, "-m", "service.cli", "up", "--port", str(_free_port()), "--data", str(service.data)],
        cwd=ROOT, env=service.environment, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (second.returncode, "Another `hscr up` is using" in second.stderr) == (2, True)

    family = service.family()
    begin = time.monotonic()
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(20) == 0
    assert time.monotonic() - begin < 15
    all_gone(family, within_s=0)
    assert "ready: http://127.0.0.1" in service.out.read_text()


@pytest.mark.thorough
def test_children_that_are_killed_come_back_and_the_job_succeeds(service: Service) -> None:
    service.told.write_text(json.dumps({"steps": 150}))
    job_id = service.align()
    wait_for(lambda: service.http.get(f"/jobs/{job_id}").json()["stage"] == "optimizing")
    for child in service.children().values():
        for process in [child, *child.children(recursive=True)]:
            process.kill()
    job = service.ended(job_id)
    assert (job["status"], job["attempts"]) == ("succeeded", 2)
    wait_for(lambda: set(service.children()) == {"api", "worker", "sweep", "valkey"}, 10)


def test_nothing_outlives_a_killed_up(service: Service) -> None:
    service.told.write_text(json.dumps({"steps": 100_000, "ignore_term": True}))
    job_id = service.align()
    wait_for(lambda: service.http.get(f"/jobs/{job_id}").json()["stage"] == "optimizing")
    family = service.family()
    assert len(family) >= 6
    service.process.kill()
    service.process.wait()
    all_gone(family)
    service.told.write_text(json.dumps({"steps": 5}))
    service.process = service.start()
    service.ready()
    assert service.ended(job_id)["status"] == "succeeded"


def test_port_in_use_is_said_plainly(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "service.cli", "up", "--port", str(port), "--data", str(tmp_path / "d")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert f"Cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(tmp_path: Path) -> None:
    model, port = tmp_path / "no-model", _free_port()
    command = [sys.executable, "-m", "service.cli", "up", "--port", str(port), "--model", str(model)]
    environment = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "REDIS_URL", "HSCR_API_KEY")}
    done = subprocess.run(
        [*command, "--data", str(tmp_path / "d")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "The model could not be loaded: model 'no-model': no such folder" in done.stderr
    assert str(model) in done.stderr
    assert done.stdout.endswith("stopping\nstopped\n")


def test_address_that_others_can_reach_needs_a_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "up", "--host", "0.0.0.0", "--data", str(tmp_path / "d")]
    environment = {k: v for k, v in os.environ.items() if k != "HSCR_API_KEY"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "HSCR_API_KEY is not set" in done.stderr) == (2, True)
