"""Promotion gates: the rule against numbers done by hand, and an alias that moves, stays, or was moved by somebody else meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import adapters
from service.db import Database
from service.gates import Rule, judge
from service.settings import Settings
from tests.service.test_evaluations import unseen
from tests.service.test_registry import publish
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

__all__ = ["publish", "unseen"]  # fixtures
PATH = "/adapters/brain/aliases/champion"


@pytest.mark.parametrize(
    ("rule", "interval", "passes"),
    [
        (Rule("m"), {"mean": 0.1, "low": 0.01, "high": 0.2, "n": 30}, True),
        (Rule("m"), {"mean": 0.1, "low": 0.0, "high": 0.2, "n": 30}, False),
        (Rule("m"), {"mean": 0.1, "low": 0.01, "high": 0.2, "n": 29}, False),
        (Rule("m", min_questions=29), {"mean": 0.1, "low": 0.01, "high": 0.2, "n": 29}, True),
        (Rule("m", "not_worse", 0.02), {"mean": 0.0, "low": -0.019, "high": 0.1, "n": 99}, True),
        (Rule("m", "not_worse", 0.02), {"mean": 0.0, "low": -0.02, "high": 0.1, "n": 99}, False),
        (Rule("m", "not_worse", 0.0), {"mean": 0.1, "low": 0.0, "high": 0.1, "n": 99}, False),
        (Rule("m"), None, False),
    ],
)
def test_rule_by_hand(rule: Rule, interval: dict[str, float] | None, passes: bool) -> None:
    assert judge(rule, interval)[0] is passes


def gain(over: str, low: float, n: int = 40) -> dict[str, float]:
    values = {"mean": low + 0.1, "low": low, "high": low + 0.2, "n": n}
    return {f"{over}/open/strict/{name}": value for name, value in values.items()}


@pytest.fixture
def two(client: TestClient, publish: Callable[..., str]) -> TestClient:
    """Versions 1 and 2, the champion is 1."""
    publish(5)
    publish(6)
    client.put(PATH, json={"version": 1, "reason": "first"})
    return client


def body(dataset: str, **gate: Any) -> dict[str, Any]:
    return {"version": 2, "reason": "try", "gate": {"dataset": dataset, "metric": "open/strict"} | gate}


def test_better_candidate_moves_the_alias_with_the_decision_kept(
    two: TestClient, database: Database, settings: Settings, unseen: str, stand_in: Callable[..., None]
) -> None:
    answer = two.put(PATH, json=body(unseen))
    assert answer.status_code == 202
    gate = answer.json()
    assert (gate["decision"], gate["champion"], gate["candidate"]) == ("pending", 1, 2)
    assert answer.headers["location"] == f"/jobs/{gate['job_id']}"
    assert two.put(PATH, json=body(unseen)).json()["job_id"] == gate["job_id"], "asked again: the one under way"
    assert two.get("/adapters/brain").json()["aliases"][0]["version"] == 1, "nothing moves before it is decided"
    stand_in(metrics=gain("gain_over_before", 0.01) | gain("gain", -1))
    run_job(database, settings, gate["job_id"], lambda: False)
    given = two.get(f"/jobs/{gate['job_id']}/report", headers={"Accept": "application/json"}).json()
    digests = [two.get(f"/adapters/brain/versions/{n}").json()["digest"] for n in (2, 1)]
    folders = [str(adapters.folder(settings.data_dir.resolve(), digest)) for digest in digests]
    assert [given["adapter"], given["before"]] == folders
    (kept,) = two.get(f"{PATH}/gates").json()["data"]
    assert (kept["decision"], kept["job_status"]) == ("moved", "succeeded")
    assert kept["interval"] == pytest.approx({"mean": 0.11, "low": 0.01, "high": 0.21, "n": 40})
    assert (
        kept["finding"]
        == "open/strict +0.1100 [+0.0100, +0.2100] over 40 questions; the rule asks for an interval above 0"
    )
    last = two.get(f"{PATH}/history").json()["data"][-1]
    assert (last["from_version"], last["to_version"], last["reason"]) == (1, 2, "try")
    assert (last["gate_job_id"], last["actor"]) == (gate["job_id"], "local")
    told = two.get("/audit", params={"subject": "brain@champion"}).json()["data"]
    assert [e["action"] for e in told] == ["alias.move", "gate.ask", "gate.decide", "alias.move"]
    assert told[2]["data"]["interval"]["low"] == 0.01
    (measured,) = two.get("/adapters/brain/versions/2/evaluations").json()["data"]
    assert measured["before_version"] == 1
    assert two.post(f"{PATH}/rollback").json()["version"] == 1


@pytest.mark.parametrize(
    ("metrics", "gate", "why"),
    [
        (gain("gain_over_before", -0.01) | gain("gain", 0.5), {}, "asks for an interval above 0"),
        (gain("gain_over_before", 0.01, n=10), {}, "asks for 30 questions at least"),
        ({"adapter/open/strict": 1.0}, {}, "no question that open/strict scores"),
        (gain("gain_over_before", -0.06), {"rule": "not_worse", "tolerance": 0.05}, "above -0.0500"),
    ],
)
def test_candidate_that_the_rule_does_not_let_pass_is_refused(
    two: TestClient,
    database: Database,
    settings: Settings,
    unseen: str,
    stand_in: Callable[..., None],
    metrics: dict[str, float],
    gate: dict[str, Any],
    why: str,
) -> None:
    job_id = two.put(PATH, json=body(unseen, **gate)).json()["job_id"]
    stand_in(metrics=metrics)
    run_job(database, settings, job_id, lambda: False)
    (kept,) = two.get(f"{PATH}/gates").json()["data"]
    assert kept["decision"] == "refused"
    assert why in kept["finding"]
    assert two.get("/adapters/brain").json()["aliases"][0]["version"] == 1
    assert len(two.get(f"{PATH}/history").json()["data"]) == 1


def test_alias_that_was_moved_meanwhile_is_left_alone(
    two: TestClient,
    database: Database,
    settings: Settings,
    unseen: str,
    publish: Callable[..., str],
    stand_in: Callable[..., None],
) -> None:
    """Two gates at once: the first to end moves the alias, the second was compared with a version that stands no more."""
    publish(7)
    first = two.put(PATH, json=body(unseen)).json()["job_id"]
    second = two.put(PATH, json=body(unseen) | {"version": 3}).json()["job_id"]
    stand_in(metrics=gain("gain_over_before", 0.01))
    for job_id in (first, second):
        run_job(database, settings, job_id, lambda: False)
    assert [g["decision"] for g in two.get(f"{PATH}/gates").json()["data"]] == ["moved", "overtaken"]
    assert two.get("/adapters/brain").json()["aliases"][0]["version"] == 2


def test_alias_that_points_nowhere_is_decided_against_the_base(
    client: TestClient,
    database: Database,
    settings: Settings,
    unseen: str,
    publish: Callable[..., str],
    stand_in: Callable[..., None],
) -> None:
    publish()
    gate = client.put(PATH, json=body(unseen) | {"version": 1}).json()
    assert gate["champion"] is None
    stand_in(metrics=gain("gain", 0.01) | gain("gain_over_before", -1))
    run_job(database, settings, gate["job_id"], lambda: False)
    assert client.get(f"{PATH}/gates").json()["data"][0]["decision"] == "moved"
    assert client.get("/adapters/brain").json()["aliases"][0]["version"] == 1


def test_gate_whose_job_fails_decides_nothing(
    two: TestClient, database: Database, settings: Settings, unseen: str, stand_in: Callable[..., None]
) -> None:
    job_id = two.put(PATH, json=body(unseen)).json()["job_id"]
    stand_in(exit=2)
    run_job(database, settings, job_id, lambda: False)
    (kept,) = two.get(f"{PATH}/gates").json()["data"]
    assert (kept["decision"], kept["job_status"]) == ("pending", "failed")
    two.post(f"/jobs/{job_id}/retry")
    stand_in(metrics=gain("gain_over_before", 0.01))
    run_job(database, settings, job_id, lambda: False)
    assert two.get(f"{PATH}/gates").json()["data"][0]["decision"] == "moved"


def test_gates_that_make_no_sense_are_refused(
    two: TestClient, unseen: str, dataset: Any, publish: Callable[..., str]
) -> None:
    publish(6)  # version 3 has version 2's weights
    for request, status, code in (
        (body(unseen) | {"version": 9}, 404, "version_not_found"),
        (body("ds_none"), 404, "dataset_not_found"),
        (body(dataset.id), 422, "leak"),
        (body(unseen, metric="open/best"), 422, "invalid_request"),
        (body(unseen, rule="worse"), 422, "invalid_request"),
        (body(unseen, tolerance=-1.0), 422, "invalid_request"),
        (body(unseen, min_questions=0), 422, "invalid_request"),
        (body(unseen, evaluation={"n_bootstrap": 0}), 422, "invalid_config"),
    ):
        answer = two.put(PATH, json=request)
        assert (answer.status_code, answer.json()["code"]) == (status, code), request
    there = two.put(PATH, json=body(unseen) | {"version": 1})
    assert (there.status_code, there.json()["version"]) == (200, 1)
    two.put(PATH, json={"version": 2})
    same = two.put(PATH, json=body(unseen) | {"version": 3})
    assert (same.status_code, same.json()["code"]) == (409, "gate_same_weights")
    assert two.get(f"{PATH}/gates").json()["data"] == []


def test_data_that_only_the_champion_learnt_from_decide_nothing(
    two: TestClient, unseen: str, publish: Callable[..., str]
) -> None:
    publish(8, dataset_id=unseen)
    two.put(PATH, json={"version": 3})
    assert two.put(PATH, json=body(unseen)).json()["code"] == "leak"


def test_gates_asked_for_at_once_are_one(two: TestClient, unseen: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        jobs = set(pool.map(lambda _: two.put(PATH, json=body(unseen)).json()["job_id"], range(4)))
    assert len(jobs) == 1
