"""docker-compose.yml: valid by the Compose specification, complete, and its very commands start here (no Docker engine is needed)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from compose_pydantic import ComposeSpecification

from service.up import _free_port
from tests.conftest import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docker-compose.yml").read_text()


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)["services"]


def test_file_is_valid_by_the_specification(text: str) -> None:
    document = yaml.safe_load(text)
    plain = {key: value for key, value in document.items() if not key.startswith("x-")}
    ComposeSpecification.model_validate(plain)


def test_every_service_is_pinned_healthy_and_guarded(text: str, services: dict[str, Any]) -> None:
    assert set(services) == {"api", "worker", "sweep", "migrate", "postgres", "valkey"}
    for name, service in services.items():
        assert re.search(r":\d+\.\d+(\.\d+)?$", service["image"]), name
        assert ("healthcheck" in service) == (name != "migrate"), name
    assert "${HSCR_API_KEY:?" in text
    for name in ("api", "worker"):
        devices = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["capabilities"] == ["gpu"]
    assert [name for name, service in services.items() if "ports" in service] == ["api"]
    assert "outside" in services["sweep"]["networks"], "the sweep sends webhooks"
    assert services["api"]["ports"][0].startswith("${HSCR_BIND:-127.0.0.1}")


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
    given = {"HSCR_API_KEY": "key", "HSCR_ENGINE": "none"}
    environment = {
        k: re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda m: given.get(m[1]) or m[2] or "", v)
        for k, v in services["api"]["environment"].items()
    }
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
