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
        ("service.app service.serve service.up service.engine service.batcher service.upstream.engine", HEAVY),
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


@pytest.mark.thorough
def test_api_before_another_server_answers_without_torch(tmp_path: Path) -> None:
    """A question with grounding goes all the way, in a process of its own."""
    code = (
        "import base64, io, sys; from pathlib import Path; import httpx; from PIL import Image;"
        "from service.app import create_app; from service.db import upgrade; from tests.conftest import wait_for;"
        "from tests.service.model_server import Server; from tests.service.serving import served;"
        "from service.settings import Settings; out = io.BytesIO(); Image.new('RGB', (28, 28), 'red').save(out, 'PNG');"
        "a = served(Server(key='k').app()); up = a.__enter__();"
        f"s = Settings(data_dir=Path({str(tmp_path)!r}), engine='openai', model='tiny/model', upstream_url=up, upstream_key='k');"
        "upgrade(s.database); b = served(create_app(s)); url = b.__enter__();"
        "wait_for(lambda: httpx.get(url + '/readyz').status_code == 200);"
        "body = {'image': {'base64': base64.b64encode(out.getvalue()).decode()}, 'question': 'Where?', 'grounding': 'tokens'};"
        "answer = httpx.post(url + '/vqa', json=body, timeout=20).json(); assert answer['grounding']['score'] > 0.5, answer;"
        f"print(sorted({HEAVY!r} & set(sys.modules))); b.__exit__(None, None, None); a.__exit__(None, None, None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
