"""Random requests and random faults against real processes (a Hypothesis state machine), then the invariants.

Short here, long by `make chaos N=1000`. Jobs run the stand-in. Not here: faults of the database, of the disk and of the network.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from hypothesis import HealthCheck, Phase, strategies
from hypothesis import settings as chaos_settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from service import jobs, retention
from service.db import Database
from service.settings import Settings
from tests.chaos.invariants import check, orphans
from tests.chaos.rig import PARTS, WORKERS, Rig
from tests.conftest import wait_for

STEPS, ROUND = int(os.environ.get("HSCR_CHAOS_STEPS", "48")), 12
pick = strategies.integers(0, 10**6)
soon = strategies.sampled_from([0.0, 0.3, 0.6, 1.0])


class Chaos(RuleBasedStateMachine):
    """One service under fire. A request that was not answered is sent again with its key, as a careful client would."""

    rig: ClassVar[Rig]
    dataset: ClassVar[str]
    accepted: ClassVar[dict[str, str]]

    @rule(wait=soon, times=strategies.integers(1, 3))
    def submit(self, wait: float, times: int) -> None:
        key = f"k{len(self.accepted)}"
        for _ in range(times):
            self.submit_one(key)
        time.sleep(wait)

    def submit_one(self, key: str) -> None:
        answer = ask("POST", "/align", {"dataset": self.dataset, "adapter": "brain"}, {"Idempotency-Key": key})
        assert answer.status_code == 202, answer.text
        assert self.accepted.setdefault(key, answer.json()["id"]) == answer.json()["id"]

    @rule(which=pick, verb=strategies.sampled_from(["cancel", "pause", "pause", "resume", "retry"]), wait=soon)
    def wish(self, which: int, verb: str, wait: float) -> None:
        if self.accepted:
            job_id = list(self.accepted.values())[which % len(self.accepted)]
            assert ask("POST", f"/jobs/{job_id}/{verb}").status_code in (202, 409)
            time.sleep(wait)

    @rule(part=strategies.sampled_from(PARTS), wait=soon)
    def kill(self, part: str, wait: float) -> None:
        self._work(wait)
        self.rig.kill(part)

    @rule(generation=strategies.sampled_from([1, 2]), wait=soon)
    def kill_below_the_worker(self, generation: int, wait: float) -> None:
        self._work(wait)
        self.rig.kill_below(generation)

    @rule(part=strategies.sampled_from((*PARTS, *WORKERS)), seconds=strategies.sampled_from([0.2, 1.0, 3.0]), wait=soon)
    def freeze(self, part: str, seconds: float, wait: float) -> None:
        """The longest is twice a lease: another worker has the job by then, and the frozen one does not know it."""
        self._work(wait)
        self.rig.freeze(part, seconds)

    def _work(self, wait: float) -> None:
        """A fault finds something under way: at least a job that was just asked for."""
        self.submit_one(f"k{len(self.accepted)}")
        time.sleep(wait)

    @rule(wait=soon)
    def flush(self, wait: float) -> None:
        self._work(wait)
        self.rig.flush()


def ask(method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> httpx.Response:
    """The answer, whatever the API had to go through for it."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            answer = Chaos.rig.http.request(method, path, json=body, headers=headers)
            if answer.status_code < 500 and answer.json().get("code") != "idempotency_in_flight":
                return answer
        time.sleep(0.1)
    raise AssertionError("the API did not come back")


def peace(accepted: dict[str, str]) -> None:
    """Paused jobs go on, and all jobs end."""
    for job_id in accepted.values():
        ask("POST", f"/jobs/{job_id}/resume")

    def over() -> bool:
        return all(ask("GET", f"/jobs/{i}").json()["status"] in jobs.ENDED for i in accepted.values())

    wait_for(over, 30 + 5 * len(accepted), "all jobs end")


def test_nothing_is_lost_whatever_dies(
    database: Database, settings_: Settings, dataset: Any, stand_in: Callable[..., None], tmp_path: Path
) -> None:
    stand_in(steps=12, step_s=0.05)
    Chaos.rig, Chaos.dataset, Chaos.accepted = Rig(settings_, tmp_path / "processes.log"), dataset.id, {}
    try:
        Chaos.rig.wait_ready()
        run_state_machine_as_test(
            Chaos,
            settings=chaos_settings(
                max_examples=1 + STEPS // ROUND,  # the first is always the simplest one: one rule again and again
                stateful_step_count=ROUND,
                deadline=None,
                phases=[Phase.generate],  # a fault's timing cannot be replayed, so nothing can be shrunk
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        peace(Chaos.accepted)
        wait_for(lambda: not orphans(settings_.data_dir), 10, "no run is left")
        retention.collect(database, settings_.data_dir)  # what a killed publisher left, as the sweep would
        check(database, settings_.data_dir, Chaos.accepted)
        print(f"{len(Chaos.accepted)} jobs; faults by stage: {sorted(Chaos.rig.faults.items())}")
        assert Chaos.accepted
    finally:
        Chaos.rig.close()


@pytest.fixture
def settings_(settings: Settings) -> Settings:
    """By another name than Hypothesis's settings."""
    return settings
