"""What surrounds every route: keys, Host and Origin, problem documents, request ids, limits, health, metrics, /docs offline."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import SecretStr
from starlette.routing import Mount, Route

from service.app import create_app
from service.errors import TABLE
from service.settings import Settings

pytestmark = pytest.mark.either_database

KEY = "a-long-random-key"


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    """A service that others can reach."""
    reachable = settings.model_copy(update={"host": "0.0.0.0", "api_key": SecretStr(KEY)})
    with TestClient(create_app(reachable), base_url="http://service.example", raise_server_exceptions=False) as client:
        yield client


def every_route(routes: Any) -> Iterator[tuple[str, str]]:
    """(method, path) of all routes, those of included routers and mounts among them."""
    for route in routes:
        if isinstance(route, Mount):
            yield "GET", f"{route.path}/swagger-ui.css"
        elif isinstance(route, (APIRoute, Route)):
            path = route.path
            for name, value in {"{number}": "1", "{version}": "1"}.items():
                path = path.replace(name, value)
            yield from ((method, path.replace("{", "").replace("}", "")) for method in route.methods or ())
        else:
            yield from every_route(route.original_router.routes)


DOCUMENTATION = ("/docs", "/docs/assets/swagger-ui.css", "/openapi.json")


def test_every_route_but_the_health_checks_and_the_documentation_needs_the_key(guarded: TestClient) -> None:
    routes = sorted(set(every_route(guarded.app.routes)))  # type: ignore[attr-defined]
    assert len(routes) > 20
    for method, path in routes:
        bare = guarded.request(method, path)
        if path in ("/healthz", "/readyz", *DOCUMENTATION):
            assert bare.status_code == 200, path
            continue
        assert bare.status_code == 401, (method, path)
        assert bare.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xff"):
            assert guarded.request(method, path, headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
        right = guarded.request(method, path, headers={"Authorization": f"Bearer {KEY}"})
        assert right.status_code != 401, (method, path)


def test_unknown_routes_need_the_key_too(guarded: TestClient) -> None:
    assert guarded.get("/nope").status_code == 401
    assert guarded.get("/healthz/../jobs").status_code == 401
    assert guarded.get("/jobs", headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_service_that_others_can_reach_does_not_start_without_a_key(settings: Settings) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.5", "hospital.example"):
        settings.host = host
        with pytest.raises(ValueError, match="HSCR_API_KEY is not set"):
            create_app(settings)
    settings.api_key = SecretStr("  ")
    with pytest.raises(ValueError, match="HSCR_API_KEY is not set"):
        create_app(settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "localhost:1", "[::1]:8000"])
def test_loopback_names_are_served_without_a_key(client: TestClient, host: str) -> None:
    assert client.get("/jobs", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.1"])
def test_other_names_are_refused_without_a_key(client: TestClient, host: str) -> None:
    answer = client.get("/jobs", headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://"])
def test_foreign_pages_are_refused_without_a_key(client: TestClient, origin: str) -> None:
    answer = client.post("/align", json={}, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["code"]) == (403, "origin_not_allowed")


def test_connection_that_came_from_outside_is_refused_without_a_key(settings: Settings) -> None:
    """Somebody ran uvicorn on all addresses though the settings say loopback: the socket's own address tells."""
    with TestClient(create_app(settings), base_url="http://192.168.1.5") as client:
        answer = client.get("/jobs", headers={"Host": "127.0.0.1"})
        assert (answer.status_code, answer.json()["code"]) == (403, "key_required")


def test_metrics_are_open_on_loopback_only(client: TestClient, guarded: TestClient) -> None:
    assert 'hscr_jobs{status="queued"}' in client.get("/metrics").text
    assert guarded.get("/metrics").status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("DELETE", "/jobs", 405, "method_not_allowed"),
        ("GET", "/jobs/x", 404, "job_not_found"),
        ("GET", "/jobs/x/events", 404, "job_not_found"),
        ("GET", "/jobs/x/report", 404, "job_not_found"),
        ("GET", "/jobs?limit=0", 422, "invalid_request"),
        ("GET", "/jobs?after=%00", 422, "invalid_request"),
        ("GET", "/datasets/x", 404, "dataset_not_found"),
        ("GET", "/datasets/x/records/99999999999/image", 422, "invalid_request"),
        ("GET", "/adapters/x", 404, "adapter_not_found"),
        ("GET", "/adapters/x/versions/1", 404, "adapter_not_found"),
        ("GET", "/adapters/..%2fx", 404, "not_found"),
        ("GET", "/docs/assets/..%2f__init__.py", 404, "not_found"),
    ],
)
def test_errors_are_problem_documents(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path, headers={"X-Request-Id": "mine-1"})
    body = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (body["request_id"], answer.headers["x-request-id"]) == ("mine-1", "mine-1")
    assert body["title"] == TABLE[code][1]
    assert body["detail"]


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/datasets", "GET, POST"),  # two routes
        ("/jobs/x", "DELETE, GET"),
        ("/v1/files/x", "DELETE, GET"),
        ("/docs/assets/x", "GET, HEAD"),
        ("/healthz", "GET"),
    ],
)
def test_whoever_asks_with_another_method_is_told_all_that_are_allowed(
    client: TestClient, path: str, allow: str
) -> None:
    answer = client.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/nope", 404, "invalid_request_error"),
        ("DELETE", "/v1/models", 405, "invalid_request_error"),
        ("GET", "/v1/models/x", 404, "invalid_request_error"),
        ("POST", "/v1/chat/completions", 503, "server_error"),
    ],
)
def test_errors_under_v1_have_openais_shape(client: TestClient, method: str, path: str, status: int, kind: str) -> None:
    answer = client.request(method, path, headers={"X-Request-Id": "mine-1"})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert (answer.json()["error"]["type"], answer.headers["x-request-id"]) == (kind, "mine-1")


