"""docker-compose.yml: valid by the Compose specification, complete, and its very commands start here (no Docker engine is needed)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from compose_pydantic import ComposeSpecification

from service.settings import Settings, variables, without_secrets
from service.up import _free_port
from service.upstream.server import check_settings as check_upstream
from tests.conftest import wait_for

ROOT = Path(__file__).parents[2]
OURS = ("migrate", "api", "worker", "sweep")
FIXED = {
    "HSCR_HOST",
    "HSCR_PORT",
    "HSCR_DATA_DIR",
    "DATABASE_URL",
    "REDIS_URL",
}  # where things are inside of the containers


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docker-compose.yml").read_text()


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)["services"]


def test_file_is_valid_by_the_specification(text: str) -> None:
    document = yaml.safe_load(text)
    plain = {key: value for key, value in document.items() if not key.startswith("x-")}
    for name in OURS:  # the model of the specification knows the form before Compose 2.24 only
        plain["services"][name]["env_file"] = [file["path"] for file in plain["services"][name]["env_file"]]
    ComposeSpecification.model_validate(plain)


def test_every_service_is_pinned_healthy_and_guarded(text: str, services: dict[str, Any]) -> None:
    assert set(services) == {"api", "worker", "sweep", "migrate", "postgres", "valkey"}
    for name, service in services.items():
        assert re.search(r":\d+\.\d+(\.\d+)?$", service["image"]), name
        assert ("healthcheck" in service) == (name != "migrate"), name
    assert "${HSCR_API_KEY:?" in text
    assert "$(openssl" not in text.replace('echo "HSCR_API_KEY=$(openssl rand -hex 32)" >> .env', ""), (
        "a key that nobody sees"
    )
    for name in ("api", "worker"):
        devices = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["capabilities"] == ["gpu"]
    assert [name for name, service in services.items() if "ports" in service] == ["api"]
    assert "outside" in services["sweep"]["networks"], "the sweep sends webhooks"
    assert services["api"]["ports"][0].startswith("${HSCR_BIND:-127.0.0.1}")


def containers_environment(service: dict[str, Any], dotenv: dict[str, str], shell: dict[str, str]) -> dict[str, str]:
    """A container's variables by Compose's rules: `environment` over `env_file`, in it the shell over .env; unset without any value."""
    known = dotenv | shell
    result = dict(dotenv) if {"path": ".env", "required": False} in service.get("env_file", []) else {}
    for name, value in service["environment"].items():
        if value is None:
            result |= {name: known[name]} if name in known else {}
        else:
            result[name] = re.sub(
                r"\$\{(\w+)(?::([-?])([^}]*))?\}", lambda m: known.get(m[1]) or (m[3] if m[2] == "-" else ""), value
            )
    return result


@pytest.mark.parametrize("name", OURS)
def test_every_setting_of_the_env_file_reaches_the_container(name: str, services: dict[str, Any]) -> None:
    given = {variable: f"given-{field}" for field, variable in variables().items()}
    reached = containers_environment(services[name], given, {})
    assert {variable for variable in given if reached[variable] != given[variable]} == FIXED


@pytest.mark.parametrize("name", OURS)
def test_what_nobody_sets_is_the_default(name: str, services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable in place of none would be refused as a number or a key."""
    for variable in variables().values():
        monkeypatch.delenv(variable, raising=False)
    for variable, value in containers_environment(services[name], {}, {"HSCR_API_KEY": "key"}).items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    changed = {field for field, info in Settings.model_fields.items() if getattr(settings, field) != info.get_default()}
    assert changed == {"host", "data_dir", "database_url", "redis_url", "api_key", "log"}


