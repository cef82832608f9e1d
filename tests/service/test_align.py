"""POST /align and the job routes: validation, idempotency, cancel, events as pages and as a stream."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text

from service import feed, jobs
from service.db import Database
from service.models import IdempotencyKey, Job, Outbox
from service.routes import jobs as job_routes

pytestmark = pytest.mark.either_database

NewJob = Callable[..., str]


def count(database: Database, table: Any) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_align_stores_job_event_and_bell_and_answers_202(client: TestClient, database: Database, dataset: Any) -> None:
    body = {"dataset": dataset.id, "adapter": "brain", "optimization": {"epochs": 3}, "metadata": {"team": "a"}}
    answer = client.post("/align", json=body)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["status"], job["attempts"], job["config"]["optimization"]["epochs"]) == ("queued", 0, 3)
    assert job["lineage"]["dataset"] == {"id": dataset.id, "digest": dataset.digest}
    assert client.get(answer.headers["location"]).json() == job
    assert count(database, Outbox) == 1
    assert [e["data"] for e in client.get(f"/jobs/{job['id']}/events").json()["data"]] == [{"status": "queued"}]


def test_preset_is_the_ground_and_given_values_lie_on_it(client: TestClient, dataset: Any) -> None:
    from hscr.config import preset

    body = {"dataset": dataset.id, "adapter": "brain"}
    recommended = client.post("/align", json=body).json()["config"]
    paper = client.post("/align", json=body | {"preset": "paper", "seed": 7}).json()["config"]
    assert recommended == json.loads(json.dumps(preset("recommended").to_dict()))
    assert paper == json.loads(json.dumps(preset("paper").to_dict())) | {"seed": 7}


@pytest.mark.either_database
@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"dataset": "ds_none"}, 404, "dataset_not_found"),
        ({"evaluation": {"dataset": "ds_none"}}, 404, "dataset_not_found"),
        ({"evaluation": {"dataset": 3}}, 422, "invalid_config"),
        ({"adapter": "../up"}, 422, "invalid_request"),
        ({"adapter": "a@b"}, 422, "invalid_request"),
        ({"adapter": "x" * 65}, 422, "invalid_request"),
        ({"optimization": {"lr": -1}}, 422, "invalid_config"),
        ({"optimization": {"lr": 1e308}}, 422, "invalid_config"),
        ({"optimization": {"epochs": 10**9}}, 422, "invalid_config"),
        ({"preference": {"unknown": 1}}, 422, "invalid_config"),
        ({"preference": {"perturbation": "blur"}}, 422, "invalid_config"),
        ({"optimization": {"guard": -1}}, 422, "invalid_config"),
        ({"seed": -1}, 422, "invalid_config"),
        ({"model": "other/model"}, 422, "model_not_served"),
        ({"unknown": 1}, 422, "invalid_request"),
        ({"preset": "best"}, 422, "invalid_request"),
        ({"deadline_s": 0}, 422, "invalid_request"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_queued(
    client: TestClient, database: Database, dataset: Any, change: dict[str, Any], status: int, code: str
) -> None:
    answer = client.post("/align", json={"dataset": dataset.id, "adapter": "brain"} | change)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert count(database, Job) == count(database, Outbox) == 0


@pytest.mark.parametrize("body", [b"{", b"[" * 50_000, b'{"optimization": {"lr": NaN}}', b"\xff\xfe", b"1" * 10_000])
def test_unreadable_bodies_are_refused(client: TestClient, dataset: Any, body: bytes) -> None:
    answer = client.post("/align", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_replay_gives_the_same_body_and_makes_no_second_job(
    client: TestClient, database: Database, dataset: Any
) -> None:
    body, headers = {"dataset": dataset.id, "adapter": "brain"}, {"Idempotency-Key": "k1"}
    first = client.post("/align", json=body, headers=headers)
    again = client.post("/align", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert count(database, Job) == count(database, Outbox) == 1


def test_key_reused_with_another_body_is_refused(client: TestClient, database: Database, dataset: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    client.post("/align", json={"dataset": dataset.id, "adapter": "brain"}, headers=headers)
    answer = client.post("/align", json={"dataset": dataset.id, "adapter": "other"}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")
    assert count(database, Job) == 1


def test_refused_request_does_not_burn_its_key(client: TestClient, database: Database, dataset: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    assert client.post("/align", json={"dataset": "ds_none", "adapter": "brain"}, headers=headers).status_code == 404
    assert count(database, IdempotencyKey) == 0
    assert client.post("/align", json={"dataset": dataset.id, "adapter": "brain"}, headers=headers).status_code == 202


def test_key_in_flight_is_409_and_one_job_comes_of_it(client: TestClient, database: Database, dataset: Any) -> None:
    """The first request is held up by a lock on the database; the second meets it in flight."""
    body, headers = {"dataset": dataset.id, "adapter": "brain"}, {"Idempotency-Key": "k1"}
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            postgres = session.get_bind().dialect.name == "postgresql"
            session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE" if postgres else "SELECT 1"))
            first = pool.submit(client.post, "/align", json=body, headers=headers)
            time.sleep(0.5)
            second = client.post("/align", json=body, headers=headers)
        assert first.result().status_code == 202
    assert (second.status_code, second.json()["code"]) == (409, "idempotency_in_flight")
    assert "retry-after" in second.headers
    assert client.post("/align", json=body, headers=headers).json() == first.result().json()
    assert count(database, Job) == 1


def test_key_in_flight_on_another_replica_makes_one_job(
    client: TestClient, database: Database, dataset: Any, settings: Any
) -> None:
    """Two replicas on one database: each request gets 202 with the same job, or 409."""
    from fastapi.testclient import TestClient as Client

    from service.app import create_app

    body, headers = {"dataset": dataset.id, "adapter": "brain"}, {"Idempotency-Key": "k1"}
    with Client(create_app(settings), base_url="http://127.0.0.1") as other, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit((client, other)[i % 2].post, "/align", json=body, headers=headers) for i in range(16)]
        answers = [c.result() for c in calls]
    assert {a.status_code for a in answers} <= {202, 409}
    assert len({a.json()["id"] for a in answers if a.status_code == 202}) == 1
    assert count(database, Job) == 1


def test_queued_job_is_cancelled_at_once(client: TestClient, new_job: NewJob) -> None:
    job_id = new_job()
    answer = client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    assert client.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    assert [e["data"]["status"] for e in client.get(f"/jobs/{job_id}/events").json()["data"]] == ["queued", "cancelled"]


def test_ended_job_cannot_be_cancelled(client: TestClient, database: Database, new_job: NewJob) -> None:
    job_id = new_job()
    with database.write() as session:
        mine = jobs.claim(session, job_id, 10)
        assert mine is not None
        jobs.fail(session, mine, "bad", "words")
    answer = client.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_ended")
    assert client.get(f"/jobs/{job_id}").json()["error"] == {"code": "bad", "message": "words"}


def test_jobs_are_listed_newest_first_in_pages(client: TestClient, new_job: NewJob) -> None:
    ids = []
    for _ in range(5):
        ids.append(new_job())
        time.sleep(0.002)
    seen, after = [], None
    for _ in range(3):
        page = client.get("/jobs", params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [job["id"] for job in page["data"]]
        after = page["next"]
    assert seen == ids[::-1]
    assert (page["has_more"], page["next"]) == (False, None)


def read_stream(
    client: TestClient, path: str, headers: dict[str, str] | None = None, stop_after: int | None = None
) -> list[Any]:
    """The (id, event) pairs of a stream."""
    got = []
    with client.stream("GET", path, headers={"Accept": "text/event-stream"} | (headers or {})) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        number = 0
        for line in response.iter_lines():
            if line.startswith("id: "):
                number = int(line[4:])
            if line.startswith("data: "):
                got.append((number, json.loads(line[6:])))
                if len(got) == stop_after:
                    return got
    return got


def test_stream_follows_a_job_to_its_last_event(
    client: TestClient, database: Database, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.events import ProgressEvent

    monkeypatch.setattr(feed, "POLL_S", 0.05)
    job_id = new_job()

    def work() -> None:
        with database.write() as session:
            mine = jobs.claim(session, job_id, 10)
        assert mine is not None
        for done in range(1, 8):
            time.sleep(0.02)
            with database.write() as session:
                jobs.heartbeat(session, mine, 10, [ProgressEvent(stage="generating", done=done, total=7)])
        with database.write() as session:
            jobs.fail(session, mine, "x", "x")

    worker = threading.Thread(target=work)
    worker.start()
    got = read_stream(client, f"/jobs/{job_id}/events")
    worker.join()
    assert [number for number, _ in got] == list(range(1, 11))
    assert got[-1][1]["data"]["status"] == "failed"


def test_stream_resumes_without_a_gap(client: TestClient, database: Database, new_job: NewJob) -> None:
    job_id = new_job()
    with database.write() as session:
        mine = jobs.claim(session, job_id, 10)
        assert mine is not None
        jobs.fail(session, mine, "x", "x")
    path = f"/jobs/{job_id}/events"
    whole = read_stream(client, path)
    assert [number for number, _ in whole] == [1, 2, 3]
    for cut in range(4):
        assert read_stream(client, path, {"Last-Event-ID": str(cut)}) == whole[cut:]
    assert read_stream(client, path, {"Last-Event-ID": "99"}) == []


def test_quiet_stream_says_that_it_is_alive(
    client: TestClient, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "POLL_S", 0.02)
    monkeypatch.setattr(job_routes, "HEARTBEAT_S", 0.05)
    job_id = new_job()
    polls = threading.Semaphore(0)
    look = feed.Feed._look
    monkeypatch.setattr(feed.Feed, "_look", lambda *given: (polls.release(), look(*given))[1])

    def cancel_after_many_polls() -> None:
        for _ in range(20):
            assert polls.acquire(timeout=10)
        client.post(f"/jobs/{job_id}/cancel")

    timer = threading.Thread(target=cancel_after_many_polls)
    timer.start()
    with client.stream("GET", f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as response:
        text_ = "".join(response.iter_text())
    timer.join()
    assert text_.count(": still here") >= 2
    assert text_.rstrip().rpartition("data: ")[2].startswith('{"seq": 2')


@pytest.mark.either_database
def test_dry_run_gives_the_real_plan_and_stores_nothing(client: TestClient, database: Database, dataset: Any) -> None:
    body = {"dataset": dataset.id, "adapter": "brain", "evaluation": {"dataset": dataset.id, "allow_leak": True}}
    answer = client.post("/align?dry_run=true", json=body, headers={"Idempotency-Key": "dry"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["dry_run"], found["records"], found["evaluation_records"]) == (
        True,
        dataset.n_records,
        dataset.n_records,
    )
    assert found["config"]["optimization"]["epochs"] == 2
    plan = found["plan"]
    assert [s["stage"] for s in plan["stages"]] == ["generating", "optimizing", "evaluating"]
    assert plan["stages"][0]["units"] == dataset.n_records
    assert plan["fits"]
    assert plan["seconds"] > 0
    assert [count(database, t) for t in (Job, Outbox, IdempotencyKey)] == [0, 0, 0]


def test_dry_run_checks_what_a_start_checks(client: TestClient, dataset: Any) -> None:
    for change, code in (
        ({"dataset": "ds_none"}, "dataset_not_found"),
        ({"optimization": {"lr": -1.0}}, "invalid_config"),
    ):
        answer = client.post("/align?dry_run=true", json={"dataset": dataset.id, "adapter": "brain"} | change)
        assert answer.json()["code"] == code


@pytest.mark.either_database
def test_an_evaluation_on_the_jobs_own_data_is_refused_unless_it_is_allowed(
    client: TestClient, database: Database, dataset: Any
) -> None:
    body = {"dataset": dataset.id, "adapter": "brain", "evaluation": {"dataset": dataset.id}}
    for path in ("/align", "/align?dry_run=true"):
        answer = client.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "leak")
        assert answer.json()["param"] == "evaluation.dataset"
    assert count(database, Job) == 0
    for harmless in ({"allow_leak": True}, {"max_records": 0}):  # with no record nothing is evaluated
        asked = body | {"evaluation": {"dataset": dataset.id} | harmless}
        assert client.post("/align", json=asked).status_code == 202


def test_a_plan_that_cannot_be_made_says_so(client: TestClient, dataset: Any, settings: Any) -> None:
    body = {"dataset": dataset.id, "adapter": "brain"}
    settings.plan_command = [sys.executable, "-c", "raise SystemExit('/secret/path')"]
    answer = client.post("/align?dry_run=true", json=body)
    assert (answer.status_code, answer.json()["code"]) == (503, "plan_unavailable")
    assert "secret" not in answer.text
    settings.plan_command, settings.plan_max_s = [sys.executable, "-c", "import time; time.sleep(60)"], 0.3
    assert client.post("/align?dry_run=true", json=body).json()["code"] == "plan_unavailable"
