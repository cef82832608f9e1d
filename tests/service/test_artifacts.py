"""Artifacts away from the data folder: behind S3 (a real server) and in memory, the service does what it does on a disk, and damage, a
store that is away, and uploads that were cut off reach nobody."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import update

from hscr.artifacts import verify_manifest, write_manifest
from service import artifact_store, backup, jobs, object_store, retention
from service.app import create_app
from service.artifact_store import LocalStore, open_store
from service.db import Database
from service.errors import Problem
from service.models import Dataset, Job
from service.object_store import ObjectStore
from service.settings import Settings
from tests.conftest import S3, dataset_zip, png, wait_for
from tests.service.test_vqa import Echo, body
from worker.carry import Interrupted, carry
from worker.supervise import run_job

ROOT = Path(__file__).parents[2]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """What is tested here knows rows only as the rest does, which is tested on both databases."""
    return sqlite_url


def on_s3(settings: Settings, server: S3, **options: str) -> None:
    settings.artifacts_url = f"s3://bucket/{uuid4().hex}"
    settings.artifacts_options = SecretStr(json.dumps(server.options | options))


@pytest.fixture(params=[pytest.param("memory", marks=pytest.mark.thorough), "s3"])  # a real server says more
def away(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """Settings with artifacts behind an address."""
    if request.param == "s3":
        on_s3(settings, request.getfixturevalue("s3"))
    else:
        settings.artifacts_url = f"memory://{uuid4().hex}"
    return settings


@pytest.fixture
def served(away: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(away), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def store(away: Settings) -> ObjectStore:
    found = open_store(away)
    assert isinstance(found, ObjectStore)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder with its manifest."""
    made = tmp_path / "made"
    (made / "more").mkdir(parents=True)
    (made / "adapter_model.safetensors").write_bytes(os.urandom(1000))
    (made / "more" / "README.md").write_text("card")
    write_manifest(made)
    return made


def objects(settings: Settings) -> dict[str, bytes]:
    """What lies in the store, by its key below the root."""
    options = json.loads(settings.artifacts_options.get_secret_value()) if settings.artifacts_options else {}
    fs, root = fsspec.url_to_fs(settings.artifacts_url, use_listings_cache=False, skip_instance_cache=True, **options)
    try:
        return {key.partition(root)[2].lstrip("/"): fs.cat_file(key) for key in fs.find(root)}
    except FileNotFoundError:
        return {}


def spoil(settings: Settings, ending: str, data: bytes | None = b"other") -> None:
    """Change, or take away, each object whose key ends so."""
    options = json.loads(settings.artifacts_options.get_secret_value()) if settings.artifacts_options else {}
    fs, root = fsspec.url_to_fs(settings.artifacts_url, use_listings_cache=False, skip_instance_cache=True, **options)
    for key in fs.find(root):
        if key.endswith(ending):
            fs.pipe_file(key, data) if data is not None else fs.rm_file(key)


def forget(settings: Settings) -> None:
    """As another host would find it: nothing cached."""
    shutil.rmtree(settings.data_dir / "cache", ignore_errors=True)
    artifact_store._remote.cache_clear()


def upload(client: TestClient, n: int = 3, name: str = "three") -> str:
    answer = client.post("/datasets", files={"file": ("x.zip", dataset_zip(n))}, data={"name": name})
    assert answer.status_code in (200, 201), answer.text
    return answer.json()["id"]


def align(client: TestClient, database: Database, settings: Settings, dataset: str, **more: Any) -> dict[str, Any]:
    job_id = client.post("/align", json={"dataset": dataset, "adapter": "brain"} | more).json()["id"]
    run_job(database, settings, job_id, lambda: False)
    return client.get(f"/jobs/{job_id}").json()


