"""POST /evaluate and its jobs: what is refused, what the run gets, and what is kept of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from hscr.calibration import says_nothing
from service import adapters, datasets, jobs, thresholds
from service.archive import ArchiveLimits
from service.db import Database
from service.models import Job
from service.settings import Settings
from tests.conftest import dataset_zip
from tests.service.test_align import read_stream
from tests.service.test_registry import publish
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

__all__ = ["publish"]  # a fixture


@pytest.fixture
def unseen(database: Database, settings: Settings) -> str:
    """A data set that no version learnt from."""
    file = io.BytesIO(dataset_zip(4))
    return datasets.import_upload(database, settings.data_dir, file, "unseen", ArchiveLimits(2**20, 100), 100)[0].id


def test_version_is_evaluated_as_a_job_with_report_and_numbers(
    client: TestClient, database: Database, settings: Settings, publish: Callable[..., str], unseen: str, dataset: Any
) -> None:
    publish()
    version = client.get("/adapters/brain/versions/1").json()
    answer = client.post("/evaluate", json={"dataset": unseen, "adapter": "brain", "evaluation": {"max_records": 3}})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["status"], job["adapter"]) == ("evaluate", "queued", "brain")
    source = {"name": "brain", "version": 1, "digest": version["digest"]}
    assert (job["lineage"]["source"], job["lineage"]["adapter"]) == (source, None)
    assert job["config"]["evaluation"]["max_records"] == 3
    run_job(database, settings, job["id"], lambda: False)
    done = client.get(f"/jobs/{job['id']}").json()
    assert (done["status"], done["report_url"]) == ("succeeded", f"/jobs/{job['id']}/report")
    given = client.get(done["report_url"], headers={"Accept": "application/json"}).json()
    assert given["adapter"] == str(adapters.folder(settings.data_dir.resolve(), version["digest"]))
    assert given["trained_on"] == [str(datasets.folder(settings.data_dir.resolve(), dataset.digest))]
    (kept,) = client.get("/adapters/brain/versions/1/evaluations").json()["data"]
    assert (kept["job_id"], kept["dataset_id"], kept["metrics"]) == (job["id"], unseen, {"accuracy": 0.5})
    assert (kept["digest"], kept["before_version"]) == (version["digest"], None)
    assert read_stream(client, f"/jobs/{job['id']}/events")[-1][1]["data"] == {
        "status": "succeeded",
        "evaluated": source,
    }
    assert client.get("/adapters/brain").json()["versions"] == [1], "an evaluation makes no version"
    (use,) = client.get(f"/datasets/{unseen}/lineage").json()["data"]
    assert (use["job_id"], use["use"]) == (job["id"], ["evaluation"])
    (entry,) = client.get("/audit", params={"subject": job["id"]}).json()["data"]
    assert entry["data"] == {"evaluates": "brain:1", "dataset": unseen}


def test_request_sent_again_makes_one_job(client: TestClient, publish: Callable[..., str], unseen: str) -> None:
    publish()
    body = {"dataset": unseen, "adapter": "brain:1"}
    first, second = (client.post("/evaluate", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotent-replayed"] == "true"


def test_requests_that_cannot_be_evaluated_are_refused_before_they_are_queued(
    client: TestClient, settings: Settings, publish: Callable[..., str], unseen: str, dataset: Any
) -> None:
    publish()
    publish(model="another")
    good = {"dataset": unseen, "adapter": "brain:1"}
    for change, status, code in (
        ({"dataset": "ds_none"}, 404, "dataset_not_found"),
        ({"adapter": "brain:9"}, 404, "version_not_found"),
        ({"adapter": "none"}, 404, "adapter_not_found"),
        ({"adapter": "brain@none"}, 404, "alias_not_found"),
        ({"adapter": "../x"}, 404, "adapter_not_found"),
        ({"adapter": "brain:2"}, 409, "adapter_for_other_model"),
        ({"dataset": dataset.id}, 422, "leak"),
        ({"evaluation": {"n_bootstrap": 1}}, 422, "invalid_config"),
        ({"evaluation": {"max_records": 0}}, 422, "invalid_config"),
        ({"evaluation": {"gamma": 1}}, 422, "invalid_config"),
        ({"seed": -1}, 422, "invalid_config"),
        ({"optimization": {}}, 422, "invalid_request"),
        ({"webhook": "https://example.org"}, 422, "webhook_not_allowed"),
    ):
        answer = client.post("/evaluate", json=good | change)
        assert (answer.status_code, answer.json()["code"]) == (status, code), change
    assert [j["kind"] for j in client.get("/jobs").json()["data"]] == ["align", "align"]
    allowed = {"dataset": dataset.id, "evaluation": {"allow_leak": True}}
    assert client.post("/evaluate", json=good | allowed).status_code == 202
    settings.key_waiting_max = 1
    assert client.post("/evaluate", json=good).json()["code"] == "too_many_jobs"


def test_evaluation_counts_only_its_own_stages_as_ahead(
    client: TestClient, database: Database, publish: Callable[..., str], unseen: str
) -> None:
    """History: 90 s of alignment; 1 s of evaluation a record of 4, and 1 s of reporting. Ahead: 4 + 1 s."""
    aligned = publish()
    with database.write() as session:
        spent = {"generating": 30.0, "optimizing": 60.0, "reporting": 1.0}
        session.execute(update(Job).where(Job.id == aligned).values(stage_seconds=spent))
    body = {"dataset": unseen, "adapter": "brain:1"}
    first = client.post("/evaluate", json=body).json()["id"]
    with database.write() as session:
        mine = jobs.claim(session, first, 60)
        assert mine is not None
        jobs.heartbeat(session, mine, 60, stage_seconds={"evaluating": 4.0, "reporting": 1.0})
        jobs.succeed(session, mine)
    job = client.post("/evaluate", json=body).json()
    assert (job["queue"], job["remaining_s"]) == ({"position": 1, "starts_in_s": 0.0}, 5.0)


def test_damaged_version_is_not_evaluated(
    client: TestClient, database: Database, settings: Settings, publish: Callable[..., str], unseen: str
) -> None:
    publish()
    digest = client.get("/adapters/brain/versions/1").json()["digest"]
    (adapters.folder(settings.data_dir, digest) / "adapter_model.safetensors").write_bytes(b"other")
    job_id = client.post("/evaluate", json={"dataset": unseen, "adapter": "brain:1"}).json()["id"]
    run_job(database, settings, job_id, lambda: False)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]["code"]) == ("failed", "artifact_damaged")
    assert client.get("/adapters/brain/versions/1/evaluations").json()["data"] == []


def test_run_that_gives_the_other_kind_of_result_publishes_nothing(
    client: TestClient, database: Database, settings: Settings, publish: Callable[..., str], unseen: str
) -> None:
    publish()
    settings.max_crashes = 1
    job_id = client.post("/evaluate", json={"dataset": unseen, "adapter": "brain:1"}).json()["id"]
    settings.evaluate_command = settings.run_command  # aligns in place of evaluating
    run_job(database, settings, job_id, lambda: False)
    assert client.get(f"/jobs/{job_id}").json()["error"]["code"] == "no_result"
    assert client.get("/adapters/brain").json()["versions"] == [1]


FEW = {f"adapter/grounding_{name}": value for name, value in
       {"auroc": 0.7, "calibration/n": 58.0, "calibration/n_wrong": 16.0}.items()}  # fmt: skip
BLUNT = {f"adapter/grounding_{name}": value for name, value in
         {"auroc": 0.6, "calibration/n": 180.0, "calibration/n_wrong": 80.0, "calibration/auroc_low": 0.49}.items()}  # fmt: skip
TOO_FEW = "the calibration part has 16 wrong and 42 right answers; 20 of each are needed"


def sharp(threshold: float) -> dict[str, float]:
    return {"adapter/grounding_auroc": 0.75, "adapter/grounding_threshold": threshold}


@pytest.fixture
def evaluate(
    client: TestClient, database: Database, settings: Settings, unseen: str, stand_in: Callable[..., None]
) -> Callable[[dict[str, float]], str]:
    """Evaluate brain:1 to its end with these numbers; the job."""

    def measure(metrics: dict[str, float]) -> str:
        stand_in(metrics=metrics)
        job_id: str = client.post("/evaluate", json={"dataset": unseen, "adapter": "brain:1"}).json()["id"]
        run_job(database, settings, job_id, lambda: False)
        return job_id

    return measure


def grounding(client: TestClient) -> tuple[float | None, float | None, str | None, str | None]:
    """What a version says of itself, alone and in the list, which is the same."""
    one = client.get("/adapters/brain/versions/1").json()["grounding"]
    (listed,) = client.get("/adapters/brain/versions").json()["data"]
    assert listed["grounding"] == one
    return one["auroc"], one["threshold"], one["reason"], one["evaluation"]


def test_a_threshold_is_of_the_newest_evaluation_that_has_one(
    client: TestClient,
    database: Database,
    publish: Callable[..., str],
    evaluate: Callable[[dict[str, float]], str],
) -> None:
    made = publish(metrics=FEW)
    assert grounding(client) == (0.7, None, TOO_FEW, made)
    blunt = evaluate(BLUNT)
    assert grounding(client) == (0.6, None, says_nothing(0.49), blunt), "the newest that was measured"
    assert evaluate({"accuracy": 0.5}) != blunt
    assert grounding(client)[3] == blunt, "one that measured nothing of it is none"
    first = evaluate(sharp(-0.02))
    assert grounding(client) == (0.75, -0.02, None, first)
    evaluate(FEW)
    assert grounding(client) == (0.75, -0.02, None, first), "one without a threshold replaces none"
    second = evaluate(sharp(0.5))
    assert grounding(client) == (0.75, 0.5, None, second)
    with database.read() as session:
        found = adapters.resolve(session, "brain")
        assert (found.threshold, found.no_threshold) == (0.5, None), "what /vqa goes by"


def test_a_versions_own_threshold_stands_until_another_is_found(
    client: TestClient, publish: Callable[..., str], evaluate: Callable[[dict[str, float]], str]
) -> None:
    made = publish(metrics=sharp(-0.01))
    evaluate(BLUNT)
    assert grounding(client) == (0.75, -0.01, None, made)
    other = evaluate(sharp(0.25))
    assert grounding(client) == (0.75, 0.25, None, other)


def test_a_version_that_nothing_measured_says_so(client: TestClient, publish: Callable[..., str]) -> None:
    publish()
    assert grounding(client) == (None, None, thresholds.NEVER, None)
