"""The estimate of a run that is only asked about: `hscr plan` as a child process, one at a time, so that the API loads no torch for it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from hscr.artifacts import write_json
from service.errors import Problem
from service.lifeline import PARENT_VARIABLE
from service.settings import Settings

_turn = threading.Lock()  # two at once would time each other


def estimate(settings: Settings, data: Path, evaluation: Path | None, config: dict[str, Any]) -> dict[str, Any]:
    """The plan of `align` on a data set's folder and the evaluation's, as hscr/plan.py writes it. Raises Problem."""
    if not _turn.acquire(timeout=settings.plan_max_s):
        raise Problem("plan_unavailable", "Other estimates are being made. Try again.", headers={"Retry-After": "10"})
    try:
        with tempfile.TemporaryDirectory(prefix="hscr-plan-") as scratch:
            file = Path(scratch) / "config.json"
            write_json(file, config)
            return _child(settings, _command(settings, data, evaluation, file))
    finally:
        _turn.release()


def _command(settings: Settings, data: Path, evaluation: Path | None, config: Path) -> list[str]:
    command = [*settings.plan_command, str(data.resolve()), *settings.model_options, "--json"]
    command += ["--config", str(config)]
    return [*command, *(["--eval", str(evaluation.resolve())] if evaluation else [])]


def _child(settings: Settings, command: list[str]) -> dict[str, Any]:
    names = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "HF_HOME", "CUDA_VISIBLE_DEVICES")  # no key
    environment = {k: os.environ[k] for k in names if k in os.environ} | {PARENT_VARIABLE: str(os.getpid())}
    environment |= {"OMP_NUM_THREADS": str(settings.run_threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # may name paths
            env=environment,
            timeout=settings.plan_max_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        detail = "Estimating takes too long (HSCR_PLAN_MAX_S). The job itself may still be started."
        raise Problem("plan_unavailable", detail) from None
    if done.returncode != 0:
        raise Problem("plan_unavailable", "The model or the device cannot be looked at here; the job itself may run.")
    plan: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return plan
