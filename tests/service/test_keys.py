"""API keys: what each scope opens, on every route; rotation, revocation, expiry, last use, limits; and the same from the command line."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import select, update
from typer.testing import CliRunner

from service import jobs, keys
from service.app import create_app
from service.auth import REMEMBER_S, RULES
from service.cli import app as cli
from service.db import Database, now, upgrade
from service.models import ApiKey, AuditEntry
from service.settings import Settings
from tests.service.test_edge import KEY, every_route

pytestmark = pytest.mark.either_database

ROOT = Path(__file__).parents[2]


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    """A service that others can reach, with HSCR_API_KEY."""
    reachable = settings.model_copy(update={"host": "0.0.0.0", "api_key": SecretStr(KEY)})
    with TestClient(create_app(reachable), base_url="http://service.example", raise_server_exceptions=False) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def new_key(database: Database, *scopes: str, **values: Any) -> tuple[str, str]:
    with database.write() as session:
        key, secret = keys.create(session, "test", name="k", scopes=scopes, **values)
    return key.id, secret


def opens(scope: str, method: str, path: str) -> bool:
    """What the table of the documentation says, written again by hand."""
    top = "/" + "/".join(path.split("/")[1 : 3 if path.startswith("/v1/") else 2])
    if top in ("/docs", "/openapi.json", "/metrics"):
        return method in ("GET", "HEAD")
    if scope == "vqa":
        return top in ("/vqa", "/v1/chat") or (
            top in ("/adapters", "/lineage", "/v1/models") and method in ("GET", "HEAD")
        )
    ours = ("/datasets", "/align", "/evaluate", "/jobs", "/adapters", "/lineage")
    return top in (*ours, "/v1/models", "/v1/files", "/v1/fine_tuning")


@pytest.mark.parametrize("scope", ["vqa", "align"])
def test_every_route_asks_for_its_scope(guarded: TestClient, database: Database, scope: str) -> None:
    _, secret = new_key(database, scope)
    _, admin = new_key(database, "admin")
    routes = [r for r in sorted(set(every_route(guarded.app.routes))) if r[1] not in ("/healthz", "/readyz")]  # type: ignore[attr-defined]
    assert ("DELETE", "/keys/key_id") in routes
    for method, path in routes:
        answer = guarded.request(method, path, headers=bearer(secret))
        if opens(scope, method, path):
            assert answer.status_code not in (401, 403), (method, path)
        else:
            told = answer.json()["error"] if path.startswith("/v1/") else answer.json()
            assert (answer.status_code, told["code"]) == (403, "scope_missing"), (method, path)
        if path != "/keys/key_id":
            assert guarded.request(method, path, headers=bearer(admin)).status_code not in (401, 403), (method, path)


def test_route_without_a_rule_is_for_admins(settings: Settings, database: Database) -> None:
    reachable = settings.model_copy(update={"host": "0.0.0.0", "api_key": SecretStr(KEY)})
    app = create_app(reachable)
    app.get("/forgotten")(lambda: "x")
    assert "forgotten" not in RULES
    with TestClient(app, base_url="http://service.example") as client:
        for path in ("/forgotten", "/nope", "//vqa", "/VQA", "/vqax"):
            _, secret = new_key(database, "vqa", "align")
            assert client.get(path, headers=bearer(secret)).status_code == 403, path
        assert client.get("/forgotten", headers=bearer(KEY)).status_code == 200


def test_key_is_shown_once_and_stored_as_a_digest(guarded: TestClient, database: Database) -> None:
    made = guarded.post("/keys", json={"name": "ward", "scopes": ["vqa"]}, headers=bearer(KEY))
    assert made.status_code == 201
    secret = made.json()["secret"]
    assert len(secret) >= 48
    assert guarded.get("/adapters", headers=bearer(secret)).status_code == 200
    assert secret not in guarded.get("/keys", headers=bearer(KEY)).text
    assert secret not in guarded.get("/audit", headers=bearer(KEY)).text
    with database.read() as session:
        row = session.scalars(select(ApiKey)).one()
    assert secret not in str({c: getattr(row, c) for c in ApiKey.__table__.columns.keys()})  # noqa: SIM118
    assert secret.startswith(row.shown)
    assert len(row.shown) < 15


def test_revoked_key_opens_nothing_at_once_and_for_ever(guarded: TestClient, database: Database) -> None:
    key_id, secret = new_key(database, "align")
    assert guarded.get("/jobs", headers=bearer(secret)).status_code == 200
    assert guarded.delete(f"/keys/{key_id}", headers=bearer(KEY)).status_code == 204
    assert guarded.get("/jobs", headers=bearer(secret)).status_code == 401
    assert guarded.delete(f"/keys/{key_id}", headers=bearer(KEY)).status_code == 204, "twice is no error"
    answer = guarded.post(f"/keys/{key_id}/rotate", headers=bearer(KEY))
    assert (answer.status_code, answer.json()["code"]) == (409, "key_revoked")
    assert guarded.delete("/keys/key_none", headers=bearer(KEY)).json()["code"] == "key_not_found"


def test_key_that_another_process_revoked_opens_nothing_after_a_second(guarded: TestClient, database: Database) -> None:
    """The command line, say: this process remembers a key that it looked up for REMEMBER_S, and no longer."""
    key_id, secret = new_key(database, "align")
    assert guarded.get("/jobs", headers=bearer(secret)).status_code == 200
    with database.write() as session:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(revoked_at=now()))
    time.sleep(REMEMBER_S)
    assert guarded.get("/jobs", headers=bearer(secret)).status_code == 401


def test_rotated_key_changes_its_secret_and_stays_itself(guarded: TestClient, database: Database) -> None:
    key_id, old = new_key(database, "align")
    answer = guarded.post(f"/keys/{key_id}/rotate", json={"keep_s": 1.5}, headers=bearer(KEY))
    new = answer.json()["secret"]
    assert (answer.json()["id"], new == old) == (key_id, False)
    assert {guarded.get("/jobs", headers=bearer(s)).status_code for s in (old, new)} == {200}
    time.sleep(1.5)
    assert guarded.get("/jobs", headers=bearer(old)).status_code == 401
    newest = guarded.post(f"/keys/{key_id}/rotate", headers=bearer(KEY)).json()["secret"]
    codes = [guarded.get("/jobs", headers=bearer(s)).status_code for s in (old, new, newest)]
    assert codes == [401, 401, 200], "without a time to overlap the old secret ends at once"


def test_key_ends_at_its_time(guarded: TestClient, database: Database) -> None:
    _, secret = new_key(database, "align", expires_s=1.0)
    assert guarded.get("/jobs", headers=bearer(secret)).status_code == 200
    time.sleep(1.0)
    assert guarded.get("/jobs", headers=bearer(secret)).status_code == 401


def test_last_use_is_noted_to_the_minute(guarded: TestClient, database: Database) -> None:
    key_id, secret = new_key(database, "align")

    def used() -> Any:
        with database.read() as session:
            return session.scalar(select(ApiKey.last_used_at).where(ApiKey.id == key_id))

    assert used() is None
    guarded.get("/jobs", headers=bearer(secret))
    first = used()
    assert abs((now() - first).total_seconds()) < 5
    guarded.get("/jobs", headers=bearer(secret))
    assert used() == first, "not a write a request"
    with database.write() as session:
        session.execute(update(ApiKey).values(last_used_at=first - timedelta(minutes=2)))
    time.sleep(REMEMBER_S)  # until then the key is not looked up again
    guarded.get("/jobs", headers=bearer(secret))
    assert used() > first - timedelta(minutes=1)


def test_without_any_key_this_machine_may_call_and_with_one_it_needs_it(client: TestClient, database: Database) -> None:
    assert client.get("/jobs", headers=bearer("anything")).status_code == 200
    key_id, secret = new_key(database, "align")
    assert client.get("/jobs").status_code == 401
    assert client.get("/jobs", headers=bearer("anything")).status_code == 401
    assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
    assert client.get("/jobs", headers=bearer(secret)).status_code == 200
    with database.write() as session:
        keys.revoke(session, "test", key_id)
    assert client.get("/jobs").status_code == 401, "revoking the last key does not open the door"


def test_that_no_key_exists_is_not_looked_up_with_each_request(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = keys.any_at_all
    monkeypatch.setattr(keys, "any_at_all", lambda session: asked.append(1) or real(session))
    begin = time.monotonic()
    assert {client.get("/jobs").status_code for _ in range(20)} == {200}
    assert len(asked) <= 1 + (time.monotonic() - begin) / REMEMBER_S
    with database.write() as session:  # another process makes the first key: nothing here counts it
        session.add(ApiKey(id="key_other", name="k", scopes=["vqa"], digest="sha256:x", shown="hscr_x"))
    time.sleep(REMEMBER_S + 0.05)
    assert client.get("/jobs").status_code == 401


def test_keys_own_limits_come_before_the_services(guarded: TestClient, database: Database, dataset: Any) -> None:
    key_id, secret = new_key(database, "align", waiting_max=1, running_max=1)
    _, other = new_key(database, "align")
    body = {"dataset": dataset.id, "adapter": "brain"}
    first = guarded.post("/align", json=body, headers=bearer(secret)).json()
    assert first["owner"] == key_id
    assert guarded.post("/align", json=body, headers=bearer(secret)).status_code == 429
    assert guarded.post("/align", json=body, headers=bearer(other)).status_code == 202
    with database.write() as session:
        assert jobs.claim(session, first["id"], 60) is not None
    second = guarded.post("/align", json=body, headers=bearer(secret)).json()
    with database.write() as session:
        assert jobs.claim(session, second["id"], 60) is None


def test_idempotency_keys_are_each_callers_own(guarded: TestClient, database: Database, dataset: Any) -> None:
    """Two callers that happen to use one Idempotency-Key for one body: two jobs, and neither sees the other's."""
    secrets = [new_key(database, "align")[1] for _ in range(2)]
    body = {"dataset": dataset.id, "adapter": "brain"}
    sent = [guarded.post("/align", json=body, headers=bearer(s) | {"Idempotency-Key": "k"}) for s in secrets * 2]
    ids = [a.json()["id"] for a in sent]
    assert ids[:2] == ids[2:]
    assert ids[0] != ids[1]
    assert ["idempotent-replayed" in a.headers for a in sent] == [False, False, True, True]


