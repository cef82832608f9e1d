"""Names that are paths, bytes or floods, on every route with a name, on both databases: a refusal, never a file, a 5xx or a stored row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.conftest import dataset_zip, record, zip_of
from tests.service.test_edge import every_route

pytestmark = pytest.mark.either_database

NAMES = {
    "parent": "../../etc/passwd",
    "parent encoded": "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "parent encoded twice": "%252e%252e%252fetc",
    "backslashes": "..\\..\\windows",
    "absolute": "/etc/passwd",
    "NUL": "a%00b",
    "right to left": "a%E2%80%AEgnp.b",
    "zero width": "a%E2%80%8Bb",
    "a line break": "a%0d%0aX-Evil: 1",
    "no UTF-8": "a%ff%fe",
    "half a surrogate": "a%ed%a0%80",
    "10,000 characters": "a" * 10_000,
    "10,000 dots": "." * 10_000,
    "a template": "{{7*7}}${7*7}<script>",
    "SQL": "x' OR '1'='1",
    "only spaces": "%20%20",
}


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def told_nothing(answer: Any, settings: Settings) -> None:
    assert answer.status_code in (400, 404, 405, 413, 415, 422), answer.text
    if "error" in answer.json():  # OpenAI's shape, below /v1
        assert answer.headers["content-type"] == "application/json"
    else:
        assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.text) < 2000
    for word in ("root:", str(settings.data_dir), "Traceback", " object at 0x", "psycopg", "sqlite", "7*7", "49"):
        assert word not in answer.text.replace(answer.headers["x-request-id"], ""), answer.text


NO_TEXT = ("NUL", "half a surrogate")
IN_DATABASES = ("NUL", "no UTF-8", "half a surrogate", "right to left", "10,000 characters", "SQL")


def test_no_route_takes_such_a_name(client: TestClient, settings: Settings) -> None:
    """Every place of a name in every route meets what no database stores, and four of the kinds."""
    kinds = list(NAMES) if settings.database.startswith("sqlite") else list(IN_DATABASES)
    routes = [r for r in every_route(client.app.routes) if r[0] != "HEAD" and "/docs" not in r[1]]  # type: ignore[attr-defined]
    parts = ("name", "alias", "dataset_id", "job_id", "key_id", "delivery_id", "1")
    places = [(m, path, f"/{part}") for m, path in sorted(set(routes)) for part in parts if f"/{part}" in f"{path}/"]
    for n, (method, path, place) in enumerate(places):
        for kind in {*(kinds[(n + 4 * k) % len(kinds)] for k in range(4)), *NO_TEXT}:
            sent: dict[str, Any] = {"json": {}} if method in ("POST", "PUT", "PATCH") else {}
            told_nothing(client.request(method, path.replace(place, f"/{NAMES[kind]}", 1), **sent), settings)
    assert len(places) > 40


def test_no_query_of_any_route_takes_what_no_database_stores(client: TestClient) -> None:
    """Every query parameter that the document names, one at a time, behind a place that is no name and one that is a plain one."""
    asked = 0
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            names = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
            plain = re.sub(r"\{(number|version|n)\}", "1", path).replace("{", "").replace("}", "")
            sent: dict[str, Any] = {"json": {}} if method in ("post", "put", "patch") else {}
            for name, kind in ((n, k) for n in names for k in NO_TEXT):
                answer = client.request(method, f"{plain}?{name}={NAMES[kind]}", **sent)
                assert answer.status_code in (200, 400, 404, 409, 415, 422), (method, path, name, kind, answer.text)
                asked += 1
    assert asked > 60


QUERIES = {
    "/jobs": ["after", "status"],
    "/datasets": ["after"],
    "/adapters": ["after"],
    "/audit": ["subject", "actor", "after"],
    "/lineage": ["digest"],
    "/jobs/x/metrics": ["name", "stage"],
    "/adapters/x/versions": ["tag", "after"],
}


@pytest.mark.parametrize("kind", IN_DATABASES)
def test_no_query_takes_what_breaks_a_database(client: TestClient, kind: str) -> None:
    for path, query in ((p, q) for p, queries in QUERIES.items() for q in queries):
        answer = client.get(f"{path}?{query}={NAMES[kind]}")
        assert answer.status_code in (200, 404, 422), (path, answer.text)


TEXTS = ["a\x00b", "a\ud800b", "\udfff", "a" * 40_000, "‮gnp", "../../x"]
FIELDS = {
    "/align": ["dataset", "adapter", "model", "parent", "webhook"],
    "/evaluate": ["dataset", "adapter", "webhook"],
    "/keys": ["name"],
}


def test_no_field_takes_what_breaks_a_database(client: TestClient, settings: Settings) -> None:
    for text in TEXTS:
        tried(client, settings, text)


def tried(client: TestClient, settings: Settings, text: str) -> None:
    good = {"dataset": "ds_x", "adapter": "brain", "name": "k", "scopes": ["vqa"]}
    for path, fields in FIELDS.items():
        allowed = {"/align": {"dataset", "adapter"}, "/evaluate": {"dataset", "adapter"}, "/keys": {"name", "scopes"}}[
            path
        ]
        base = {k: v for k, v in good.items() if k in allowed}
        for field in fields:
            answer = client.post(
                path, content=json.dumps(base | {field: text}), headers={"Content-Type": "application/json"}
            )
            if path == "/keys" and answer.status_code == 201:
                assert text in ("‮gnp", "../../x"), "a key's name is words for people"
                assert client.delete(f"/keys/{answer.json()['id']}").status_code in (204, 401)
                continue
            if answer.status_code != 401:
                told_nothing(answer, settings)
    for bad in (
        {"metadata": {text: "x"}},
        {"metadata": {"x": text}},
        {"preference": {text: 1}},
        {"optimization": {"lr": text}},
        {"evaluation": {"dataset": text}},
        {"preset": text},
        {"preference": {"similarity": text}},
    ):
        answer = client.post(
            "/align",
            content=json.dumps({"dataset": "ds_x", "adapter": "brain"} | bad),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code in (400, 401, 404, 422), (bad, answer.text)


def test_file_names_of_uploads_are_never_used(client: TestClient, settings: Settings) -> None:
    for name in ("../../evil.zip", "/etc/passwd", "a\x00b.zip", "‮gnp.zip", "a" * 10_000, "{{7*7}}"):
        answer = client.post("/datasets", files={"file": (name, dataset_zip(1))})
        refused = (400,) if "\0" in name or len(name) > 5000 else ()
        assert answer.status_code in (200, 201, *refused), answer.text
        assert name not in answer.text
    names = {p.name for p in settings.data_dir.rglob("*")}
    assert not any("evil" in n or "gnp" in n or "7*7" in n or len(n) > 100 for n in names)


OUTSIDE = ["../../etc/passwd", "images/../../x.png", "/etc/passwd", "C:\\x.png", "a\x00.png", "‮gnp.png", "a" * 5000]


def test_a_record_names_no_file_outside(client: TestClient, settings: Settings) -> None:
    rows = "".join(json.dumps(record(n, image=image)) + "\n" for n, image in enumerate(OUTSIDE)).encode()
    outside = settings.data_dir / "x.png"
    outside.parent.mkdir(exist_ok=True)
    outside.write_bytes(b"x")
    answer = client.post("/datasets", files={"file": ("x.zip", zip_of({"records.jsonl": rows, "images/0.png": b"x"}))})
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_empty")
    assert not [p for p in Path(settings.data_dir / "datasets").rglob("*") if p.is_file()]


def test_documentation_assets_stay_in_their_folder(client: TestClient) -> None:
    for path in (
        "../__init__.py",
        "..%2f__init__.py",
        "%2e%2e/__init__.py",
        "..%5c__init__.py",
        "/etc/passwd",
        quote("\0"),
    ):
        answer = client.get(f"/docs/assets/{path}")
        assert answer.status_code in (404, 405), path
        assert "import" not in answer.text