def test_refusals_before_the_routes_have_openais_shape_under_v1(guarded: TestClient, settings: Settings) -> None:
    bare = guarded.post("/v1/chat/completions")
    assert (bare.status_code, bare.json()["error"]["type"]) == (401, "authentication_error")
    assert bare.headers["www-authenticate"] == "Bearer"
    guarded.app.state.hscr.settings.body_max_bytes = 10  # type: ignore[attr-defined]
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    large = guarded.post("/v1/chat/completions", content=b"0" * 20, headers=headers)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    with TestClient(create_app(settings), base_url="http://evil.example") as client:
        foreign = client.get("/v1/models")
        assert (foreign.status_code, foreign.json()["error"]["type"]) == (403, "permission_error")


def test_every_response_has_a_request_id_and_bad_ones_are_replaced(client: TestClient) -> None:
    assert client.get("/healthz").headers["x-request-id"].startswith("req_")
    assert client.get("/healthz", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"].startswith("req_")


def test_unexpected_exception_is_a_problem_and_its_text_is_not_logged(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(settings)

    @app.get("/boom")
    def boom() -> None:
        raise RuntimeError("canary question")

    with (
        TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client,
        caplog.at_level(logging.INFO),
    ):
        answer = client.get("/boom?patient=canary")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "canary" not in answer.text
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("hscr")]
    assert any("RuntimeError" in line for line in ours)
    assert not any("canary" in line for line in ours)


def test_large_body_is_refused(settings: Settings) -> None:
    settings.body_max_bytes = 1000
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        for content in (b"0" * 2000, (b"0" * 100 for _ in range(20))):
            answer = client.post("/align", content=content, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
            assert answer.json()["detail"] == "At most 1000 bytes are read here (HSCR_BODY_MAX_BYTES)."


@pytest.mark.parametrize(
    "path",
    [
        "/jobs", "/datasets", "/keys", "/jobs/job_x/webhooks", "/datasets/ds_x/lineage", "/adapters/brain/versions/1/evaluations",
        "/adapters/brain/aliases/champion/gates", "/v1/fine_tuning/jobs", "/v1/files",
    ],
)  # fmt: skip
def test_a_cursor_that_no_page_gave_is_refused_with_its_field(client: TestClient, path: str) -> None:
    for odd in ("zzz", "0", "job_1", "ftjob-abc"):
        answer = client.get(path, params={"after": odd})
        assert answer.status_code == 422, odd
        body = answer.json()
        field = body["error"]["param"] if path.startswith("/v1") else body["errors"][0]["field"]
        assert field.removeprefix("query.") == "after"


def test_documentation_needs_no_internet(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "://" not in page.replace("http://127.0.0.1", "")
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert client.get(f"/docs/assets/{asset}").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/align", "/vqa", "/datasets", "/jobs/{job_id}/events", "/adapters/{name}/aliases/{alias}"} <= set(paths)
    assert set(paths["/vqa"]["post"]["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert paths["/align"]["post"]["requestBody"]["content"]["application/json"]["examples"]


def test_a_browser_gets_the_documentation_and_is_asked_for_a_key_there(guarded: TestClient, settings: Settings) -> None:
    document = guarded.get("/openapi.json").json()
    (name,) = document["components"]["securitySchemes"]
    scheme = document["components"]["securitySchemes"][name]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    asked = {
        path: {json.dumps(operation.get("security")) for operation in operations.values()}
        for path, operations in document["paths"].items()
    }
    free = [path for path, said in asked.items() if said == {"null"}]
    assert sorted(free) == ["/healthz", "/readyz"]
    assert all(said == {json.dumps([{name: []}])} for path, said in asked.items() if path not in free)
    assert guarded.get("/docs/other").status_code == 401
    closed = settings.model_copy(update={"host": "0.0.0.0", "api_key": SecretStr(KEY), "open_docs": False})
    with TestClient(create_app(closed), base_url="http://service.example", raise_server_exceptions=False) as client:
        for path in DOCUMENTATION:
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_no_reference_of_the_document_leads_nowhere(client: TestClient) -> None:
    """Else a reader sees nothing of that body, and schemathesis sends none."""

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            yield from value.get("discriminator", {}).get("mapping", {}).values()
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from references(item)

    document = client.get("/openapi.json").json()
    found = set(references(document))
    assert len(found) > 50
    assert found <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def test_not_ready_while_draining_or_without_a_database(settings: Settings) -> None:
    app = create_app(settings)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/readyz").status_code == 200
        app.state.hscr.draining.set()
        assert (client.get("/readyz").status_code, client.get("/healthz").status_code) == (503, 200)


def test_vqa_without_an_engine_says_so(client: TestClient) -> None:
    answer = client.post("/vqa", json={})
    assert (answer.status_code, answer.json()["code"]) == (503, "engine_unavailable")


def test_routes_are_found_behind_a_prefix_too(settings: Settings) -> None:
    """Of a reverse proxy that keeps it, or of an application that ours is mounted in."""
    app = create_app(settings)
    with TestClient(app, base_url="http://localhost", root_path="/hscr") as client:
        assert client.get("/hscr/healthz").status_code == client.get("/hscr/jobs").status_code == 200
