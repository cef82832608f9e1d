"""The estimate of a run that has not begun: `hscr plan` as a child process, one at a time, so that API and worker load no torch for it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hscr.artifacts import write_json
from service.errors import Problem
from service.lifeline import PARENT_VARIABLE
from service.settings import Settings

_turn = threading.Lock()  # two at once would time each other
TICK_S = 0.1


class Stopped(Exception):
    """Nobody waits for the estimate any more; its process is gone."""


def estimate(
    settings: Settings,
    data: Path,
    evaluation: Path | None,
    config: dict[str, Any],
    *,
    evaluates: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The plan of `align` on a data set's folder and the evaluation's, as hscr/plan.py writes it; with `evaluates` that of `evaluate`.

    `stopped` is asked all the while. Raises Problem, Stopped.
    """
    if not _turn.acquire(timeout=settings.plan_max_s):
        raise Problem("plan_unavailable", "Other estimates are being made. Try again.", headers={"Retry-After": "10"})
    try:
        with tempfile.TemporaryDirectory(prefix="hscr-plan-") as scratch:
            file = Path(scratch) / "config.json"
            write_json(file, config)
            command = _command(settings, data, evaluation, file)
            return _child(settings, [*command, "--evaluate"] if evaluates else command, stopped)
    finally:
        _turn.release()


def _command(settings: Settings, data: Path, evaluation: Path | None, config: Path) -> list[str]:
    command = [*settings.plan_command, str(data.resolve()), *settings.model_options, "--json"]
    command += ["--config", str(config)]
    return [*command, *(["--eval", str(evaluation.resolve())] if evaluation else [])]


def _child(settings: Settings, command: list[str], stopped: Callable[[], bool]) -> dict[str, Any]:
    names = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "HF_HOME", "CUDA_VISIBLE_DEVICES")  # no key
    environment = {k: os.environ[k] for k in names if k in os.environ} | {PARENT_VARIABLE: str(os.getpid())}
    environment |= {"OMP_NUM_THREADS": str(settings.run_threads), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # may name paths
        env=environment,
    ) as child:
        try:
            said = _said(child, settings.plan_max_s, stopped)
        finally:
            child.kill()  # it holds memory of the device
    if child.returncode != 0:
        raise Problem("plan_unavailable", "The model or the device cannot be looked at here; the job itself may run.")
    plan: dict[str, Any] = json.loads(said.splitlines()[-1])
    return plan


def _said(child: subprocess.Popen[bytes], within_s: float, stopped: Callable[[], bool]) -> bytes:
    until = time.monotonic() + within_s
    while True:
        try:
            return child.communicate(timeout=TICK_S)[0]
        except subprocess.TimeoutExpired:
            if stopped():
                raise Stopped from None
            if time.monotonic() > until:
                detail = "Estimating takes too long (HSCR_PLAN_MAX_S). The job itself may still be started."
                raise Problem("plan_unavailable", detail) from None
