"""POST /align on top of a version: what the run gets, what is refused, and a lineage that goes on below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import adapters, datasets
from service.db import Database
from service.settings import Settings
from tests.service.test_evaluations import unseen
from tests.service.test_registry import publish
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

__all__ = ["publish", "unseen"]  # fixtures


def test_run_starts_from_the_version_and_the_lineage_says_so(
    client: TestClient, database: Database, settings: Settings, publish: Callable[..., str], unseen: str, dataset: Any
) -> None:
    publish(config={"optimization": {"lora_rank": 4, "lora_alpha": 8, "lr": 0.5}})
    parent = client.get("/adapters/brain/versions/1").json()
    body = {"dataset": unseen, "adapter": "brain", "parent": "brain"}
    job = client.post("/align", json=body).json()
    source = {"name": "brain", "version": 1, "digest": parent["digest"]}
    assert (job["kind"], job["lineage"]["source"]) == ("align", source)
    given = job["config"]["optimization"]
    assert (given["lora_rank"], given["lora_alpha"], given["lr"]) == (4, 8, 2e-5), "its shape is the parent's, no more"
    run_job(database, settings, job["id"], lambda: False)
    report = client.get(f"/jobs/{job['id']}/report", headers={"Accept": "application/json"}).json()
    assert report["parent"] == str(adapters.folder(settings.data_dir.resolve(), parent["digest"]))
    origin = client.get("/adapters/brain/versions/2/lineage").json()
    assert (origin["parent"], origin["dataset"]["id"]) == (source, unseen)
    assert client.get("/adapters/brain/versions/1/lineage").json()["parent"] is None
    (entry,) = client.get("/audit", params={"subject": job["id"]}).json()["data"]
    assert entry["data"]["parent"] == "brain:1"
    # What the parent learnt from is no more unseen to the child, nor to its child.
    client.post("/align", json={"dataset": unseen, "adapter": "brain", "parent": "brain:2"})
    asked = client.post("/evaluate", json={"dataset": dataset.id, "adapter": "brain:2"})
    assert asked.json()["code"] == "leak"
    with database.read() as session:
        from service import lineage

        version = adapters.get_version(session, "brain", 2)
        seen = [datasets.get(session, d).digest for d in (unseen, dataset.id)]
        assert lineage.learnt_from(session, version) == seen


def test_parents_that_cannot_be_are_refused(
    client: TestClient, publish: Callable[..., str], unseen: str, dataset: Any
) -> None:
    publish()
    publish(model="another")
    good = {"dataset": unseen, "adapter": "brain", "parent": "brain:1"}
    for change, status, code in (
        ({"parent": "none"}, 404, "adapter_not_found"),
        ({"parent": "brain:9"}, 404, "version_not_found"),
        ({"parent": "brain:2"}, 409, "adapter_for_other_model"),
        ({"optimization": {"lora_rank": 4}}, 422, "invalid_config"),
        ({"evaluation": {"dataset": dataset.id}}, 422, "leak"),
        ({"parent": 3}, 422, "invalid_request"),
    ):
        answer = client.post("/align", json=good | change)
        assert (answer.status_code, answer.json()["code"]) == (status, code), change
    assert len(client.get("/jobs").json()["data"]) == 2
    allowed = {"evaluation": {"dataset": dataset.id, "allow_leak": True}}
    assert client.post("/align", json=good | allowed).status_code == 202


def test_damaged_parent_is_not_built_on(
    client: TestClient, database: Database, settings: Settings, publish: Callable[..., str], unseen: str
) -> None:
    publish()
    digest = client.get("/adapters/brain/versions/1").json()["digest"]
    job_id = client.post("/align", json={"dataset": unseen, "adapter": "brain", "parent": "brain:1"}).json()["id"]
    (adapters.folder(settings.data_dir, digest) / "adapter_model.safetensors").unlink()
    run_job(database, settings, job_id, lambda: False)
    assert client.get(f"/jobs/{job_id}").json()["error"]["code"] == "artifact_damaged"