def test_whole_life_of_artifacts_needs_no_local_folder(
    served: TestClient, database: Database, away: Settings, stand_in: Callable[..., None], tmp_path: Path
) -> None:
    """Upload, align, evaluate, align on top, report, picture, export, download, and all of it again from a host that has nothing yet."""
    dataset = upload(served)
    job = align(served, database, away, dataset)
    assert job["status"] == "succeeded", job
    stored = objects(away)
    assert {key.split("/")[0] for key in stored} == {"adapters", "reports", "datasets", "hscr-artifacts.json"}
    assert [p for p in (away.data_dir / "artifacts").rglob("*") if p.name != ".lock"] == []
    assert list((away.data_dir / "datasets").iterdir()) == []

    forget(away)
    elsewhere = away.model_copy(update={"data_dir": tmp_path / "elsewhere"})
    with TestClient(create_app(elsewhere), base_url="http://127.0.0.1") as client:
        assert client.get(f"/datasets/{dataset}/records/2/image").content == png(1)
        assert not list((elsewhere.data_dir / "cache").rglob("*.png")), "one picture, not the whole data set"
        assert client.get(f"/jobs/{job['id']}/report").text == "<h1>report</h1>"
        archive = zipfile.ZipFile(io.BytesIO(client.get("/adapters/brain/versions/1/download").content))
        archive.extractall(tmp_path / "got")
        digest = job["lineage"]["adapter"]["digest"]
        assert verify_manifest(tmp_path / "got" / "brain-1") == digest
        other = upload(client, 4, "other")
        job_id = client.post("/evaluate", json={"dataset": other, "adapter": "brain"}).json()["id"]
        run_job(database, elsewhere, job_id, lambda: False)
        given = client.get(f"/jobs/{job_id}/report", headers={"Accept": "application/json"}).json()
        assert Path(given["adapter"]).is_relative_to(elsewhere.data_dir / "cache")
        stand_in(steps=6)
        on_top = align(client, database, elsewhere, other, parent="brain:1")
        assert (on_top["status"], on_top["lineage"]["adapter"]["version"]) == ("succeeded", 2)
        client.delete(f"/jobs/{job['id']}")
        elsewhere.artifacts_grace_s = 0.0
        assert retention.collect(database, elsewhere.data_dir, open_store(elsewhere)) == 1, "the deleted job's report"
        assert client.get("/adapters/brain/versions/1/download").status_code == 200


def test_damage_in_the_store_is_told_and_never_served(
    served: TestClient, database: Database, away: Settings, stand_in: Callable[..., None]
) -> None:
    dataset = upload(served)
    align(served, database, away, dataset)
    forget(away)
    spoil(away, "adapter_model.safetensors")
    spoil(away, ".png")
    with TestClient(create_app(away, Echo(away)), base_url="http://127.0.0.1") as client:
        wait_for(lambda: client.get("/readyz").status_code == 200, 5)
        answers = [
            client.get("/adapters/brain/versions/1/download"),
            client.get(f"/datasets/{dataset}/records/1/image"),
            client.post("/vqa", json=body(adapter="brain")),
        ]
        assert [(a.status_code, a.json()["code"]) for a in answers] == [(500, "artifact_damaged")] * 3
        failed = align(client, database, away, dataset)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "artifact_damaged")
        spoil(away, "SHA256SUMS", None)
        forget(away)
        assert client.get(f"/datasets/{dataset}/records/1/image").json()["code"] == "artifact_damaged"


def test_manifest_that_fits_the_damage_is_refused_too(served: TestClient, away: Settings, tmp_path: Path) -> None:
    """Whoever may write to the bucket may change a file and its line in the manifest; the row knows better."""
    dataset = upload(served)
    forget(away)
    (key,) = [key for key in objects(away) if key.endswith("SHA256SUMS")]
    text = objects(away)[key].decode()
    line = next(line for line in text.splitlines() if line.endswith("/0.png"))
    spoil(away, "images/0.png", b"other")
    changed = text.replace(line, f"{hashlib.sha256(b'other').hexdigest()}  images/0.png")
    spoil(away, "SHA256SUMS", changed.encode())
    answer = served.get(f"/datasets/{dataset}/records/1/image")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")


def test_spoilt_cached_copy_is_fetched_anew(store: ObjectStore, away: Settings, folder: Path) -> None:
    artifact = artifact_store.adapter(write_manifest(folder))
    store.put(artifact, folder)
    cached = store.fetch(artifact) / "adapter_model.safetensors"
    whole = cached.read_bytes()
    cached.write_bytes(b"spoilt")
    assert (store.checked(artifact) / cached.name).read_bytes() == whole
    cached.write_bytes(b"spoilt")
    artifact_store._remote.cache_clear()
    again = open_store(away)  # another process: its first read verifies
    assert (again.fetch(artifact) / cached.name).read_bytes() == whole


