"""schemathesis over the whole OpenAPI document: whatever is sent, no 5xx but a documented refusal, and answers of the documented shape.

It covers what the application's document says, so every new route at once. Half of the requests carry ids of things that are there, and
questions a picture that is one; what deletes them comes last.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from pydantic import SecretStr
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance

from service import jobs
from service.app import create_app
from service.db import Database, upgrade
from service.errors import TABLE
from service.models import Job
from service.settings import Settings
from tests.conftest import STAND_IN, dataset_zip, png, wait_for
from tests.service.test_vqa import Echo
from worker.supervise import run_job

EXAMPLES = 4  # an operation and mode; a longer look: raise it
KEY = "a-long-random-key"
# Refusals that say "not now" or "not here", by codes of service/errors.py; everything else from 500 on is a fault.
ALLOWED_5XX = {code for code, (status, _) in TABLE.items() if status == 503}
_PNG = base64.b64encode(png()).decode()
_SHOWN = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_PNG}"}},
    {"type": "text", "text": "Where?"},
]
PICTURES: dict[str, dict[str, Any]] = {
    "/vqa": {"image": {"base64": _PNG}, "images": [{"base64": _PNG}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": _SHOWN}], "model": "hscr-demo"},
}


class Target:
    """The application with one of everything in it, its document, and the ids."""

    def __init__(self, client: TestClient, ids: dict[str, Any]) -> None:
        self.client, self.ids = client, ids
        document = client.get("/openapi.json").json()
        for operation in (o for operations in document["paths"].values() for o in operations.values()):
            operation.pop("security", None)  # else it makes keys up, and most of what it asks ends at 401
        self.schema = schemathesis.openapi.from_dict(document)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    import json
    import os
    import sys

    folder = tmp_path_factory.mktemp("schema")
    told = folder / "stand_in.json"
    told.write_text(json.dumps({"steps": 2, "record_s": 0}))  # records that are some
    os.environ["STAND_IN"] = str(told)
    own = Settings(
        data_dir=folder / "data",
        api_key=SecretStr(KEY),
        run_command=[sys.executable, str(STAND_IN)],
        plan_command=[sys.executable, "-c", "raise SystemExit(2)"],  # a plan costs a model
        body_max_bytes=2**20,
    )
    upgrade(own.database)
    database = Database(own.database)
    with TestClient(
        create_app(own, Echo(own)),
        base_url="http://127.0.0.1",
        raise_server_exceptions=False,
        headers={"Authorization": f"Bearer {KEY}"},
    ) as client:
        dataset = client.post("/datasets", files={"file": ("x.zip", dataset_zip())}).json()["id"]
        job = client.post("/align", json={"dataset": dataset, "adapter": "brain"}).json()["id"]
        run_job(database, own, job, lambda: False)
        client.put("/adapters/brain/aliases/champion", json={"version": 1})
        key = client.post("/keys", json={"name": "k", "scopes": ["vqa"]}).json()["id"]
        wait_for(lambda: client.get("/readyz").status_code == 200)
        with database.read() as session:
            assert jobs.get(session, job).status == "succeeded"
            digest = session.get_one(Job, job).dataset_id
        ids = {"dataset_id": dataset, "job_id": job, "name": "brain", "version": 1, "alias": "champion"}
        theirs = {"file_id": dataset, "training_file": dataset, "model": "hscr-demo"}
        yield Target(client, ids | theirs | {"number": 1, "key_id": key, "dataset": digest, "adapter": "brain"})
    database.close()
    del os.environ["STAND_IN"]


def documented() -> list[str]:
    """Every operation of the application's document."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    document = create_app(Settings(engine="none")).openapi()
    labels = [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    return sorted(labels, key=lambda label: label.startswith("DELETE"))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("label", documented())
def test_no_request_makes_the_service_fail(target: Target, label: str, mode: GenerationMode) -> None:
    method, path = label.split(" ")
    operation = target.schema[path][method]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def ask(case: Any, known: bool) -> None:
        if known:
            case.path_parameters = {k: target.ids.get(k, v) for k, v in (case.path_parameters or {}).items()}
            if isinstance(case.body, dict):
                shown = PICTURES.get(path, {}) if case.media_type == "application/json" else {}
                case.body = {k: shown.get(k, target.ids.get(k, v)) for k, v in case.body.items()}
        answer = send(target.client, case)
        if answer.status_code >= 500:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["code"] in ALLOWED_5XX, (answer.json(), case.as_curl_command())
        checks = [response_schema_conformance] + ([not_a_server_error] if answer.status_code != 503 else [])
        case.validate_response(answer, checks=checks)

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "a route without parameters cannot be asked wrongly, but rightly"


def send(client: TestClient, case: Any) -> Any:
    sent = {k: v for k, v in case.as_transport_kwargs(base_url="http://127.0.0.1").items() if v}
    sent.pop("cookies", None)
    if isinstance(sent.get("data"), (bytes, str)):
        sent["content"] = sent.pop("data")
    if "files" in sent:  # requests' form of numbers; httpx wants text
        sent["files"] = [(n, (f[0], text(f[1]), *f[2:])) for n, f in sent["files"]]
    return client.request(**sent)


def text(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
