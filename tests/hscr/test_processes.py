"""Two processes make the adapter that one makes, within rounding; a run stopped half-way goes on; no follower outlives the first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.llava import Shape, save_data, save_llava
from hscr.cli import app

SHAPE = Shape(patches=4, layers=2, hidden=32, heads=2, tower_layers=2, tower_hidden=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save_llava(folder / "model", SHAPE)
    save_data(folder / "data", 9, 6, 3)
    return folder


def command(place: Path, out: str, processes: int, epochs: int = 3) -> list[str]:
    settings = {"epochs": epochs, "batch_size": 4, "lr": 1e-3, "checkpoint_every": 2, "anchor": 1.0}
    options = [x for name, value in settings.items() for x in ("-s", f"optimization.{name}={value}")]
    data, model = str(place / "data"), str(place / "model")
    start = [sys.executable, "-m", "hscr", "align", data, "-m", model, "-o", str(place / out), "--events", "json"]
    return [*start, "--processes", str(processes), *options]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HSCR_FEATURE_CACHE": "off"}


def adapter(place: Path, out: str) -> dict[str, torch.Tensor]:
    return load_file(place / out / "adapter" / "adapter_model.safetensors")


def align(place: Path, out: str, processes: int) -> dict[str, torch.Tensor]:
    done = subprocess.run(
        command(place, out, processes), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return adapter(place, out)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3)


@pytest.mark.thorough
def test_two_processes_make_the_adapter_of_one_and_a_stopped_run_goes_on(place: Path) -> None:
    """Nine records in batches of 4, 4 and 1: in an epoch's last step the second process has no record."""
    made = CliRunner().invoke(app, command(place, "one", 1)[3:])
    assert made.exit_code == 0, made.output
    one = adapter(place, "one")
    assert max(t.abs().max() for n, t in one.items() if "lora_B" in n) > 1e-4  # it did move
    with started(place, "stopped") as run:
        until_a_checkpoint(run)
        run.send_signal(signal.SIGTERM)
        assert run.stdout is not None
        rest = run.stdout.read()
        assert run.wait(60) == 75, rest
    assert_same(one, align(place, "stopped", 2))
    steps = [(place / out / "steps.jsonl").read_text().count("\n") for out in ("one", "stopped")]
    assert steps == [9, 9]


def started(place: Path, out: str, epochs: int = 3) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(place, out, 2, epochs), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def until_a_checkpoint(run: subprocess.Popen[str]) -> None:
    assert run.stdout is not None
    assert any('"checkpoint"' in line for line in run.stdout)


SICK = """
import os, sys, time
if os.environ.get("RANK") == "1":
    if os.environ["SICK"] == "early":
        os._exit(3)
    import hscr.optimize
    def fail(*_, **__):
        raise ValueError("record r7: its image cannot be read")
    hscr.optimize.answer_logprobs = fail
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("sick", "status", "code", "says"),
    [
        ("early", 1, "process_lost", "process 1 of this run ended with status 3"),  # tried again by a supervisor
        ("optimizing", 2, "bad_input", "record r7: its image cannot be read"),
    ],
)
def test_a_run_ends_with_the_error_of_a_follower_that_fails(
    place: Path, tmp_path: Path, sick: str, status: int, code: str, says: str
) -> None:
    """Before it has met the first one, which waits for it then, and in a step."""
    (tmp_path / "sitecustomize.py").write_text(SICK)
    root = str(Path(__file__).parent.parent.parent)
    environ = environment() | {"SICK": sick, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    with subprocess.Popen(command(place, f"sick-{sick}", 2), env=environ, stdout=subprocess.PIPE, text=True) as run:
        try:
            out, _ = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == status
    last = json.loads(out.splitlines()[-1])
    assert (last["type"], last["code"], last["message"]) == ("error", code, says)


@pytest.mark.thorough
def test_no_follower_is_left_where_the_first_is_killed(place: Path) -> None:
    with started(place, "killed", epochs=500) as run:
        until_a_checkpoint(run)
        children = psutil.Process(run.pid).children()
        assert len(children) == 1
        run.kill()
    assert not psutil.wait_procs(children, timeout=20)[1]