def test_what_is_stored_is_whole_or_not_there(store: ObjectStore, away: Settings, folder: Path) -> None:
    artifact = artifact_store.adapter(write_manifest(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="differ"):
        store.put(artifact, folder)
    assert objects(away) == {}
    artifact = artifact_store.adapter(write_manifest(folder))
    store.put(artifact, folder)
    spoil(away, "README.md", None)
    store.put(artifact, folder)
    assert sum(key.endswith("README.md") for key in objects(away)) == 1, "what was missing is stored again"


KILLED = """
import os, sys, signal
from pathlib import Path
from service.settings import Settings
from service import artifact_store
settings = Settings()
store, source = artifact_store.open_store(settings), Path(sys.argv[1])
put, sent = store._fs.put, []
def half(local, remote):
    put(local[:3], remote[:3])
    print("half", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
store._fs.put = half
store.put(artifact_store.adapter(sys.argv[2]), source)
"""


@pytest.mark.thorough
def test_upload_that_is_killed_leaves_nothing_that_counts_and_is_collected(
    settings: Settings, s3: S3, database: Database, tmp_path: Path
) -> None:
    on_s3(settings, s3)
    source = tmp_path / "many"
    source.mkdir()
    for n in range(6):
        (source / f"{n}.bin").write_bytes(os.urandom(2000))
    digest = write_manifest(source)
    assert settings.artifacts_options is not None
    environment = dict(os.environ) | {
        "ARTIFACTS_URL": settings.artifacts_url,
        "ARTIFACTS_OPTIONS": settings.artifacts_options.get_secret_value(),
        "HSCR_DATA_DIR": str(tmp_path / "child"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), digest], env=environment, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"half\n"), done.stderr
    artifact = artifact_store.adapter(digest)
    assert len(objects(settings)) == 1 + 3
    with pytest.raises(Problem, match="artifact_damaged"):
        open_store(settings).fetch(artifact)
    assert retention.collect(database, settings.data_dir, open_store(settings)) == 0, "it may be under way"
    settings.artifacts_grace_s = 0.0
    with retention.artifacts_held(settings.data_dir, database):
        assert retention.collect(database, settings.data_dir, open_store(settings)) == 0, "somebody publishes"
    assert retention.collect(database, settings.data_dir, open_store(settings)) == 1
    assert list(objects(settings)) == ["hscr-artifacts.json"]
    open_store(settings).put(artifact, source)
    assert verify_manifest(open_store(settings).fetch(artifact)) == digest


@pytest.mark.thorough
def test_job_waits_for_a_store_that_is_away_then_fails_and_goes_on_later(
    settings: Settings,
    database: Database,
    tmp_path: Path,
    stand_in: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "own").mkdir()
    server = S3(tmp_path / "own")
    try:
        on_s3(settings, server)
        with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
            dataset = upload(client)
            gate = tmp_path / "gate"
            gate.write_text("reporting")  # all steps are done
            stand_in(hold=str(gate))
            settings.artifacts_wait_s = 3.0
            job_id = client.post("/align", json={"dataset": dataset, "adapter": "brain"}).json()["id"]
            worker = threading.Thread(target=run_job, args=(database, settings, job_id, lambda: False))
            worker.start()
            wait_for(lambda: gate.with_suffix(".here").is_file(), what="the run holds")
            server.stop()
            gate.unlink()
            worker.join()
            job = client.get(f"/jobs/{job_id}").json()
            assert (job["status"], job["error"]["code"]) == ("failed", "artifacts_unavailable")
            assert client.get("/adapters").json()["data"] == []
            refused = client.post("/datasets", files={"file": ("x.zip", dataset_zip(5))}, data={"name": "new"})
            assert (refused.status_code, refused.json()["code"]) == (503, "artifacts_unavailable")
            assert int(refused.headers["retry-after"]) > 0
            assert len(client.get("/datasets").json()["data"]) == 1, "no row without its files"

            settings.artifacts_wait_s = 60.0
            client.post(f"/jobs/{job_id}/retry")
            worker = threading.Thread(target=run_job, args=(database, settings, job_id, lambda: False))
            worker.start()
            wait_for(lambda: client.get(f"/jobs/{job_id}").json()["attempts"] == 2)
            server.start()
            worker.join()
            assert client.get(f"/jobs/{job_id}").json()["status"] == "succeeded"
            rows = client.get(f"/jobs/{job_id}/events").json()["data"]
            assert [e["data"]["step"] for e in rows if e["type"] == "metrics"] == [1, 2, 3, 4, 5], "no step twice"
            assert client.get("/adapters/brain/versions/1/download").status_code == 200
    finally:
        server.stop()
    assert "canary" not in caplog.text


