"""How many statements a look at the API takes: a number that is known, and that does not grow with the rows that are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import event

from hscr.config import AlignConfig
from service import jobs, outlook
from service.app import create_app
from service.db import Database, now
from service.models import (
    Adapter,
    AdapterVersion,
    Alias,
    AliasMove,
    ApiKey,
    Dataset,
    DatasetRecord,
    Evaluation,
    Gate,
    GenerationShard,
    Job,
    VersionTag,
    WebhookDelivery,
)
from service.settings import Settings
from tests.service.conftest import BASE

pytestmark = pytest.mark.either_database
DIGEST = "sha256:" + "a" * 64
# The most statements that each takes; a job's and the registry's most read ones are one statement each (service/look.py).
VIEWS = {
    "/jobs": 3,  # and what Outlook asks of jobs that wait or run
    "/jobs?status=succeeded": 1,
    "/jobs/{done}": 1,
    "/jobs/{running}": 1,
    "/jobs/{queued}": 3,
    "/jobs/{done}/events": 1,
    "/jobs/{done}/metrics": 2,
    "/jobs/{done}/webhooks": 2,
    "/adapters": 1,
    "/adapters/a0": 1,
    "/adapters/a0/versions": 5,
    "/adapters/a0/versions/1": 1,
    "/adapters/a0/versions/1/lineage": 5,
    "/adapters/a0/aliases/champion/history": 2,
    "/adapters/a0/aliases/champion/gates": 3,
    "/lineage?digest=" + DIGEST: 5,
    "/datasets": 1,
    "/datasets/{data}": 1,
    "/datasets/{data}/records": 2,
    "/datasets/{data}/lineage": 3,
    "/keys": 1,
    "/v1/models": 2,
    "/v1/files": 1,
    "/v1/files?purpose=fine-tune-results": 1,
    "/v1/fine_tuning/jobs": 5,
    "/v1/fine_tuning/jobs/{done}/events": 2,
}


class Asked(list[str]):
    """The statements that SQLite was given, also by those who go round SQLAlchemy."""

    def note(self, connection: Any, record: Any) -> None:
        connection.set_trace_callback(lambda text: self.append(text) if text.lstrip().startswith("SELECT") else None)


@pytest.fixture
def asked(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TestClient, Asked]]:
    monkeypatch.setattr(outlook, "GLANCE_S", 3600.0)
    if not settings.database.startswith("sqlite"):
        pytest.skip("statements are counted by SQLite's own trace; they are the same ones")
    settings.api_key = SecretStr("a-key-that-is-in-no-table")
    app, asked = create_app(settings), Asked()
    event.listen(app.state.hscr.database.engine, "connect", asked.note)
    headers = {"Authorization": f"Bearer {settings.api_key.get_secret_value()}"}
    with TestClient(app, base_url=BASE, headers=headers) as client:
        yield client, asked


def grow(database: Database, model: str, rounds: range) -> dict[str, str]:
    """Of everything that a view shows one more a round: jobs of each kind, versions of equal weights, gates, moves, records, keys."""
    with database.write() as session:
        for n in rounds:
            data, tested = (
                Dataset(id=f"ds_{kind}{n}", name=kind, version=n + 1, format="hscr", digest=f"sha256:{kind}{n}",
                        n_records=1, n_images=1, n_rejected=0, rejected=[])
                for kind in ("data", "tested")
            )  # fmt: skip
            session.add_all([data, tested, Adapter(name=f"a{n}", last_version=1)])
            session.flush()
            values = {
                "dataset_id": "ds_data0",
                "evaluation_dataset_id": tested.id,
                "adapter_name": "a0",
                "model": model,
            }
            made, queued, running, gate = (
                jobs.create(session, config=AlignConfig().to_dict(), **values) for _ in range(4)
            )
            for job in (made, gate):
                job.status, job.finished_at, job.report = "succeeded", now(), "r"
            jobs.claim(session, running.id, 3600)
            gate.kind, gate.source_name, gate.source_version, gate.source_digest = "evaluate", "a0", n + 1, DIGEST
            if n:
                made.source_name, made.source_version, made.source_digest = "a0", n, DIGEST
            session.add(AdapterVersion(adapter_name="a0", version=n + 1, digest=DIGEST, model=model, job_id=made.id,
                                       dataset_id=data.id, dataset_digest=data.digest, config={}, metrics={}))  # fmt: skip
            session.flush()
            session.add_all(
                [
                    VersionTag(adapter_name="a0", version=n + 1, tag=f"t{n}"),
                    Alias(adapter_name="a0", alias=f"alias{n}", version=n + 1),
                    AliasMove(adapter_name="a0", alias="champion", to_version=n + 1),
                    Gate(job_id=gate.id, adapter_name="a0", alias="champion", candidate=n + 1, dataset_id=tested.id,
                         rule={}, actor="local"),
                    Evaluation(job_id=gate.id, adapter_name="a0", version=n + 1, digest=DIGEST, dataset_id=tested.id,
                               dataset_digest=tested.digest, result_digest=DIGEST, metrics={}),
                    DatasetRecord(dataset_id="ds_data0", number=n + 1, record_id=str(n),
                                  record={"id": str(n), "image": "a.png", "question": "q", "answer": "a"}),
                    ApiKey(id=f"key_{n}", name="k", shown="hscr_", digest=f"d{n}", scopes=["align"], revoked_at=now()),
                ]
            )  # fmt: skip
            first = session.query(AdapterVersion).filter_by(version=1).one().job_id
            assert first is not None
            one = session.get_one(Job, first)
            one.last_seq += 1
            jobs.add_event(
                session, first, one.last_seq, 0, "metrics", {"stage": "optimizing", "step": n, "values": {"loss": 1.0}}
            )
            session.add(GenerationShard(job_id=first, number=n + 1, parts=99, start=n, stop=n + 1, status="done"))
            told = {"event": "job.succeeded", "url": "https://h", "status": "pending"}
            session.add(WebhookDelivery(id=f"wh_{n}", job_id=first, seq=one.last_seq, **told))
    return {"done": first, "queued": queued.id, "running": running.id, "data": "ds_data0"}


def test_no_view_asks_more_where_there_is_more_to_show(
    asked: tuple[TestClient, Asked], database: Database, settings: Settings
) -> None:
    client, statements = asked

    def count(ids: dict[str, str]) -> dict[str, int]:
        found = {}
        for view in VIEWS:
            for _ in range(2):  # the first time a process meets a data set it asks for what never changes of it
                statements.clear()
                answer = client.get(view.format(**ids))
                assert answer.status_code == 200, (view, answer.text)
            found[view] = len(statements)
        return found

    few = count(grow(database, settings.model_id, range(2)))
    many = count(grow(database, settings.model_id, range(2, 9)))
    assert {view: n for view, n in many.items() if n > few[view]} == {}, "grows with the rows"
    assert {view: n for view, n in many.items() if n > VIEWS[view]} == {}, "asks more than it has to"
