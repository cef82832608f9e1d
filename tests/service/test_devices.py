"""One device, two owners: an API process with an engine and a worker with its run contend for it, under each of the three policies.

The device's stand-in is a file that its user makes and nobody may make twice; torch's side is in test_real_engine_leaves_and_comes_back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import adapters, devices, evaluations, jobs
from service.batcher import Batcher, Whole, Yielded
from service.db import Database
from service.devices import SERVING, TRAINING, Device
from service.settings import Settings
from service.up import _free_port
from tests.conftest import alive, wait_for
from tests.service.test_vqa import body
from worker.supervise import run_job

ROOT = Path(__file__).parents[2]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Flags are files: one kind of database will do."""
    return sqlite_url


class Api:
    """An API process on the device."""

    def __init__(self, settings: Settings, device: Path) -> None:
        self.settings, self.device, self.port = settings, device, _free_port()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20, trust_env=False)

    def start(self) -> None:
        environment = dict(os.environ) | {
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": self.settings.database,
            "HSCR_DATA_DIR": str(self.settings.data_dir),
            "HSCR_DEVICE_POLICY": self.settings.device_policy,
        }
        command = [sys.executable, "-m", "tests.service.device_stand_in", str(self.port), str(self.device)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    def engine(self) -> str:
        with contextlib.suppress(httpx.TransportError):
            return str(self.http.get("/readyz").json()["engine"])
        return "away"

    def wait(self, engine: str) -> None:
        wait_for(lambda: self.engine() == engine, 60, f"the engine is {engine}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            if self.device.read_text() == "engine":
                self.device.unlink()  # a driver frees a dead process's memory


@pytest.fixture
def device(tmp_path: Path) -> Path:
    return tmp_path / "device"


@pytest.fixture
def api(settings: Settings, device: Path) -> Iterator[Api]:
    made = Api(settings, device)
    yield made
    made.http.close()
    if hasattr(made, "process"):
        made.kill()


@pytest.fixture
def held(tmp_path: Path, device: Path, stand_in: Callable[..., None]) -> Path:
    """Runs use the device and hold while this file exists."""
    gate = tmp_path / "gate"
    gate.write_text("optimizing")
    stand_in(device=str(device), hold=str(gate))
    return gate


def working(database: Database, settings: Settings, job_id: str) -> threading.Thread:
    thread = threading.Thread(target=run_job, args=(database, settings, job_id, lambda: False))
    thread.start()
    return thread


def status(database: Database, job_id: str) -> str:
    with database.read() as session:
        return jobs.get(session, job_id).status


def test_train_first_the_engine_leaves_for_a_run_and_comes_back(
    api: Api, settings: Settings, database: Database, new_job: Callable[..., str], held: Path, device: Path
) -> None:
    settings.device_policy = "train_first"
    api.start()
    api.wait("ok")
    assert api.http.post("/vqa", json=body()).status_code == 200
    job_id = new_job()
    worker = working(database, settings, job_id)
    wait_for(lambda: held.with_suffix(".here").is_file(), 30, "the run is on the device")
    assert device.read_text() == "run"
    refused = api.http.post("/vqa", json=body())
    assert (refused.status_code, refused.json()["code"]) == (503, "engine_yielded")
    assert 1 <= int(refused.headers["retry-after"]) <= 86400
    assert (api.http.get("/readyz").status_code, api.engine()) == (200, "yielded"), "jobs can be followed meanwhile"
    assert api.http.get(f"/jobs/{job_id}").json()["status"] == "running"
    held.unlink()
    worker.join()
    assert status(database, job_id) == "succeeded"
    api.wait("ok")
    assert device.read_text() == "engine"
    assert api.http.post("/vqa", json=body()).status_code == 200


def test_train_first_an_engine_that_starts_during_a_run_waits(
    api: Api, settings: Settings, database: Database, new_job: Callable[..., str], held: Path
) -> None:
    settings.device_policy = "train_first"
    job_id = new_job()
    worker = working(database, settings, job_id)
    wait_for(lambda: held.with_suffix(".here").is_file(), 30)
    api.start()
    api.wait("yielded")
    assert api.http.post("/vqa", json=body()).json()["code"] == "engine_yielded"
    held.unlink()
    worker.join()
    api.wait("ok")
    assert status(database, job_id) == "succeeded"


def test_serve_first_the_job_waits_until_the_device_is_free(
    api: Api, settings: Settings, database: Database, new_job: Callable[..., str], held: Path
) -> None:
    settings.device_policy = "serve_first"
    held.unlink()
    api.start()
    api.wait("ok")
    job_id = new_job()
    for _ in range(3):
        run_job(database, settings, job_id, lambda: False)
    with database.read() as session:
        job = jobs.get(session, job_id)
        assert (job.status, job.attempts) == ("queued", 0), "it stands in the queue, and no attempt is counted"
    api.kill()  # -9: its flag falls with it
    run_job(database, settings, job_id, lambda: False)
    assert status(database, job_id) == "succeeded"


def test_serve_first_a_run_goes_when_an_engine_comes(
    api: Api, settings: Settings, database: Database, new_job: Callable[..., str], stand_in: Any, device: Path
) -> None:
    settings.device_policy = "serve_first"
    stand_in(device=str(device), steps=3000, step_s=0.02)
    job_id = new_job()
    worker = working(database, settings, job_id)
    wait_for(lambda: device.is_file(), 30)
    api.start()
    worker.join(60)
    assert not worker.is_alive()
    api.wait("ok")
    assert status(database, job_id) == "queued"
    with database.read() as session:
        rows = jobs.events_after(session, job_id, 0, 10_000)
        assert jobs.get(session, job_id).crashes == 0
    assert [row.data.get("reason") for row in rows if row.type == "status"][-1] == "device_wanted"
    steps = max(row.data["step"] for row in rows if row.type == "metrics")
    api.kill()
    stand_in(device=str(device), steps=steps + 2)
    run_job(database, settings, job_id, lambda: False)
    with database.read() as session:
        rows = jobs.events_after(session, job_id, 0, 10_000)
    seen = [row.data["step"] for row in rows if row.type == "metrics"]
    assert seen == list(range(1, steps + 3)), "it went on from its checkpoint"


def test_share_looks_for_room_beside_the_engine_first(
    settings: Settings, database: Database, new_job: Callable[..., str], stand_in: Any, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.py"
    asked = tmp_path / "asked"
    settings.plan_command = [sys.executable, str(plan)]
    settings.device = "cuda:7"

    def plans(fits: bool) -> None:
        text = (
            f"open({str(asked)!r}, 'a').write('x'); import json; print(json.dumps({{'fits': {fits}, 'bytes': 3 * 2**30,"
        )
        plan.write_text(text + " 'available_bytes': 2**30, 'settings': {'optimization.token_budget': 512}}))")

    plans(False)
    run_job(database, settings, alone := new_job(), lambda: False)
    assert (status(database, alone), asked.exists()) == ("succeeded", False), "nobody serves: nothing to share"
    with Device.of(settings).flag(SERVING):
        run_job(database, settings, large := new_job(), lambda: False)
        plans(True)
        run_job(database, settings, small := new_job(), lambda: False)
        settings.device = "cpu"
        run_job(database, settings, on_cpu := new_job(), lambda: False)
    assert asked.read_text() == "xx"
    assert [status(database, job_id) for job_id in (large, small, on_cpu)] == ["failed", "succeeded", "succeeded"]
    with database.read() as session:
        job = jobs.get(session, large)
    assert job.error_code == "device_too_small"
    assert "3.0 GB" in (job.error_message or "")
    assert "optimization.token_budget=512" in (job.error_message or "")


def test_share_looks_for_room_for_an_evaluation_too(
    settings: Settings, database: Database, dataset: Any, new_job: Callable[..., str], stand_in: Any, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.py"
    plan.write_text(
        "import json, sys; print(json.dumps({'fits': sys.argv[-1] != '--evaluate', 'bytes': 3 * 2**30,"
        " 'available_bytes': 2**30, 'settings': {'evaluation.batch_size': 4}}))"
    )
    settings.plan_command, settings.device = [sys.executable, str(plan)], "cuda:7"
    run_job(database, settings, new_job(), lambda: False)
    with database.write() as session:
        version = adapters.get_version(session, "brain", 1)
        config: dict[str, Any] = {"preference": {}, "evaluation": {"allow_leak": True}}
        asked = evaluations.ask(session, version, dataset.id, config, owner="local")
    with Device.of(settings).flag(SERVING):
        run_job(database, settings, asked.id, lambda: False)
    with database.read() as session:
        job = jobs.get(session, asked.id)
    assert (job.status, job.error_code) == ("failed", "device_too_small")
    assert "evaluate with evaluation.batch_size=4" in (job.error_message or "")


def test_cancel_ends_an_estimate_under_way_and_its_process(
    settings: Settings, database: Database, new_job: Callable[..., str], tmp_path: Path
) -> None:
    from service import job_requests

    here = tmp_path / "here"
    text = f"import os, time; open({str(here)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    settings.plan_command, settings.device, settings.lease_s = [sys.executable, "-c", text], "cuda:7", 1.0
    job_id = new_job()
    with Device.of(settings).flag(SERVING):
        worker = working(database, settings, job_id)
        estimate = int(wait_for(lambda: here.is_file() and here.read_text(), 20))
        with database.write() as session:
            job_requests.cancel(session, job_id)
        worker.join(5)
    assert status(database, job_id) == "cancelled"
    assert not alive(estimate), "it would hold memory of the device"


def test_one_run_at_a_time_where_one_of_them_goes_first(
    settings: Settings, database: Database, new_job: Callable[..., str], held: Path
) -> None:
    settings.device_policy = "train_first"
    first, second = new_job(), new_job()
    worker = working(database, settings, first)
    wait_for(lambda: held.with_suffix(".here").is_file(), 30)
    run_job(database, settings, second, lambda: False)
    with database.read() as session:
        assert (jobs.get(session, second).status, jobs.get(session, second).attempts) == ("queued", 0)
    held.unlink()
    worker.join()
    run_job(database, settings, second, lambda: False)
    assert [status(database, first), status(database, second)] == ["succeeded", "succeeded"]


KILLED = """
import sys
from service.db import Database
from service.settings import Settings
from worker.supervise import run_job
settings = Settings()
run_job(Database(settings.database), settings, sys.argv[1], lambda: False)
"""


def test_device_of_a_killed_worker_is_free_once_its_run_is_dead(
    settings: Settings, new_job: Callable[..., str], held: Path, tmp_path: Path
) -> None:
    settings.device_policy = "train_first"
    environment = dict(os.environ) | {
        "DATABASE_URL": settings.database,
        "HSCR_DATA_DIR": str(settings.data_dir),
        "HSCR_RUN_COMMAND": " ".join(settings.run_command),
        "HSCR_DEVICE_POLICY": "train_first",
        "PYTHONPATH": str(ROOT),
    }
    worker = subprocess.Popen([sys.executable, "-c", KILLED, new_job()], env=environment)
    wait_for(lambda: held.with_suffix(".here").is_file(), 30)
    run = int(held.with_suffix(".here").read_text())
    device = Device.of(settings)
    assert device.is_up(TRAINING)
    os.kill(run, signal.SIGSTOP)  # a run that takes its time to die
    worker.kill()
    worker.wait()
    wait_for(lambda: not device.is_up(TRAINING), 10, "the kernel lowers the flag")
    wait_for(lambda: not alive(run), 20, "the run is dead")  # its files are closed a moment before it is


def test_cancel_ends_the_wait_for_an_engine_that_does_not_leave(
    settings: Settings, database: Database, new_job: Callable[..., str], stand_in: Any
) -> None:
    from service import job_requests

    settings.device_policy, settings.lease_s = "train_first", 1.0
    job_id = new_job()
    with Device.of(settings).flag(SERVING):
        worker = working(database, settings, job_id)
        wait_for(lambda: status(database, job_id) == "running")
        with database.write() as session:
            job_requests.cancel(session, job_id)
        worker.join(10)
        assert status(database, job_id) == "cancelled"
        settings.device_wait_s = 0.3
        run_job(database, settings, busy := new_job(), lambda: False)
    with database.read() as session:
        assert (jobs.get(session, busy).status, jobs.get(session, busy).crashes) == ("queued", 0)
        assert jobs.events_after(session, busy, 0, 100)[-1].data["reason"] == "device_busy"


class Asked:
    """A turn that a test gives and takes."""

    def __init__(self) -> None:
        self.away, self.back_in_s = False, 7
        self.wanted, self.back = threading.Event(), threading.Event()

    def asked(self) -> bool:
        return self.wanted.is_set()

    def step_aside(self) -> None:
        self.wanted.clear()
        assert self.back.wait(20)
        self.away = False


def test_batcher_answers_what_runs_and_refuses_what_waits() -> None:
    turn, gate, began = Asked(), threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        began.set()
        assert gate.wait(20)
        return items

    batcher: Batcher[int, int] = Batcher(Whole(work), batch_max=1, window_s=0, queue_max=8, turn=turn)
    batcher.start()
    running = batcher.submit(1)
    assert began.wait(10)
    waiting = batcher.submit(2)
    turn.wanted.set()
    gate.set()
    assert running.result(10) == 1
    with pytest.raises(Yielded) as told:
        waiting.result(10)
    assert told.value.retry_after_s == 7
    with pytest.raises(Yielded):
        batcher.submit(3)
    turn.back.set()
    wait_for(lambda: not turn.away)
    assert batcher.submit(4).result(10) == 4
    batcher.close()


def test_real_engine_leaves_and_comes_back(settings: Settings, tmp_path: Path) -> None:
    """The model is gone from memory, and answers after it as before."""
    import weakref

    import numpy as np
    from PIL import Image

    from service.engine import LocalEngine, Question
    from tests.hscr.tiny import save_tiny_llava

    model = save_tiny_llava(tmp_path / "model")
    settings.model, settings.device, settings.feature_cache = str(model), "cpu", "off"
    engine = LocalEngine(settings)
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    question = Question((image,), "Where?", None, None, 4, 0.0, 0, "none")
    engine.load()
    (before,) = engine.answer([question])
    assert engine._answerer is not None
    model = weakref.ref(engine._answerer.vlm.model)
    engine.unload()
    assert model() is None, "something still holds the weights"
    engine.load()
    (after,) = engine.answer([question])
    assert not isinstance(before, Exception)
    assert after == before


def test_two_deployments_of_one_folder_may_name_their_devices(settings: Settings) -> None:
    one, other = settings.model_copy(update={"device_name": "a/100"}), settings.model_copy(update={"device_name": "b"})
    with devices.Device.of(one).flag(TRAINING, alone=True) as descriptor:
        assert descriptor is not None
        assert devices.Device.of(one).is_up(TRAINING)
        assert not devices.Device.of(other).is_up(TRAINING)
        assert [p.parent for p in (settings.data_dir / "devices").iterdir()] == [settings.data_dir / "devices"] * 2
