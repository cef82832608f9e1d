"""`hscr doctor`: what is wrong with an installation is said with what to do next, and ends it with 1."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service import doctor
from service.cli import app
from service.db import Database, upgrade
from service.doctor import EXTRAS, FAIL, NOTE, OK, Finding
from service.settings import Settings, demo_model, variables
from service.up import _free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in variables().values():
        monkeypatch.delenv(variable, raising=False)


def only(found: Any) -> Finding:
    (finding,) = [found] if isinstance(found, Finding) else list(found)
    return finding


def test_a_sound_installation_has_no_failure(tmp_path: Path, valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("REDIS_URL", valkey)
    upgrade(Settings().database)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    states = {line[6:22].strip(): line.split()[0] for line in result.output.splitlines()}
    needed = {"torch", "extra service", "settings", "device", "model", "data folder", "database", "broker"}
    assert {states[name] for name in needed} == {OK}


def test_a_failure_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_PORT", "eighty")
    monkeypatch.setenv("HSCR_UID_KEY", "too-short-secret"[:9])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAIL  settings         HSCR_PORT: " in result.output
    assert "HSCR_UID_KEY: " in result.output
    assert "too-short" not in result.output


def test_extras_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"dev"}


def test_what_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.4.0", "pydicom": None}.get(name, there(name)))
    told = {(f.state, f.name): f.told for f in doctor.packages()}
    assert "torch>=2.11 is needed, 2.4.0 is there" in told[FAIL, "packages"]
    assert "pydicom is missing; pip install -c constraints.txt 'hscr[medical]'" in told[NOTE, "extra medical"]


def test_without_the_service_only_packages_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert list(doctor.findings()) == list(doctor.packages())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"host": "0.0.0.0"}, "Set HSCR_API_KEY"),
        ({"engine": "openai"}, "needs HSCR_UPSTREAM_URL"),
        ({"webhook_hosts": ["https://a"]}, "HSCR_WEBHOOK_SECRET is not set"),
        ({"artifacts_url": "relative/path"}, "ARTIFACTS_URL: give a whole path"),
    ],
)
def test_what_the_service_would_refuse_to_start_with(given: dict[str, Any], told: str) -> None:
    finding = only(doctor.start(Settings(**given)))
    assert (finding.state, told in finding.told) == (FAIL, True)


def test_a_setting_that_cannot_be_read_is_told_with_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_WEBHOOK_PAUSES_S", "canary")
    told = [f.told for f in doctor.findings() if f.state == FAIL]
    assert "HSCR_WEBHOOK_PAUSES_S: is not JSON; docs/settings.md says what it takes" in told


def test_a_misspelt_variable_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_QUEU_MAX", "3")
    monkeypatch.setenv("HSCR_QUEUE_MAX", "5")
    found = list(doctor.variables_set())
    assert "HSCR_QUEUE_MAX" in found[0].told
    assert [f.state for f in found if f.told.startswith("HSCR_QUEU_MAX is no setting")] == [NOTE]


def test_a_device_that_is_not_here() -> None:
    assert only(doctor.device(Settings(device="cuda:77"))).state == FAIL


def test_models(tmp_path: Path) -> None:
    """Absent, of an unknown architecture, cut short, whole."""

    def told(name: str) -> tuple[str, str]:
        finding = only(doctor.model(Settings(model=name)))
        return finding.state, finding.told

    folder = tmp_path / "model"
    assert told(str(folder)) == (
        FAIL,
        f"HSCR_MODEL={folder} is no folder and not in Hugging Face's cache; copy it here (docs/install.md)",
    )
    folder.mkdir()
    assert "config.json cannot be read" in told(str(folder))[1]
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert "architecture 'bert' is not supported" in told(str(folder))[1]
    shutil.copytree(demo_model(), folder, dirs_exist_ok=True)
    assert told(str(folder)) == (OK, "model (llava)")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (folder / "processor_config.json").unlink()
    state, lacks = told(str(folder))
    assert state == FAIL
    assert "lacks preprocessor_config.json or processor_config.json, model-00002-of-00002.safetensors;" in lacks
    for broken in ('{"weight_map": {"a', "{}", "[]"):
        (folder / "model.safetensors.index.json").write_text(broken)
        assert "a whole model.safetensors.index.json;" in told(str(folder))[1]


def test_a_data_folder_without_room(tmp_path: Path) -> None:
    assert doctor.disk(Settings(data_dir=tmp_path)).state == OK
    finding = doctor.disk(Settings(data_dir=tmp_path / "later", disk_reserve_bytes=2**60))
    assert (finding.state, "no run starts below HSCR_DISK_RESERVE_BYTES" in finding.told) == (FAIL, True)
    assert not (tmp_path / "later").exists()


def test_databases(tmp_path: Path) -> None:
    """Not there yet, at an old schema, at one from the future, out of reach."""
    settings = Settings(data_dir=tmp_path)
    assert only(doctor.database(settings)).state == NOTE
    assert list(tmp_path.iterdir()) == [], "it changes nothing"
    upgrade(settings.database, "0003")
    finding = only(doctor.database(settings))
    assert (finding.state, "alembic upgrade head" in finding.told) == (FAIL, True)
    database = Database(settings.database)
    with database.write() as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    assert "a newer version made" in only(doctor.database(settings)).told
    away = f"postgresql://hscr:secret-word@127.0.0.1:{_free_port()}/hscr"
    finding = only(doctor.database(Settings(database_url=away)))
    assert (finding.state, "secret-word" in finding.told) == (FAIL, False)
    assert only(doctor.database(Settings(database_url="hospital"))).state == FAIL


def test_a_migrated_database_is_as_it_should_be(database_url: str) -> None:
    finding = only(doctor.database(Settings(database_url=database_url)))
    assert finding.state == OK, finding.told


def test_brokers() -> None:
    assert doctor.broker(Settings()).state == NOTE
    assert doctor.broker(Settings(redis_url=f"redis://127.0.0.1:{_free_port()}/0")).state == FAIL
