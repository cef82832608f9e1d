"""What callers ask of jobs, over HTTP: cancel, pause, resume, approve, retry, limits; each transition only where the table has it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update

from service import jobs
from service.db import Database, now
from service.errors import Problem
from service.events import MetricsEvent
from service.job_requests import retry as ask_retry
from service.models import Job, Outbox
from service.settings import Settings
from tests.service.test_align import read_stream

pytestmark = pytest.mark.either_database

NewJob = Callable[..., str]
VERBS = ("cancel", "pause", "resume", "approve", "retry")


def put_into(database: Database, job_id: str, status: str) -> jobs.Claim | None:
    """Bring a queued job to a status as it would come there."""
    from service import job_requests

    with database.write() as session:
        if status in ("queued", "cancelled", "paused"):
            {"queued": jobs.get, "cancelled": job_requests.cancel, "paused": job_requests.pause}[status](
                session, job_id
            )
            return None
        mine = jobs.claim(session, job_id, 60)
        assert mine is not None
        if status == "awaiting_review":
            jobs.await_review(session, mine)
        elif status == "failed":
            jobs.fail(session, mine, "bad", "words")
        elif status == "succeeded":
            jobs.succeed(session, mine)
            jobs.add_event(session, job_id, 3, mine.fence, "status", {"status": "succeeded"})
    return mine


def said(client: TestClient, job_id: str) -> list[Any]:
    return [e["data"] for e in client.get(f"/jobs/{job_id}/events", params={"limit": 500}).json()["data"]]


# verb -> status before -> status after, or the refusal
RULES: dict[str, dict[str, str]] = {
    "cancel": {"queued": "cancelled", "running": "running", "paused": "cancelled", "awaiting_review": "cancelled",
               "succeeded": "job_ended", "failed": "job_ended", "cancelled": "cancelled"},
    "pause": {"queued": "paused", "running": "running", "paused": "paused", "awaiting_review": "job_elsewhere",
              "succeeded": "job_ended", "failed": "job_ended", "cancelled": "job_ended"},
    "resume": {"queued": "queued", "running": "running", "paused": "queued", "awaiting_review": "job_elsewhere",
               "succeeded": "job_ended", "failed": "job_ended", "cancelled": "job_ended"},
    "approve": {"queued": "job_elsewhere", "running": "job_elsewhere", "paused": "job_elsewhere",
                "awaiting_review": "queued", "succeeded": "job_ended", "failed": "job_ended", "cancelled": "job_ended"},
    "retry": {"queued": "queued", "running": "running", "paused": "job_elsewhere", "awaiting_review": "job_elsewhere",
              "succeeded": "job_ended", "failed": "queued", "cancelled": "job_ended"},
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_wish_in_every_status(client: TestClient, database: Database, new_job: NewJob, verb: str) -> None:
    for before, after in RULES[verb].items():
        job_id = new_job()
        put_into(database, job_id, before)
        events = len(said(client, job_id))
        answer = client.post(f"/jobs/{job_id}/{verb}")
        if after in ("job_ended", "job_elsewhere"):
            assert (answer.status_code, answer.json()["code"]) == (409, after), before
            assert len(said(client, job_id)) == events
            continue
        assert (answer.status_code, answer.json()["status"]) == (202, after), before
        told = len(said(client, job_id))
        again = client.post(f"/jobs/{job_id}/{verb}")
        assert (again.status_code, again.json()["status"]) == (202, after), f"{before}, asked twice"
        assert len(said(client, job_id)) == told, "asking twice writes nothing"
    assert client.post(f"/jobs/job_none/{verb}").json()["code"] == "job_not_found"


def test_wishes_at_once_move_a_job_once(client: TestClient, database: Database, new_job: NewJob) -> None:
    """Eight retries of one failed job: one of them queues it, with one bell more."""
    job_id = new_job()
    put_into(database, job_id, "failed")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post(f"/jobs/{job_id}/retry").status_code, range(8)))
    assert set(answers) == {202}
    assert [d["status"] for d in said(client, job_id)] == ["queued", "running", "failed", "queued"]
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Outbox)) == 2


def test_retried_job_is_fresh_but_keeps_its_history(client: TestClient, database: Database, new_job: NewJob) -> None:
    job_id = new_job(deadline_s=1000.0)
    mine = put_into(database, job_id, "failed")
    first = client.get(f"/jobs/{job_id}").json()
    time.sleep(0.01)
    job = client.post(f"/jobs/{job_id}/retry").json()
    assert (job["error"], job["finished_at"], job["attempts"]) == (None, None, 1)
    assert job["deadline_at"] > first["deadline_at"]
    with database.write() as session:
        again = jobs.claim(session, job_id, 60)
    assert again is not None
    assert mine is not None
    assert again.fence > mine.fence
    with database.write() as session:
        jobs.fail(session, again, "bad", "words")
    rows = read_stream(client, f"/jobs/{job_id}/events")
    statuses = [e["data"]["status"] for _, e in rows]
    assert statuses == ["queued", "running", "failed", "queued", "running", "failed"], (
        "a stream ends with the last ending"
    )


def test_pause_taken_back_before_it_was_obeyed_queues_the_job(
    database: Database, client: TestClient, new_job: NewJob
) -> None:
    """The supervisor saw the wish and stopped its run; meanwhile the caller resumed: the job must not stay paused."""
    job_id = new_job()
    mine = put_into(database, job_id, "running")
    assert mine is not None
    client.post(f"/jobs/{job_id}/pause")
    with database.write() as session:
        assert jobs.heartbeat(session, mine, 60).pause_requested
    client.post(f"/jobs/{job_id}/resume")
    with database.write() as session:
        assert jobs.hand_back(session, mine, "resumed") == "queued"


@pytest.mark.parametrize(("wish", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_wish_is_honoured_though_the_worker_died(
    database: Database, client: TestClient, new_job: NewJob, wish: str, status: str
) -> None:
    """The lease runs out before the supervisor obeyed: the sweep obeys in its place."""
    job_id = new_job()
    with database.write() as session:
        jobs.claim(session, job_id, 0.01)
    client.post(f"/jobs/{job_id}/{wish}")
    time.sleep(0.05)
    with database.write() as session:
        assert jobs.reap(session, job_id, 3) == status


def test_deadline_counts_while_a_job_waits_for_people(database: Database, new_job: NewJob) -> None:
    from worker import sweep

    ids = {status: new_job(deadline_s=1000) for status in jobs.WAITING}
    for status, job_id in ids.items():
        put_into(database, job_id, status)
    with database.write() as session:
        session.execute(update(Job).values(deadline_at=now()))
    assert sweep.reap(database, 3) == 3
    with database.read() as session:
        assert {jobs.get(session, i).error_code for i in ids.values()} == {"deadline"}


def test_review_is_asked_for_in_the_request(client: TestClient, dataset: Any) -> None:
    job = client.post("/align", json={"dataset": dataset.id, "adapter": "brain", "review": True}).json()
    assert (job["review"], job["approved_at"]) == (True, None)


def test_key_with_too_many_waiting_jobs_is_told_so(
    settings: Settings, client: TestClient, database: Database, dataset: Any
) -> None:
    settings.key_waiting_max = 2
    body = {"dataset": dataset.id, "adapter": "brain"}
    first = client.post("/align", json=body).json()["id"]
    paused = client.post("/align", json=body).json()["id"]
    client.post(f"/jobs/{paused}/pause")
    answer = client.post("/align", json=body)
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")
    assert "retry-after" in answer.headers
    put_into(database, first, "failed")
    assert client.post("/align", json=body).status_code == 202
    answer = client.post(f"/jobs/{first}/retry")
    assert answer.json()["code"] == "too_many_jobs"
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 3


def test_waiting_limit_holds_when_requests_come_at_once(settings: Settings, client: TestClient, dataset: Any) -> None:
    settings.key_waiting_max = 3
    body = {"dataset": dataset.id, "adapter": "brain"}
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda _: client.post("/align", json=body).status_code, range(12)))
    assert sorted(codes) == [202] * 3 + [429] * 9


def test_running_limit_of_a_key_holds_when_claims_come_at_once(database: Database, new_job: NewJob) -> None:
    """One owner's jobs beyond the limit stay queued; another owner's job is not held up by them."""
    mine, other = [new_job(owner="key_a") for _ in range(6)], new_job(owner="key_b")

    def claim(job_id: str) -> bool:
        with database.write() as session:
            return jobs.claim(session, job_id, 60, running_max=2) is not None

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(claim, mine)) == 2
    assert claim(other)


def test_queue_position_and_times(client: TestClient, database: Database, new_job: NewJob) -> None:
    """One finished job took 10 s over its three records; then two wait, one runs."""
    done = new_job()
    assert client.get(f"/jobs/{done}").json()["queue"] == {"position": 1, "starts_in_s": 0.0}
    with database.write() as session:
        mine = jobs.claim(session, done, 60)
        assert mine is not None
        jobs.heartbeat(session, mine, 60, stage_seconds={"generating": 3.0, "optimizing": 6.0, "reporting": 1.0})
        jobs.succeed(session, mine)
    running, second, third = new_job(), new_job(), new_job()
    with database.write() as session:
        mine = jobs.claim(session, running, 60)
        assert mine is not None
        progress = {"stage": "optimizing", "done": 1, "total": 3, "eta_s": 4.0}
        jobs.heartbeat(session, mine, 60, stage="optimizing", progress=progress)

    def view(job_id: str) -> tuple[Any, Any, Any]:
        job = client.get(f"/jobs/{job_id}").json()
        return job["queue"]["position"], job["queue"]["starts_in_s"], job["remaining_s"]

    assert view(done) == (None, None, None)
    assert view(running) == (None, None, 5.0)  # 4 s by the run's word and 1 s of reporting
    assert view(second) == (1, 5.0, 15.0)  # and its own 3 + 6 + 1
    assert view(third) == (2, 15.0, 25.0)
    listed = {j["id"]: j["queue"]["position"] for j in client.get("/jobs").json()["data"]}
    assert listed == {done: None, running: None, second: 1, third: 2}
    client.post(f"/jobs/{second}/pause")
    assert view(third)[0] == 1
    client.post(f"/jobs/{second}/resume")
    assert (view(second)[0], view(third)[0]) == (2, 1), "who comes back stands at the end"


def test_metrics_are_series_and_a_step_taken_again_counts_once(
    client: TestClient, database: Database, new_job: NewJob
) -> None:
    job_id = new_job()
    with database.write() as session:
        mine = jobs.claim(session, job_id, 60)
        assert mine is not None
        values = [(1, 1.0), (2, 0.5), (3, 0.4), (2, 0.6), (3, 0.3), (4, 0.2)]
        events = [MetricsEvent(stage="optimizing", step=s, values={"loss": v, "lr": 1.0}) for s, v in values]
        events += [MetricsEvent(stage="generating", step=0, values={"records": 3.0})]
        events += [MetricsEvent(stage="optimizing", step=5, values={"loss": 0.1})]
        jobs.heartbeat(session, mine, 60, events)
    path = f"/jobs/{job_id}/metrics"
    whole = client.get(path).json()
    assert whole["steps"] == [1, 2, 3, 4, 5]
    assert whole["series"] == {"loss": [1.0, 0.6, 0.3, 0.2, 0.1], "lr": [1.0, 1.0, 1.0, 1.0, None]}
    assert client.get(path, params={"stage": "generating"}).json()["steps"] == [0]
    assert list(client.get(path, params={"name": "lr"}).json()["series"]) == ["lr"]
    first = client.get(path, params={"limit": 2}).json()
    rest = client.get(path, params={"limit": 3, "after": first["next"]}).json()
    assert first["steps"] + rest["steps"] == whole["steps"]
    assert (first["has_more"], rest["has_more"], rest["next"]) == (True, False, None)
    assert client.get("/jobs/job_none/metrics").json()["code"] == "job_not_found"
    assert client.get(path, params={"stage": "none"}).status_code == 422


def test_transition_that_the_table_lacks_is_refused(database: Database, new_job: NewJob) -> None:
    statuses = list(jobs.TRANSITIONS)
    for before in statuses:
        for to in statuses:
            job_id = new_job()
            put_into(database, job_id, before)
            with database.write() as session:
                lease = {"lease_until": now()} if to == "running" else {}
                moved = jobs.move(session, job_id, to, **lease)
            assert (moved is not None) == (to in jobs.TRANSITIONS[before]), (before, to)


def test_retry_of_a_job_that_is_gone_says_so(database: Database) -> None:
    with pytest.raises(Problem, match="job_not_found"), database.write() as session:
        ask_retry(session, "job_none", None)


def test_metrics_say_how_long_the_oldest_job_waits(client: Any, new_job: Any, database: Any) -> None:
    from datetime import timedelta

    from service.models import Job

    def oldest() -> float:
        line = next(x for x in client.get("/metrics").text.splitlines() if x.startswith("hscr_jobs_oldest_queued_s"))
        return float(line.split()[1])

    assert oldest() == 0
    job_id = new_job()
    with database.write() as session:
        job = session.get(Job, job_id)
        job.queued_at -= timedelta(hours=1)
    assert 3600 <= oldest() < 3700
