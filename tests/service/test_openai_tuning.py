"""/v1/files and /v1/fine_tuning/jobs, driven by the stock `openai` client over a real server. The jobs themselves run the stand-in."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from sqlalchemy import func, select, update

from service import jobs
from service.app import create_app
from service.db import Database, now
from service.models import AdapterVersion, AuditEntry, Dataset, Job
from service.settings import Settings
from tests.conftest import dataset_zip, png, record
from tests.service.serving import served
from worker.supervise import run_job

pytestmark = pytest.mark.either_database

BOTH = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, sqlite_url: str) -> str:
    """SQLite, except where a test asks for both: what is tested here is the twin, not the rows below it."""
    return request.getfixturevalue("postgres")() if getattr(request, "param", "") == "postgresql" else sqlite_url


@pytest.fixture
def server(settings: Settings) -> Iterator[str]:
    with served(create_app(settings)) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server, api_key="none", max_retries=0) as client:
        yield client


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def user(words: str | None, *images: bytes) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": words}] if words else []
    parts += [{"type": "image_url", "image_url": {"url": data_url(image), "detail": "low"}} for image in images]
    return {"role": "user", "content": parts}


def assistant(words: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **more}


def jsonl(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def send(client: openai.OpenAI, content: bytes, name: str = "ward-7.jsonl") -> Any:
    return client.files.create(file=(name, content), purpose="fine-tune")


def records(client: openai.OpenAI, file_id: str) -> list[dict[str, Any]]:
    archive = zipfile.ZipFile(io.BytesIO(client.files.content(file_id).read()))
    return [json.loads(line) for line in archive.read("records.jsonl").splitlines()]


def count(database: Database, table: Any) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_openais_own_chat_lines_become_records_and_bad_rows_are_listed(
    client: openai.OpenAI, settings: Settings
) -> None:
    system = {"role": "system", "content": "You are careful."}
    first = [system, {"role": "user", "content": "Look."}, user("Where?", png(1), png(2)), assistant("left")]
    two_turns = [user("Is there one?", png(3)), assistant("Yes"), {"role": "user", "content": "Where?"}]
    unanswered = [user("Where?", png(4))]
    rows = [
        {"messages": first},
        {"messages": [*two_turns, assistant("right", weight=0)]},
        {"messages": [*two_turns, assistant("right")]},
        {"messages": unanswered},
        {"messages": [user("Where?"), assistant("left")]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}
            ]
        },
        {"messages": [user("Where?", b"no image"), assistant("left")]},
        b"not json",
        {"messages": [{"role": "tool", "content": "x"}, assistant("left")]},
        {"messages": [user("Where?", png(5)), {"role": "assistant", "content": None}]},
    ]
    file = send(client, jsonl(*rows))
    assert (file.object, file.purpose, file.status, file.filename) == ("file", "fine-tune", "processed", "ward-7.zip")
    assert file.bytes > 0
    assert [(row["line"], row["reason"].split(":")[0]) for row in file.rejected] == [
        (2, "turn 2"), (4, "messages"), (5, "messages"), (6, "image_url"), (7, "image"), (8, "not JSON"), (9, "messages"),
        (10, "messages"),
    ]  # fmt: skip
    assert file.status_details is not None
    assert "8 rows were left out" in file.status_details
    stored = records(client, file.id)
    assert [(r["id"], r["question"], r["answer"]) for r in stored] == [
        ("data-1", "Look.\nWhere?", "left"),
        ("data-2", "Is there one?", "Yes"),
        ("data-3", "Is there one?", "Yes"),
        ("data-3-2", "Where?", "right"),
    ]
    assert (len(stored[0]["images"]), stored[2]["image"]) == (2, stored[3]["image"])
    assert (stored[1]["answer_type"], stored[1]["options"]) == ("closed", ["yes", "no"])
    assert client.files.retrieve(file.id).to_dict() == file.to_dict()


def test_openais_preference_lines_bring_their_levels(client: openai.OpenAI) -> None:
    row = {"input": {"messages": [user("Where?", png(1))]}, "preferred_output": [assistant("left")]}
    file = send(client, jsonl(row | {"non_preferred_output": [assistant("right")]}, row))
    assert [r["line"] for r in file.rejected] == [2]
    archive = zipfile.ZipFile(io.BytesIO(client.files.content(file.id).read()))
    (level,) = json.loads(archive.read("preferences.jsonl"))["levels"]
    assert level["text"] == "right"


def test_our_own_zip_and_lines_come_in_and_the_content_goes_out_and_in_again(
    client: openai.OpenAI, database: Database
) -> None:
    file = send(client, dataset_zip(2), "records of ward 7.zip")
    assert (file.filename, file.n_records) == ("records of ward 7.zip", 2)
    again = send(client, client.files.content(file.id).read(), "records of ward 7.zip")
    assert (again.id, count(database, Dataset)) == (file.id, 1)
    inline = send(
        client, jsonl(*(record(n, image=data_url(png(n)), group="p1") for n in range(2))), "../../odd|name.jsonl"
    )
    assert inline.filename == "odd-name.zip"
    assert [(r["id"], r["group"]) for r in records(client, inline.id)] == [("r0", "p1"), ("r1", "p1")]
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        send(client, jsonl(record(0)))  # its image lies nowhere
    assert refused.value.code == "dataset_empty"
    assert "line 1: image: the image file is missing" in refused.value.message


def test_a_file_of_another_purpose_or_of_nothing_is_refused(client: openai.OpenAI, database: Database) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.files.create(file=("a.zip", dataset_zip()), purpose="batch")
    assert (refused.value.code, refused.value.param, refused.value.type) == (
        "invalid_purpose", "purpose", "invalid_request_error",
    )  # fmt: skip
    assert refused.value.request_id.startswith("req_")
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.files.create(
            file=("a.zip", dataset_zip()), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    assert refused.value.param == "expires_after"
    with pytest.raises(openai.UnprocessableEntityError, match="no parquet, JSON or JSONL"):
        send(client, b"nothing of ours")
    assert count(database, Dataset) == 0


@BOTH
def test_files_page_both_ways_and_an_unknown_one_is_not_found(client: openai.OpenAI) -> None:
    ids = [send(client, dataset_zip(n), f"n{n}.zip").id for n in (1, 2, 3)]
    assert [f.id for f in client.files.list(limit=2)] == ids[::-1]  # iterates over both pages
    page = client.files.list(limit=2, order="asc")
    assert ([f.id for f in page.data], page.has_more) == (ids[:2], True)
    assert [f.id for f in client.files.list(after=ids[1], order="asc").data] == ids[2:]
    assert client.files.list(purpose="batch").data == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        for unknown in ("ds_none", "file-abc123"):
            with pytest.raises(openai.NotFoundError) as refused:
                call(unknown)
            assert refused.value.code == "dataset_not_found"


@BOTH
def test_a_file_is_deleted_with_its_content_only_where_no_job_used_it(
    client: openai.OpenAI, settings: Settings, database: Database
) -> None:
    used, free, twin = (send(client, dataset_zip(n), name) for n, name in ((1, "a.zip"), (2, "b.zip"), (2, "c.zip")))
    client.fine_tuning.jobs.create(model="hscr-demo", training_file=used.id)
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(used.id)
    assert refused.value.code == "dataset_in_use"
    assert refused.value.response.headers["x-should-retry"] == "false"
    folders = settings.data_dir / "datasets"
    assert client.files.delete(free.id).to_dict() == {"id": free.id, "object": "file", "deleted": True}
    assert len(list(folders.iterdir())) == 2, "its twin has the same content"
    assert records(client, twin.id)
    client.files.delete(twin.id)
    assert [p.name for p in folders.iterdir()] == [_digest(database, used.id).replace(":", "-")]
    with database.read() as session:
        assert session.scalar(select(func.count()).where(AuditEntry.action == "dataset.delete")) == 2


def _digest(database: Database, dataset_id: str) -> str:
    with database.read() as session:
        return session.get_one(Dataset, dataset_id).digest


def finished(database: Database, settings: Settings, job_id: str) -> None:
    run_job(database, settings, job_id, should_stop=lambda: False)


@BOTH
def test_a_job_from_its_creation_to_its_model(
    client: openai.OpenAI, settings: Settings, database: Database, stand_in: Callable[..., None]
) -> None:
    stand_in(steps=4, checkpoints=True)
    train, valid = send(client, dataset_zip(3), "train.zip"), send(client, dataset_zip(2), "valid.zip")
    hyperparameters = {"n_epochs": 3, "batch_size": "auto", "beta": 0.25, "preference": {"n_levels": 2}}
    job = client.fine_tuning.jobs.create(
        model="hscr-demo",
        training_file=train.id,
        validation_file=valid.id,
        suffix="ward-7",
        seed=5,
        metadata={"team": "a"},
        method={"type": "hscr", "hscr": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )
    assert (job.object, job.status, job.model, job.fine_tuned_model) == ("fine_tuning.job", "queued", "hscr-demo", None)
    assert (job.training_file, job.validation_file, job.seed, job.metadata) == (train.id, valid.id, 5, {"team": "a"})
    assert (job.trained_tokens, job.error, job.result_files, job.finished_at) == (None, None, [], None)
    assert job.hyperparameters.n_epochs == 3
    with database.read() as session:
        config = jobs.get(session, job.id).config
    assert (config["optimization"]["epochs"], config["optimization"]["gamma"], config["preference"]["n_levels"]) == (
        3,
        0.25,
        2,
    )
    finished(database, settings, job.id)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.result_files) == ("succeeded", "ward-7:1", [f"results_{job.id}"])
    assert done.method is not None
    assert done.method.type == "hscr"
    assert done.finished_at is not None
    results = client.files.retrieve(done.result_files[0])
    assert (results.purpose, results.filename) == ("fine-tune-results", "report.json")
    assert json.loads(client.files.content(results.id).read()) == {"steps": 4}
    assert [f.id for f in client.files.list(purpose="fine-tune-results")] == [results.id]
    with pytest.raises(openai.ConflictError, match="DELETE /jobs"):
        client.files.delete(results.id)

    every = list(client.fine_tuning.jobs.list_events(job.id, limit=3))  # over all pages
    numbers = [int(e.id.rpartition("_")[2]) for e in every]
    assert numbers == list(range(len(numbers), 0, -1))
    assert every[0].message == "The job is succeeded"
    metrics = [e for e in every if e.type == "metrics"]
    assert metrics[0].data == {"step": 4, "train_loss": 0.25, "loss": 0.25}
    points = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=3))
    assert [p.step_number for p in points] == [4, 3, 2, 1]
    assert points[0].fine_tuned_model_checkpoint == "ward-7:checkpoint-4"
    assert (points[1].metrics.step, points[1].metrics.train_loss) == (3, 1 / 3)

    more = client.fine_tuning.jobs.create(model="ward-7:1", training_file=train.id, method={"type": "dpo"})
    assert (more.model, more.method.type if more.method else None) == ("ward-7:1", "dpo")
    with database.read() as session:
        row = jobs.get(session, more.id)
    assert (row.adapter_name, row.source_name, row.source_version) == ("ward-7", "ward-7", 1)
    assert row.config["optimization"]["objective"] == "dpo"
    assert [j.id for j in client.fine_tuning.jobs.list(limit=1)] == [more.id, job.id]
    assert [j.id for j in client.fine_tuning.jobs.list(metadata={"team": "a"}).data] == [job.id]
    assert [j.id for j in client.fine_tuning.jobs.list(extra_query={"metadata": "null"}).data] == [more.id]


def test_cancel_pause_and_resume_are_those_of_our_jobs(
    client: openai.OpenAI, database: Database, settings: Settings, stand_in: Callable[..., None]
) -> None:
    tuning = client.fine_tuning.jobs
    job = tuning.create(model="hscr-demo", training_file=send(client, dataset_zip()).id, suffix="a")
    assert tuning.pause(job.id).status == "paused"
    assert tuning.retrieve(job.id).status == "paused"
    assert tuning.resume(job.id).status == "queued"
    assert tuning.cancel(job.id).status == "cancelled"
    assert tuning.cancel(job.id).status == "cancelled", "asking twice is harmless"
    with pytest.raises(openai.ConflictError) as refused:
        tuning.resume(job.id)
    assert refused.value.code == "job_ended"
    with database.read() as session:
        actions = session.scalars(select(AuditEntry.action).where(AuditEntry.subject == job.id)).all()
    assert list(actions) == ["job.create", "job.pause", "job.resume", "job.cancel"]
    stand_in(exit=2)
    failed = tuning.create(model="hscr-demo", training_file=job.training_file)
    finished(database, settings, failed.id)
    failed = tuning.retrieve(failed.id)
    assert (failed.status, failed.fine_tuned_model) == ("failed", None)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message, failed.error.param) == (
        "bad_records",
        "the run refuses its input",
        None,
    )
    assert [e.level for e in tuning.list_events(failed.id, limit=2)][:2] == ["error", "error"]


def test_a_job_that_awaits_review_is_paused_in_openais_words(
    client: openai.OpenAI, database: Database, new_job: Callable[..., str]
) -> None:
    from hscr.config import AlignConfig

    job_id = new_job(review=True, config=AlignConfig().to_dict())
    with database.write() as session:
        mine = jobs.claim(session, job_id, 60)
        assert mine is not None
        jobs.await_review(session, mine)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "paused"


def test_sending_a_creation_twice_makes_one_job(client: openai.OpenAI, database: Database) -> None:
    file = send(client, dataset_zip())
    twice = [
        client.fine_tuning.jobs.with_raw_response.create(
            model="hscr-demo", training_file=file.id, suffix="a", extra_headers={"Idempotency-Key": "k"}
        )
        for _ in range(2)
    ]
    assert twice[0].parse().id == twice[1].parse().id
    assert [a.headers.get("idempotent-replayed") for a in twice] == [None, "true"]
    assert count(database, Job) == 1
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.fine_tuning.jobs.create(
            model="hscr-demo", training_file=file.id, suffix="b", extra_headers={"Idempotency-Key": "k"}
        )
    assert refused.value.code == "idempotency_mismatch"


def given(method: str, **hyperparameters: Any) -> dict[str, Any]:
    return {"method": {"type": method, method: {"hyperparameters": hyperparameters}}}


RATE = "method.dpo.hyperparameters.learning_rate_multiplier"
REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "a foreign base": ({"model": "gpt-4o-mini"}, "model_not_served", "model"),
    "no model's name": ({"model": "a/b c"}, "model_not_served", "model"),
    "an unknown file": ({"training_file": "ds_none"}, "dataset_not_found", "training_file"),
    "a file of OpenAI's": ({"training_file": "file-abc123"}, "dataset_not_found", "training_file"),
    "an unknown file to validate on": ({"validation_file": "ds_none"}, "dataset_not_found", "validation_file"),
    "its own file to validate on": ({"validation_file": "THE FILE"}, "leak", "validation_file"),
    "a bad suffix": ({"suffix": "../up"}, "invalid_request", "suffix"),
    "graders": ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method_not_supported", "method.type"),
    "another method": ({"method": {"type": "magic"}}, "invalid_request", "method.type"),
    "hyperparameters elsewhere": ({"method": {"type": "dpo", "hscr": {}}}, "invalid_request", "method.hscr"),
    "an unknown one": (given("hscr", epochs=3), "invalid_request", "method.hscr.hyperparameters.epochs"),
    "out of range": (given("hscr", n_epochs=10**9), "invalid_config", None),
    "endless": (given("dpo", beta=1e308), "invalid_config", None),
    "a negative rate": (given("dpo", learning_rate_multiplier=-1), "invalid_request", RATE),
    "twice": (given("hscr", n_epochs=2, optimization={"epochs": 3}), "invalid_config", "n_epochs"),
    "no preset": (given("hscr", preset="best"), "invalid_config", "preset"),
    "another objective": (given("dpo", optimization={"objective": "sft"}), "invalid_config", "optimization.objective"),
    "metadata of numbers": ({"metadata": {"a": 1}}, "invalid_request", "metadata.a"),
    "an integration": ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "invalid_request", "integrations"),
    "an unknown field": ({"extra_body": {"n_best": 1}}, "invalid_request", "n_best"),
}  # fmt: skip


def test_what_cannot_run_is_refused_with_the_field_that_is_wrong(client: openai.OpenAI, database: Database) -> None:
    file = send(client, dataset_zip())
    for name, (change, code, param) in REFUSED.items():
        change = {field: file.id if value == "THE FILE" else value for field, value in change.items()}
        with pytest.raises(openai.APIStatusError) as refused:
            client.fine_tuning.jobs.create(**{"model": "hscr-demo", "training_file": file.id} | change)
        assert refused.value.status_code in (404, 422), name
        assert (refused.value.code, refused.value.param) == (code, param), name
    assert count(database, Job) == count(database, AdapterVersion) == 0


def test_older_hyperparameters_and_supervised_are_understood(client: openai.OpenAI, database: Database) -> None:
    file = send(client, dataset_zip())
    old = client.fine_tuning.jobs.create(
        model="hscr-demo", training_file=file.id, hyperparameters={"n_epochs": 4, "learning_rate_multiplier": 2.0}
    )
    new = client.fine_tuning.jobs.create(
        model="hscr-demo", training_file=file.id, method={"type": "supervised", "supervised": {"hyperparameters": {}}}
    )
    assert new.method is not None
    assert new.method.type == "supervised"
    with database.read() as session:
        first, second = (jobs.get(session, j.id).config["optimization"] for j in (old, new))
    assert (first["epochs"], first["lr"], first["objective"]) == (4, 2 * second["lr"], "hscr")
    assert second["objective"] == "sft"


def test_dpo_has_no_supervised_term_unless_it_is_asked_for(client: openai.OpenAI, database: Database) -> None:
    file = send(client, dataset_zip())
    made = [
        client.fine_tuning.jobs.create(model="hscr-demo", training_file=file.id, extra_body=body)
        for body in (given("dpo"), given("dpo", optimization={"anchor": 1.5}), given("hscr"))
    ]
    with database.read() as session:
        configs = [jobs.get(session, job.id).config["optimization"] for job in made]
    assert [(c["objective"], c["anchor"]) for c in configs] == [("dpo", 0.0), ("dpo", 1.5), ("hscr", 2.0)]


def test_what_is_no_align_job_is_not_found_here(
    client: openai.OpenAI, new_job: Callable[..., str], database: Database
) -> None:
    evaluation = new_job(kind="evaluate")
    tuning = client.fine_tuning.jobs
    for call in (
        tuning.retrieve,
        tuning.cancel,
        tuning.pause,
        tuning.resume,
        tuning.list_events,
        tuning.checkpoints.list,
    ):
        for job_id in (evaluation, "job_none", "ftjob-abc123"):
            with pytest.raises(openai.NotFoundError) as refused:
                call(job_id)
            assert refused.value.code == "job_not_found"
    assert tuning.list().data == []
    with database.read() as session:
        assert jobs.get(session, evaluation).status == "queued"


def test_a_deleted_job_is_not_found_here(
    client: openai.OpenAI, database: Database, settings: Settings, stand_in: Callable[..., None]
) -> None:
    tuning = client.fine_tuning.jobs
    job = tuning.create(model="hscr-demo", training_file=send(client, dataset_zip()).id, suffix="a")
    tuning.cancel(job.id)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job.id).values(deleted_at=now()))
    assert tuning.list().data == []
    for call in (tuning.retrieve, tuning.resume, tuning.list_events, tuning.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            call(job.id)


@BOTH
def test_what_the_database_could_not_read_is_refused_before_it_is_asked(client: openai.OpenAI) -> None:
    tuning, file = client.fine_tuning.jobs, send(client, dataset_zip())
    named = tuning.create(model="hscr-demo", training_file=file.id, metadata={"a.b-c:d": 'x"$[0]'})
    assert [j.id for j in tuning.list(metadata={"a.b-c:d": 'x"$[0]'}).data] == [named.id]
    assert tuning.list(metadata={"a.b-c:d": "x"}).data == []
    for query in ({'metadata[a"b]': "x"}, {"metadata[a]": "\0"}, {"metadata": "x"}, {"metadata[]": "x"}):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            tuning.list(extra_query=query)
        assert refused.value.param == "metadata"
    for change in (
        {"training_file": "ds\0"},
        {"validation_file": "\0"},
        {"metadata": {"a": "\0"}},
        {"metadata": {"\0": "a"}},
    ):
        with pytest.raises(openai.UnprocessableEntityError):
            tuning.create(**{"model": "hscr-demo", "training_file": file.id} | change)
    for call in (tuning.retrieve, tuning.cancel, client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.UnprocessableEntityError):
            call("\0")


def test_cursors_of_another_job_are_refused(client: openai.OpenAI) -> None:
    file = send(client, dataset_zip())
    one, other = (client.fine_tuning.jobs.create(model="hscr-demo", training_file=file.id) for _ in range(2))
    cursor = client.fine_tuning.jobs.list_events(one.id).data[0].id
    for after in (cursor, "job_1", "ftevent_x_1"):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.fine_tuning.jobs.list_events(other.id, after=after)
        assert refused.value.param == "after"


def test_scopes_guard_both_and_errors_have_openais_shape_everywhere(settings: Settings) -> None:
    """The server starts with a key; `vqa` may not see what others learn from."""
    from fastapi.testclient import TestClient

    from service import keys

    database = Database(settings.database)
    with database.write() as session:
        secrets = {s: keys.create(session, "cli", name=s, scopes=[s])[1] for s in ("vqa", "align")}
    with TestClient(create_app(settings), base_url="http://127.0.0.1", raise_server_exceptions=False) as raw:
        for path in ("/v1/files", "/v1/fine_tuning/jobs"):
            ask = {s: raw.get(path, headers={"Authorization": f"Bearer {key}"}) for s, key in secrets.items()}
            assert (ask["align"].status_code, ask["align"].json()["data"]) == (200, [])
            refused = ask["vqa"].json()["error"]
            assert (ask["vqa"].status_code, refused["code"], refused["type"]) == (
                403,
                "scope_missing",
                "permission_error",
            )
            bare = raw.get(path)
            assert (bare.status_code, bare.json()["error"]["type"]) == (401, "authentication_error")
        admin = {"Authorization": f"Bearer {secrets['align']}"}
        assert raw.get("/v1/nothing", headers=admin).json()["error"]["code"] == "scope_missing"
        assert raw.get("/v1/files/x/y", headers=admin).json()["error"]["code"] == "not_found"
        long = raw.post("/v1/fine_tuning/jobs", content=b" " * (settings.body_max_bytes + 1), headers=admin)
        assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")
        assert raw.get("/jobs/none", headers=admin).json()["type"] == "urn:hscr:problem:job_not_found"
    database.close()
