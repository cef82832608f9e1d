"""What may be loaded where: the worker and the API start without torch, the worker without a web framework."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft"}
WEB = {"fastapi", "starlette", "uvicorn"}


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("service.db service.models service.jobs service.adapters service.datasets service.queue", HEAVY | WEB),
        ("worker.tasks worker.supervise worker.sweep worker.health", HEAVY | WEB),
        ("service.app service.serve service.up service.engine service.batcher", HEAVY),
        ("service.import_child hscr.importing hscr.readers", HEAVY | WEB | {"sqlalchemy", "celery"}),
        ("service.cli", HEAVY | WEB | {"sqlalchemy", "celery"}),
    ],
)
def test_modules_load_without(modules: str, forbidden: set[str]) -> None:
    code = f"import sys; [__import__(m) for m in {modules.split()!r}]; print(sorted({forbidden!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_api_without_an_engine_serves_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from fastapi.testclient import TestClient; from service.app import create_app; from service.settings import Settings;"
        "from service.db import upgrade; from pathlib import Path;"
        f"s = Settings(data_dir=Path({str(tmp_path)!r}), engine='none'); upgrade(s.database);"
        "c = TestClient(create_app(s), base_url='http://127.0.0.1').__enter__(); assert c.get('/readyz').status_code == 200;"
        f"c.get('/openapi.json'); c.post('/vqa', json={{}}); print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
