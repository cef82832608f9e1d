"""Corrections of preferences over HTTP while a job awaits review: what may be said, when, who is noted, and what the run gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from hscr.artifacts import file_digest
from hscr.review import LevelReview, read_review
from service import jobs
from service.db import Database
from service.models import PreferenceEdit
from service.settings import Settings
from tests.service.test_job_requests import put_into
from tests.service.test_preferences import preference, save
from worker.supervise import run_job

pytestmark = pytest.mark.either_database


@pytest.fixture
def waiting(database: Database, new_job: Callable[..., str], settings: Settings) -> str:
    """A job that awaits review with three records: of two levels, one and none."""
    job_id = new_job(review=True)
    save(settings, job_id, 1, [preference(0), preference(1, 1), preference(2, 0)])
    put_into(database, job_id, "awaiting_review")
    return job_id


def test_record_and_levels_are_rejected_and_corrected_step_by_step(client: TestClient, waiting: str) -> None:
    path = f"/jobs/{waiting}/preferences"
    plain = client.get(path).json()["data"]
    first = client.patch(f"{path}/1", json={"levels": [{"level": 2, "text": "Somewhere else."}]}).json()
    assert first["levels"][1] == plain[0]["levels"][1] | {"correction": "Somewhere else."}
    second = client.patch(f"{path}/1", json={"levels": [{"level": 1, "rejected": True}]}).json()
    assert [(lv["rejected"], lv["correction"]) for lv in second["levels"]] == [(True, None), (False, "Somewhere else.")]
    assert client.patch(f"{path}/2", json={"rejected": True}).json()["rejected"]
    shown = client.get(path).json()["data"]
    assert shown == [second, plain[1] | {"rejected": True, "reviewed_by": "local"}, plain[2]]
    back = {"levels": [{"level": 1, "rejected": False}, {"level": 2, "text": None}]}
    assert client.patch(f"{path}/1", json=back).json() == plain[0]
    client.patch(f"{path}/2", json={"rejected": False})
    assert client.get(path).json()["data"] == plain, "taken back, nothing is left"


def test_corrections_are_refused_with_what_is_wrong(client: TestClient, waiting: str, database: Database) -> None:
    path = f"/jobs/{waiting}/preferences"
    right = "the lesion is in the LEFT frontal lobe"
    for number, body, status, code in (
        (1, {"levels": [{"level": 3, "rejected": True}]}, 422, "invalid_correction"),
        (1, {"levels": [{"level": 1, "text": right}]}, 422, "invalid_correction"),
        (1, {"levels": [{"level": 1, "text": " "}]}, 422, "invalid_correction"),
        (1, {"levels": [{"level": 1, "text": "a"}, {"level": 1, "text": "b"}]}, 422, "invalid_correction"),
        (1, {"levels": [{"level": 1, "text": "x" * 20_001}]}, 422, "invalid_request"),
        (1, {"levels": [{"level": 0, "rejected": True}]}, 422, "invalid_request"),
        (1, {"levels": [{"level": 1, "similarity": 1.0}]}, 422, "invalid_request"),
        (1, {"rejected": "yes"}, 422, "invalid_request"),
        (1, {"answer": "x"}, 422, "invalid_request"),
        (4, {"rejected": True}, 404, "record_not_found"),
        (0, {"rejected": True}, 422, "invalid_request"),
    ):
        answer = client.patch(f"{path}/{number}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code), body
        assert answer.headers["content-type"] == "application/problem+json"
        assert right not in answer.text
    surrogate = client.patch(f"{path}/1", content=b'{"levels": [{"level": 1, "text": "\\ud800"}]}')
    assert surrogate.status_code == 422
    assert client.patch("/jobs/job_none/preferences/1", json={"rejected": True}).json()["code"] == "job_not_found"
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(PreferenceEdit)) == 0


def test_only_a_job_that_awaits_review_takes_corrections(
    client: TestClient, database: Database, new_job: Callable[..., str], settings: Settings
) -> None:
    for status in (s for s in jobs.TRANSITIONS if s != "awaiting_review"):
        job_id = new_job()
        save(settings, job_id, 1, [preference(0)])
        put_into(database, job_id, status)
        answer = client.patch(f"/jobs/{job_id}/preferences/1", json={"rejected": True})
        assert (answer.status_code, answer.json()["code"]) == (409, "job_elsewhere"), status


def test_audit_has_numbers_and_a_digest_and_no_word(client: TestClient, waiting: str) -> None:
    path = f"/jobs/{waiting}/preferences/1"
    body = {"levels": [{"level": 1, "rejected": True}, {"level": 2, "text": "canary"}]}
    for _ in range(2):
        client.patch(path, json=body)
    (entry,) = client.get("/audit", params={"subject": waiting}).json()["data"]
    assert (entry["actor"], entry["action"]) == ("local", "preference.review")
    digest = entry["data"].pop("digest")
    assert digest.startswith("sha256:")
    assert entry["data"] == {"record": 1, "rejected": False, "levels_rejected": [1], "levels_corrected": [2]}
    assert "canary" not in client.get("/audit").text
    assert "canary" not in client.get(f"/jobs/{waiting}/events").text


def test_corrections_at_once_all_stand(client: TestClient, waiting: str) -> None:
    bodies = [{"levels": [{"level": 1, "rejected": True}]}, {"levels": [{"level": 2, "text": "Elsewhere."}]}]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda body: client.patch(f"/jobs/{waiting}/preferences/1", json=body), bodies))
    levels = client.get(f"/jobs/{waiting}/preferences").json()["data"][0]["levels"]
    assert [(lv["rejected"], lv["correction"]) for lv in levels] == [(True, None), (False, "Elsewhere.")]


def test_run_gets_the_corrections_and_the_version_tells_of_them(
    client: TestClient, database: Database, settings: Settings, waiting: str, stand_in: Callable[..., None]
) -> None:
    path = f"/jobs/{waiting}/preferences"
    client.patch(f"{path}/1", json={"levels": [{"level": 1, "rejected": True}, {"level": 2, "text": "canary"}]})
    client.patch(f"{path}/2", json={"rejected": True})
    generated = file_digest(settings.data_dir / "runs" / waiting / "attempt-1" / "preferences.jsonl")
    client.post(f"/jobs/{waiting}/approve")
    stand_in(crash_at=3, crashes=1)  # the second attempt gets the same review
    for _ in range(2):
        run_job(database, settings, waiting, lambda: False)
    (work,) = (settings.data_dir / "runs" / waiting).glob("attempt-*")
    review = read_review(Path(work / "reviewed.jsonl"))  # the stand-in writes there what it was given
    assert {n: (r.rejected, r.levels) for n, r in review.items()} == {
        1: (False, {1: LevelReview(rejected=True), 2: LevelReview(text="canary")}), 2: (True, {}),
    }  # fmt: skip
    origin = client.get("/adapters/brain/versions/1/lineage").json()
    assert origin["preferences_digest"] == file_digest(work / "reviewed.jsonl")
    assert origin["review"] == {
        "digest": file_digest(work.parent / "review.json"), "generated_digest": generated,
        "records_rejected": 1, "levels_rejected": 1, "levels_corrected": 1,
    }  # fmt: skip
    shown = client.get(path).json()["data"]
    assert (shown[0]["levels"][1]["correction"], shown[1]["rejected"]) == ("canary", True), "still to be seen"
    client.delete(f"/jobs/{waiting}")
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(PreferenceEdit)) == 0
    assert client.get("/adapters/brain/versions/1/lineage").json()["review"] == origin["review"]


def test_export_is_what_the_job_learns_from(client: TestClient, waiting: str, settings: Settings) -> None:
    folder = settings.data_dir / "runs" / waiting / "attempt-1"
    lines = (folder / "preferences.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "reviewed.jsonl").write_bytes(lines[1])
    export = client.get(f"/jobs/{waiting}/preferences/export", params={"format": "hscr", "images": False}).text
    assert [json.loads(row)["record"]["id"] for row in export.splitlines()] == ["r1"]
    assert len(client.get(f"/jobs/{waiting}/preferences").json()["data"]) == 3


def test_job_without_corrections_runs_as_before(
    client: TestClient, database: Database, settings: Settings, waiting: str, stand_in: Callable[..., None]
) -> None:
    client.post(f"/jobs/{waiting}/approve")
    run_job(database, settings, waiting, lambda: False)
    (work,) = (settings.data_dir / "runs" / waiting).glob("attempt-*")
    assert not (work / "reviewed.jsonl").exists()
    origin: dict[str, Any] = client.get("/adapters/brain/versions/1/lineage").json()
    assert (origin["review"], origin["preferences_digest"]) == (None, file_digest(work / "preferences.jsonl"))