@pytest.mark.parametrize(
    "body",
    [{}, {"name": "x", "scopes": []}, {"name": "x", "scopes": ["root"]}, {"name": "", "scopes": ["vqa"]},
     {"name": "x", "scopes": ["vqa"], "expires_s": -1}, {"name": "x", "scopes": ["vqa"], "id": "key_1"}],
)  # fmt: skip
def test_wrong_requests_for_keys_are_refused(guarded: TestClient, database: Database, body: dict[str, Any]) -> None:
    assert guarded.post("/keys", json=body, headers=bearer(KEY)).json()["code"] == "invalid_request"
    with database.read() as session:
        assert session.scalars(select(ApiKey)).all() == []


def test_command_line_makes_lists_rotates_and_revokes(
    client: TestClient, database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.database)
    run = CliRunner()

    def hscr(*words: str) -> Any:
        return run.invoke(cli, list(words))

    made = hscr("keys", "create", "--scope", "align", "--scope", "vqa", "--name", "ward 7", "--expires-days", "30")
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    assert secret.startswith(keys.PREFIX)
    assert client.get("/jobs", headers=bearer(secret)).status_code == 200
    with database.read() as session:
        key_id = session.scalars(select(ApiKey.id)).one()
    listed = hscr("keys", "list").stdout
    assert key_id in listed
    assert "active" in listed
    assert secret not in listed
    newer = hscr("keys", "rotate", key_id).stdout.strip()
    assert client.get("/jobs", headers=bearer(newer)).status_code == 200
    assert hscr("keys", "revoke", key_id).exit_code == 0
    assert client.get("/jobs", headers=bearer(newer)).status_code == 401
    assert "revoked" in hscr("keys", "list").stdout
    with database.read() as session:
        told = session.execute(select(AuditEntry.actor, AuditEntry.action).order_by(AuditEntry.number)).all()
    assert [tuple(t) for t in told] == [("cli", "key.create"), ("cli", "key.rotate"), ("cli", "key.revoke")]


