"""Settings: a wrong variable is one line that names it, whichever process reads it, and its value is not repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app as cli
from service.settings import read_settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HSCR_ENGINE", "canary", "HSCR_ENGINE: input should be 'local', 'openai' or 'none'"),
        ("HSCR_BATCH_MAX", "canary", "HSCR_BATCH_MAX: input should be a valid integer"),
        ("HSCR_UID_KEY", "canary", "HSCR_UID_KEY: value should have at least 16 items"),
        ("HSCR_WEBHOOK_PAUSES_S", "canary", "HSCR_WEBHOOK_PAUSES_S: is not JSON"),
        ("HSCR_RUN_COMMAND", "[canary", "HSCR_RUN_COMMAND: is no JSON list"),
        ("HSCR_RUN_COMMAND", "'canary", "HSCR_RUN_COMMAND: no closing quotation"),
    ],
)
def test_a_wrong_variable_is_named_without_its_value(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name) as refused:
        read_settings()
    assert str(refused.value).startswith(said)
    assert "canary" not in str(refused.value)
    assert "\n" not in str(refused.value)
    done = CliRunner().invoke(cli, ["up"])
    assert str(done.exception) == str(refused.value)


def test_each_wrong_variable_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_ENGINE", "x")
    monkeypatch.setenv("HSCR_QUEUE_MAX", "0")
    with pytest.raises(ValueError, match="HSCR_ENGINE") as refused:
        read_settings()
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == ["HSCR_ENGINE", "HSCR_QUEUE_MAX"]


@pytest.mark.parametrize(
    "command",
    [
        "service.cli up",
        pytest.param("service.serve", marks=pytest.mark.thorough),
        pytest.param("worker.sweep", marks=pytest.mark.thorough),
        pytest.param("celery -A worker.tasks worker", marks=pytest.mark.thorough),
    ],
)
def test_every_process_ends_with_that_line_and_status_2(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_ENGINE", "x")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.removeprefix("error: ") == "HSCR_ENGINE: input should be 'local', 'openai' or 'none'\n"


def test_a_link_to_a_models_folder_keeps_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "llava-v1").mkdir()
    (tmp_path / "current").symlink_to("llava-v1")
    assert read_settings(model=str(tmp_path / "current")).model_id == "current"


@pytest.mark.parametrize(
    ("model", "said", "shown"),
    [
        ("/srv/m", "model '/srv/m': config in /srv/models/other/config.json", "model 'm': config in config.json"),
        ("/srv/m", "no '/srv/My Models/llava/config.json' here", "no 'config.json' here"),
        ("/srv/m", "file:///srv/x/y, error:/srv/x/z, https://hf.co/a/b", "y, error:z, https://hf.co/a/b"),
        (".", "no such folder. See docs/install.md", "no such folder. See docs/install.md"),
    ],
)
def test_what_is_told_of_a_model_names_no_folder(model: str, said: str, shown: str) -> None:
    assert read_settings(model=model).shown(said) == shown