def test_wrong_credentials_are_a_store_that_is_away(
    settings: Settings, s3: S3, database: Database, stand_in: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    on_s3(settings, s3, secret="canary-wrong")
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        refused = client.post("/datasets", files={"file": ("x.zip", dataset_zip())}, data={"name": "x"})
    assert (refused.status_code, refused.json()["code"]) == (503, "artifacts_unavailable")
    assert "PermissionError" in caplog.text
    assert "canary" not in caplog.text + refused.text + repr(settings)


def refusal_s(client: TestClient) -> float:
    """How long one refusal takes."""
    begin = time.monotonic()
    assert client.post("/vqa", json=body(adapter="brain:2")).status_code == 503
    return time.monotonic() - begin


def test_answers_of_cached_adapters_go_on_while_the_store_is_away(
    settings: Settings, database: Database, tmp_path: Path, stand_in: Callable[..., None]
) -> None:
    (tmp_path / "own").mkdir()
    server = S3(tmp_path / "own")
    try:
        on_s3(settings, server)
        with TestClient(create_app(settings, Echo(settings)), base_url="http://127.0.0.1") as client:
            dataset = upload(client)
            align(client, database, settings, dataset)
            stand_in(steps=7)
            gone = align(client, database, settings, dataset)["id"]
            assert client.post("/vqa", json=body(adapter="brain:1")).status_code == 200
            server.stop()
            assert client.post("/vqa", json=body(adapter="brain:1")).status_code == 200
            assert client.post("/vqa", json=body()).status_code == 200, "the base needs no store"
            assert client.delete(f"/jobs/{gone}").status_code == 204, "its files go when the store is back"
            refused = client.post("/vqa", json=body(adapter="brain:2"))
            assert (refused.status_code, refused.json()["code"]) == (503, "artifacts_unavailable")
            assert refused.headers["retry-after"] == "30"
            took = [refusal_s(client) for _ in range(10)]
            assert sorted(took)[5] < 0.2, "refused at once for a while, not each after its own time-out"
    finally:
        server.stop()


def test_backup_copies_out_of_the_store_and_restores_into_another(
    served: TestClient, database: Database, away: Settings, stand_in: Callable[..., None], tmp_path: Path, s3: S3
) -> None:
    dataset = upload(served)
    align(served, database, away, dataset)
    forget(away)
    report = backup.backup(away, tmp_path / "saved")
    assert report.damaged == []
    verify_manifest(LocalStore.below(tmp_path / "saved" / "data").folder(artifact_store.adapter(_digest(served))))
    other = away.model_copy(
        update={"data_dir": tmp_path / "new", "database_url": f"sqlite:///{tmp_path / 'new' / 'hscr.db'}"}
    )
    on_s3(other, s3)
    backup.restore(other, tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    with TestClient(create_app(other), base_url="http://127.0.0.1") as client:
        assert client.get("/adapters/brain/versions/1/download").status_code == 200
        assert client.get(f"/datasets/{dataset}/records/1/image").content == png(0)
    spoil(away, "adapter_model.safetensors", None)
    forget(away)
    assert backup.backup(away, tmp_path / "again").damaged == [_digest(served)]


def _digest(client: TestClient) -> str:
    return client.get("/adapters/brain/versions/1").json()["digest"]


def test_cache_keeps_its_bound_and_what_is_lent(
    away: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away.artifacts_cache_max_bytes = 5000
    monkeypatch.setattr(object_store, "SPARED_S", 0.0)
    store, made = open_store(away), []

    def kept() -> set[str]:
        return {path.name for path in (away.data_dir / "cache" / "artifacts" / "adapters").iterdir()}

    for n in range(4):
        source = tmp_path / f"made{n}"
        source.mkdir()
        (source / "weights").write_bytes(os.urandom(2000))
        made.append(artifact_store.adapter(write_manifest(source)))
        store.put(made[-1], source)
    with store.lent(made[0]) as lent:
        for artifact in made[1:]:
            store.fetch(artifact)
            time.sleep(0.02)
        assert (lent / "weights").is_file()
        assert kept() == {made[0].name, made[3].name}
    store.fetch(made[1])
    assert kept() == {made[1].name, made[3].name}, "given back, the first was the oldest"


def test_two_hosts_of_one_database_do_not_collect_under_each_other(
    postgres: Callable[[], str], settings: Settings, s3: S3, tmp_path: Path, folder: Path
) -> None:
    on_s3(settings, s3)
    settings.artifacts_grace_s = 0.0
    database = Database(postgres())
    try:
        store = open_store(settings)
        with retention.artifacts_held(tmp_path / "host-a", database):
            store.put(artifact_store.adapter(write_manifest(folder)), folder)
            assert retention.collect(database, tmp_path / "host-b", store) == 0
        assert retention.collect(database, tmp_path / "host-b", store) == 1
    finally:
        database.close()


def test_data_set_of_an_older_row_is_read_by_its_manifest(
    served: TestClient, database: Database, away: Settings
) -> None:
    dataset = upload(served)
    with database.write() as session:
        session.execute(update(Dataset).values(files_digest=None))
    forget(away)
    assert served.get(f"/datasets/{dataset}/records/1/image").content == png(0)


def test_cached_folder_that_nobody_read_is_not_taken_for_what_was_stored(store: ObjectStore, folder: Path) -> None:
    artifact = artifact_store.adapter(write_manifest(folder))
    spoilt = store._place(artifact)
    shutil.copytree(folder, spoilt)
    (spoilt / "more" / "README.md").write_text("other")
    store.put(artifact, folder, give=True)
    assert (store.fetch(artifact) / "more" / "README.md").read_text() == "card"


def test_run_and_its_kin_inherit_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.settings import without_secrets

    secret = {
        f"HSCR_{name.upper()}" for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)
    }
    assert {"HSCR_API_KEY", "HSCR_UPSTREAM_KEY", "HSCR_UID_KEY"} <= secret
    for name in ("ARTIFACTS_URL", "ARTIFACTS_OPTIONS", "AWS_SECRET_ACCESS_KEY", "FSSPEC_S3_SECRET", *secret):
        monkeypatch.setenv(name, "canary")
    assert "canary" not in without_secrets().values()


@pytest.mark.parametrize(
    ("url", "options", "told"),
    [
        ("relative/folder", "", "whole path"),
        ("nope://x", "", "does not know"),
        ("s3://bucket", "not json", "JSON object"),
    ],
)
def test_wrong_address_is_told_at_the_start(settings: Settings, url: str, options: str, told: str) -> None:
    settings.artifacts_url, settings.artifacts_options = url, SecretStr(options)
    with pytest.raises(ValueError, match=told):
        create_app(settings)


def test_another_folder_of_this_host_is_a_plain_store(
    settings: Settings, database: Database, stand_in: Callable[..., None], tmp_path: Path
) -> None:
    settings.artifacts_url = f"file://{tmp_path / 'big-disk'}"
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        job = align(client, database, settings, upload(client))
        assert job["status"] == "succeeded"
        assert client.get("/adapters/brain/versions/1/download").status_code == 200
    assert {p.name for p in (tmp_path / "big-disk").iterdir()} == {"adapters", "reports", "datasets"}
    assert not (settings.data_dir / "cache").exists(), "read where it lies"


def test_lease_goes_on_while_the_store_takes_its_time(
    settings: Settings, database: Database, new_job: Callable[..., str], stand_in: Callable[..., None], monkeypatch: Any
) -> None:
    settings.lease_s = 1.5
    put = LocalStore.put

    def slow(*given: Any, **values: Any) -> str:
        time.sleep(2.5)
        return put(*given, **values)

    job_id = new_job()
    monkeypatch.setattr(LocalStore, "put", slow)
    worker = threading.Thread(target=run_job, args=(database, settings, job_id, lambda: False))
    worker.start()
    while worker.is_alive():
        with database.write() as session:
            assert jobs.reap(session, job_id, 3) is None, "the lease ran out"
        time.sleep(0.1)
    with database.read() as session:
        assert session.get_one(Job, job_id).status == "succeeded"


def test_cancel_ends_the_wait_for_the_store_and_work_gets_its_grace() -> None:
    calls: list[float] = []

    def away() -> None:
        calls.append(time.monotonic())
        raise Problem("artifacts_unavailable", "x")

    with pytest.raises(Interrupted):
        carry(away, lambda: len(calls) > 1, wait_s=60, grace_s=0)
    assert len(calls) == 2
    assert carry(lambda: time.sleep(0.3) or 7, lambda: True, wait_s=0, grace_s=5) == 7
    begin = time.monotonic()
    with pytest.raises(Interrupted):
        carry(lambda: time.sleep(3), lambda: True, wait_s=0, grace_s=0.2)
    assert time.monotonic() - begin < 2.9
    with pytest.raises(Problem, match="artifacts_unavailable"):
        carry(away, lambda: False, wait_s=0, grace_s=0)
