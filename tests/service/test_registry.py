"""The registry's routes: versions, lineage, aliases with history, download, references."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hscr.artifacts import verify_manifest
from service import adapters
from service.db import Database
from service.errors import Problem
from service.settings import Settings
from worker.supervise import run_job


@pytest.fixture
def publish(
    database: Database, settings: Settings, new_job: Callable[..., str], stand_in: Callable[..., None]
) -> Callable[..., str]:
    """Run a job of the stand-in to its end; its id."""

    def make(steps: int = 5, **values: Any) -> str:
        stand_in(steps=steps)
        job_id = new_job(**values)
        run_job(database, settings, job_id, lambda: False)
        return job_id

    return make


def test_lineage_leads_from_a_version_to_its_rows(
    client: TestClient, dataset: Any, publish: Callable[..., str]
) -> None:
    job_id = publish()
    version = client.get("/adapters/brain/versions/1").json()
    assert (version["job_id"], version["dataset_id"], version["dataset_digest"]) == (job_id, dataset.id, dataset.digest)
    assert version["metrics"] == {"accuracy": 0.5}
    job = client.get(f"/jobs/{job_id}").json()
    assert job["lineage"]["adapter"] == {"name": "brain", "version": 1, "digest": version["digest"]}
    detail = client.get("/adapters/brain").json()
    assert (detail["last_version"], detail["versions"], detail["aliases"]) == (1, [1], [])
    assert [a["name"] for a in client.get("/adapters").json()["data"]] == ["brain"]


def test_download_is_the_folder_with_its_manifest(
    client: TestClient, publish: Callable[..., str], tmp_path: Any
) -> None:
    publish()
    answer = client.get("/adapters/brain/versions/1/download")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path / "got")
    assert verify_manifest(tmp_path / "got" / "brain-1") == client.get("/adapters/brain/versions/1").json()["digest"]


def test_damaged_file_is_not_handed_out(client: TestClient, settings: Settings, publish: Callable[..., str]) -> None:
    publish()
    digest = client.get("/adapters/brain/versions/1").json()["digest"]
    (adapters.folder(settings.data_dir, digest) / "adapter_model.safetensors").write_bytes(b"other")
    answer = client.get("/adapters/brain/versions/1/download")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")
    assert str(settings.data_dir) not in answer.text


def test_alias_moves_and_rollback_are_kept(client: TestClient, publish: Callable[..., str]) -> None:
    publish(5)
    publish(6)
    for version, reason in ((1, "first"), (2, "better"), (2, "again"), (1, "rollback")):
        answer = client.put("/adapters/brain/aliases/champion", json={"version": version, "reason": reason})
        assert (answer.status_code, answer.json()["version"]) == (200, version)
    moves = client.get("/adapters/brain/aliases/champion/history").json()["data"]
    assert [(m["from_version"], m["to_version"], m["reason"]) for m in moves] == [
        (None, 1, "first"),
        (1, 2, "better"),
        (2, 1, "rollback"),
    ]
    assert client.put("/adapters/brain/aliases/champion", json={"version": 3}).json()["code"] == "version_not_found"
    assert client.put("/adapters/none/aliases/champion", json={"version": 1}).json()["code"] == "adapter_not_found"
    assert client.put("/adapters/brain/aliases/a@b", json={"version": 1}).json()["code"] == "invalid_request"


def test_references_resolve_to_one_version(database: Database, client: TestClient, publish: Callable[..., str]) -> None:
    publish(5)
    publish(6)

    def resolved(reference: str) -> int | str:
        try:
            with database.read() as session:
                return adapters.resolve(session, reference).version
        except Problem as problem:
            return problem.code

    assert (resolved("brain"), resolved("brain:1"), resolved("brain:2")) == (2, 1, 2)
    client.put("/adapters/brain/aliases/champion", json={"version": 1})
    client.put("/adapters/brain/aliases/next", json={"version": 2})
    assert (resolved("brain"), resolved("brain@champion"), resolved("brain@next")) == (1, 1, 2)
    assert (resolved("brain@none"), resolved("brain:9"), resolved("none")) == (
        "alias_not_found",
        "version_not_found",
        "adapter_not_found",
    )
    assert {resolved(r) for r in ("../x", "brain:", "brain@", "brain:1x", "Brain", "a" * 70, "brain@x:1")} == {
        "adapter_not_found"
    }


def test_report_is_served_without_scripts(client: TestClient, publish: Callable[..., str]) -> None:
    job_id = publish()
    page = client.get(f"/jobs/{job_id}/report")
    assert (page.text, page.headers["content-type"]) == ("<h1>report</h1>", "text/html; charset=utf-8")
    assert page.headers["content-security-policy"].endswith("sandbox")
    assert client.get(f"/jobs/{job_id}/report", headers={"Accept": "application/json"}).json() == {"steps": 5}
