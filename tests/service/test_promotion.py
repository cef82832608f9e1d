"""`promote` in POST /align: an alias that moves with the version, a gate that the version brings along, wishes that cannot be granted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import datasets, jobs
from service.db import Database
from service.settings import Settings
from tests.service.test_evaluations import unseen
from tests.service.test_gates import PATH, gain
from tests.service.test_registry import publish
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

__all__ = ["publish", "unseen"]  # fixtures
Align = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def align(client: TestClient, database: Database, settings: Settings, dataset: Any) -> Align:
    """Ask for a job with `promote` and run it; its id and its last event."""

    def run(promote: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        answer = client.post("/align", json={"dataset": dataset.id, "adapter": "brain", "promote": promote})
        assert answer.status_code == 202, answer.text
        job_id = str(answer.json()["id"])
        run_job(database, settings, job_id, lambda: False)
        return job_id, client.get(f"/jobs/{job_id}/events").json()["data"][-1]["data"]

    return run


def test_alias_moves_in_the_transaction_that_publishes(
    client: TestClient, align: Align, stand_in: Callable[..., None]
) -> None:
    stand_in()
    job_id, last = align({"reason": "nightly"})
    assert (last["adapter"]["version"], last["promotion"]) == (1, {"alias": "champion", "decision": "moved"})
    job = client.get(f"/jobs/{job_id}").json()
    assert job["promote"] == {"alias": "champion", "reason": "nightly", "gate": None}
    nothing = {"gate_job_id": None, "gate_job_status": None, "decisions_url": None, "code": None, "message": None}
    assert job["promotion"] == {"decision": "moved"} | nothing
    (listed,) = client.get("/jobs").json()["data"]
    assert (listed["promote"], listed["promotion"]) == (job["promote"], None)
    (moved,) = client.get(f"{PATH}/history").json()["data"]
    assert (moved["to_version"], moved["reason"], moved["actor"], moved["gate_job_id"]) == (1, "nightly", "local", None)
    told = client.get("/audit", params={"limit": 200}).json()["data"]
    assert [e["action"] for e in told][-2:] == ["version.publish", "alias.move"]


def test_gate_decides_about_the_version_once_it_is_there(
    client: TestClient, database: Database, settings: Settings, unseen: str, align: Align, stand_in: Callable[..., None]
) -> None:
    stand_in(steps=3)
    align({})
    stand_in(steps=4)
    job_id, last = align({"reason": "better?", "gate": {"dataset": unseen, "metric": "open/strict"}})
    (gate,) = client.get(f"{PATH}/gates").json()["data"]
    assert last["promotion"] == {"alias": "champion", "decision": "pending", "job_id": gate["job_id"]}
    assert (gate["candidate"], gate["champion"], gate["decision"]) == (2, 1, "pending")
    job = client.get(f"/jobs/{job_id}").json()
    assert job["status"] == "succeeded"
    assert (job["promote"]["gate"]["dataset_id"], job["promote"]["gate"]["rule"]["metric"]) == (unseen, "open/strict")
    assert (job["promotion"]["decision"], job["promotion"]["gate_job_id"]) == ("pending", gate["job_id"])
    assert job["promotion"]["gate_job_status"] == "queued"
    assert client.get(job["promotion"]["decisions_url"]).json()["data"] == [gate]
    assert client.get("/adapters/brain").json()["aliases"][0]["version"] == 1
    stand_in(metrics=gain("gain_over_before", 0.01))
    run_job(database, settings, gate["job_id"], lambda: False)
    assert client.get("/adapters/brain").json()["aliases"][0]["version"] == 2
    assert client.get(f"{PATH}/history").json()["data"][-1]["gate_job_id"] == gate["job_id"]
    shown = client.get(f"/jobs/{job_id}").json()["promotion"]
    assert (shown["decision"], shown["gate_job_status"]) == ("moved", "succeeded")


def test_an_adapter_may_be_called_promotion(
    client: TestClient, database: Database, settings: Settings, dataset: Any, stand_in: Callable[..., None]
) -> None:
    stand_in()
    job_id = client.post("/align", json={"dataset": dataset.id, "adapter": "promotion"}).json()["id"]
    run_job(database, settings, job_id, lambda: False)
    job = client.get(f"/jobs/{job_id}")
    assert job.status_code == 200, job.text
    assert (job.json()["status"], job.json()["promotion"]) == ("succeeded", None)


def test_wish_that_cannot_be_carried_out_costs_no_version(
    client: TestClient, database: Database, settings: Settings, unseen: str, dataset: Any, align: Align, stand_in: Any
) -> None:
    stand_in()
    align({})
    _, same = align({"gate": {"dataset": unseen, "metric": "open/strict"}})  # the stand-in's weights are the same again
    assert (same["adapter"]["version"], same["promotion"]["code"]) == (2, "gate_same_weights")
    body = {
        "dataset": dataset.id,
        "adapter": "brain",
        "promote": {"gate": {"dataset": unseen, "metric": "open/strict"}},
    }
    asked = client.post("/align", json=body).json()
    job_id = asked["id"]
    assert (asked["promote"]["alias"], asked["promotion"]) == ("champion", None)
    with database.write() as session:
        datasets.delete(session, unseen, "local")
    stand_in(steps=9)
    run_job(database, settings, job_id, lambda: False)
    gone = client.get(f"/jobs/{job_id}/events").json()["data"][-1]["data"]
    assert (gone["status"], gone["promotion"]["decision"]) == ("succeeded", "impossible")
    assert gone["promotion"]["code"] == "dataset_not_found"
    shown = client.get(f"/jobs/{job_id}").json()["promotion"]
    assert (shown["decision"], shown["code"], shown["gate_job_id"]) == ("impossible", "dataset_not_found", None)
    assert client.get("/adapters/brain").json() | {"created_at": 0, "aliases": 0} == {
        "name": "brain", "last_version": 3, "versions": [3, 2, 1], "created_at": 0, "aliases": 0
    }  # fmt: skip
    assert client.get(f"{PATH}/gates").json()["data"] == []


def test_wishes_that_make_no_sense_are_refused_before_anything_is_queued(
    client: TestClient, database: Database, unseen: str, dataset: Any
) -> None:
    gate = {"dataset": unseen, "metric": "open/strict"}
    for promote, status, code in (
        ({"alias": "../x"}, 422, "invalid_request"),
        ({"to": "champion"}, 422, "invalid_request"),
        ({"reason": "a\0b"}, 422, "invalid_request"),
        ({"gate": gate | {"dataset": "ds_none"}}, 404, "dataset_not_found"),
        ({"gate": gate | {"dataset": dataset.id}}, 422, "leak"),
        ({"gate": gate | {"metric": "open/best"}}, 422, "invalid_request"),
        ({"gate": gate | {"evaluation": {"n_bootstrap": 0}}}, 422, "invalid_config"),
    ):
        body = {"dataset": dataset.id, "adapter": "brain", "promote": promote}
        for query in ("", "?dry_run=true"):
            answer = client.post(f"/align{query}", json=body)
            assert (answer.status_code, answer.json()["code"]) == (status, code), promote
    with database.read() as session:
        assert jobs.count(session, "local", list(jobs.TRANSITIONS)) == 0