def test_another_model_server_can_be_named(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shell as in .env."""
    shell = {"HSCR_API_KEY": "key", "HSCR_ENGINE": "openai", "HSCR_UPSTREAM_URL": "http://vllm:8100", "HSCR_MODEL": "m"}
    for variable, value in containers_environment(services["api"], {}, shell).items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    check_upstream(settings)
    assert (settings.engine, settings.upstream_url) == ("openai", "http://vllm:8100")


def test_no_secret_of_the_env_file_reaches_a_run(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever .env holds is in the worker's environment; a run is its child."""
    secret = [v for f, v in variables().items() if "SecretStr" in str(Settings.model_fields[f].annotation)]
    text = (ROOT / "docker-compose.yml").read_text()
    secret += [name for name in re.findall(r"\$\{(\w+)", text) if name.endswith(("KEY", "PASSWORD"))]
    assert {"HSCR_API_KEY", "HSCR_UPSTREAM_KEY", "HSCR_DB_PASSWORD"} <= set(secret)
    for variable, value in containers_environment(services["worker"], dict.fromkeys(secret, "canary"), {}).items():
        monkeypatch.setenv(variable, value)
    assert [name for name, value in without_secrets().items() if "canary" in value] == []


def test_the_image_has_the_extras_that_its_settings_and_files_need() -> None:
    text = (ROOT / "Dockerfile").read_text()
    default = re.search(r"^ARG HSCR_EXTRAS=(\S+)$", text, re.M)
    assert default
    assert '-e ".[$HSCR_EXTRAS]"' in text
    installed = set(default[1].split(","))
    named = re.findall(r"HSCR_EXTRAS=(\S+?)`?(?:\s|$)", text)
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert {extra for names in named for extra in names.split(",")} <= known
    # All but those that a run names itself, tests, and the demonstration's data: s3 for ARTIFACTS_URL, trace for OTEL_….
    assert known - installed == {"dev", "demo", "quantized", "smolvlm"}


def test_dockerfile_copies_what_the_commands_need() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for part in ("hscr", "service", "worker", "migrations", "alembic.ini"):
        assert re.search(rf"^COPY .*\b{re.escape(part)}\b", text, re.M), part
    assert re.search(r"^FROM python:3\.11\.\d+-slim", text, re.M)
    assert re.search(r"^USER hscr$", text, re.M)


@pytest.mark.thorough
def test_its_commands_run(services: dict[str, Any], postgres: Any, valkey: str, tmp_path: Path) -> None:
    """migrate, api, worker, sweep with the file's commands and environment, on real servers; then SIGTERM ends each with 0."""
    port = _free_port()
    shell = {"HSCR_API_KEY": "key", "HSCR_ENGINE": "none"}
    environment = containers_environment(services["api"], {}, shell)
    environment |= {
        "DATABASE_URL": postgres(),
        "REDIS_URL": valkey,
        "HSCR_DATA_DIR": str(tmp_path),
        "HSCR_PORT": str(port),
    }
    environment |= {
        "TMPDIR": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }

    def command(name: str, what: list[str] | None = None) -> list[str]:
        words = what or services[name]["command"]
        found = shutil.which(words[0], path=environment["PATH"])
        assert found, words[0]
        return [found, *words[1:]]

    assert subprocess.run(command("migrate"), cwd=ROOT, env=environment, timeout=60, check=False).returncode == 0
    running = {
        name: subprocess.Popen(
            command(name), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for name in ("api", "worker", "sweep")
    }
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:

            def ready() -> bool:
                try:
                    return http.get("/readyz").status_code == 200
                except httpx.HTTPError:
                    return False

            wait_for(ready, 30)
            assert http.get("/jobs").status_code == 401
            assert http.get("/metrics").status_code == 401
            assert http.get("/jobs", headers={"Authorization": "Bearer key"}).status_code == 200
        for name in ("api", "worker", "sweep"):
            check = [w.replace(":8000", f":{port}") for w in services[name]["healthcheck"]["test"][1:]]
            assert (
                subprocess.run(command(name, check), cwd=ROOT, env=environment, timeout=30, check=False).returncode == 0
            ), name
        wait_for(lambda: _has_child(running["worker"].pid), 20, "the worker's pool is up")
        for name, process in running.items():
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, name
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _has_child(pid: int) -> bool:
    import psutil

    return bool(psutil.Process(pid).children())