@pytest.mark.parametrize(
    "command",
    [
        "keys create --scope vqa",
        "keys list",
        "keys rotate key_1",
        "keys revoke key_1",
        "audit verify",
        "backup -o saved",
    ],
)
def test_commands_on_a_service_make_none_where_there_is_none(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "HSCR_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    nobodys = tmp_path / "no-service.db"
    sqlite3.connect(nobodys).close()
    for words, place in (([], tmp_path / "hscr-data"), (["--data", str(tmp_path / "typo")], tmp_path / "typo")):
        done = CliRunner().invoke(cli, [*command.split(), *words])
        assert isinstance(done.exception, ValueError)
        assert f"no service in {place}" in str(done.exception)
        assert "--data" in str(done.exception)
        assert done.stdout == ""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{nobodys}")
    assert str(CliRunner().invoke(cli, command.split()).exception).startswith("DATABASE_URL: that database holds no")
    assert list(tmp_path.iterdir()) == [nobodys]
    for address, said in (
        ("nonsense", "DATABASE_URL: is no address"),
        ("postgresql://a:canary@127.0.0.1:1/x", "the database does not answer (OperationalError)"),
        ("mysql://a:canary@127.0.0.1/x", "the database does not answer (ModuleNotFoundError)"),
    ):
        monkeypatch.setenv("DATABASE_URL", address)
        refused = CliRunner().invoke(cli, command.split()).exception
        assert isinstance(refused, ValueError)
        assert str(refused).startswith(said)
        assert "canary" not in str(refused)


@pytest.mark.thorough
def test_command_line_on_a_new_services_folder_and_its_errors(tmp_path: Path) -> None:
    """The program itself: one clear line and exit code 2 for what is wrong."""
    (tmp_path / "d").mkdir()
    upgrade(f"sqlite:///{tmp_path / 'd' / 'hscr.db'}")

    def hscr(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "service.cli", *words, "--data", str(tmp_path / "d")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    made = hscr("keys", "create", "--scope", "admin")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(keys.PREFIX)
    wrong = hscr("keys", "create", "--scope", "root")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "at least one of vqa, align, admin" in wrong.stderr
    assert "No key has this id" in hscr("keys", "revoke", "key_none").stderr
