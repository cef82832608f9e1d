"""Webhooks against real HTTP servers: what is sent and how it is signed, retries, giving up, and what is never called."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import select, update
from standardwebhooks.webhooks import Webhook

from service import job_requests, jobs, webhooks
from service.app import create_app
from service.db import Database, now
from service.models import Job, WebhookDelivery
from service.settings import Settings
from tests.conftest import wait_for
from worker.supervise import run_job
from worker.webhooks import deliver_due

pytestmark = pytest.mark.either_database

NewJob = Callable[..., str]
SECRET, OLD = ("whsec_" + base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


@dataclass
class Receiver:
    """A real HTTP server that answers as told and remembers what came."""

    answers: list[int] = field(default_factory=list)  # one code a request; then 204
    location: str = ""
    drip: bool = False
    got: list[tuple[dict[str, str], str]] = field(default_factory=list)
    address: str = ""


def serve(receiver: Receiver) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
            if receiver.drip:  # one byte of an answer at a time, for ever
                for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 200:
                    try:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                    except OSError:
                        return
                    time.sleep(0.1)
                return
            self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
            if receiver.location:
                self.send_header("Location", receiver.location)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


@pytest.fixture
def receiver(settings: Settings) -> Iterator[Receiver]:
    told = Receiver()
    server = serve(told)
    settings.webhook_hosts, settings.webhook_secret = [told.address], SecretStr(SECRET)
    settings.webhook_pauses_s = [0.0, 0.0, 0.0]
    yield told
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        yield client


def log_of(database: Database) -> WebhookDelivery:
    with database.read() as session:
        return session.scalars(select(WebhookDelivery)).one()


def end(database: Database, job_id: str, status: str = "cancelled") -> None:
    with database.write() as session:
        if status == "cancelled":
            job_requests.cancel(session, job_id)
            return
        mine = jobs.claim(session, job_id, 60)
        assert mine is not None
        jobs.fail(session, mine, "bad", "canary words") if status == "failed" else jobs.await_review(session, mine)


def test_end_of_a_job_is_told_once_signed_and_says_ids_only(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver, stand_in: Any
) -> None:
    settings.webhook_secret = SecretStr(f"{SECRET} {OLD}")
    job_id = new_job(webhook=f"{receiver.address}/hook?x=1", meta={"note": "canary"})
    assert deliver_due(database, settings) == 0, "nothing happened that anybody waits for"
    run_job(database, settings, job_id, lambda: False)
    assert deliver_due(database, settings) == 1
    assert deliver_due(database, settings) == 0
    ((headers, body),) = receiver.got
    assert json.loads(body)["type"] == "job.succeeded"
    seq = [e for e in _events(database, job_id) if e.type == "status"][-1].seq
    assert json.loads(body)["data"] == {"job_id": job_id, "status": "succeeded", "seq": seq}
    assert "canary" not in body + str(headers)
    assert "brain" not in body
    Webhook(SECRET).verify(body, headers)
    Webhook(OLD).verify(body, headers)
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
    by_hand = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"].split()[0] == f"v1,{by_hand}"
    delivery = log_of(database)
    assert (delivery.status, delivery.attempts, delivery.next_at, delivery.log[0]["code"]) == (
        "delivered",
        1,
        None,
        204,
    )


def _events(database: Database, job_id: str) -> list[Any]:
    with database.read() as session:
        return jobs.events_after(session, job_id, 0, 1000)


def test_only_the_statuses_that_somebody_waits_for_are_told(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    failed, cancelled, waiting, silent = (new_job(webhook=receiver.address) for _ in range(4))
    with database.write() as session:
        job_requests.pause(session, silent)
    end(database, failed, "failed")
    end(database, cancelled)
    end(database, waiting, "awaiting_review")
    end(database, new_job())
    assert deliver_due(database, settings) == 3
    told = {(json.loads(b)["data"]["job_id"], json.loads(b)["type"]) for _, b in receiver.got}
    assert told == {(failed, "job.failed"), (cancelled, "job.cancelled"), (waiting, "job.awaiting_review")}
    with database.write() as session:
        job_requests.retry(session, failed, None)
    end(database, failed, "failed")
    assert deliver_due(database, settings) == 1, "a second ending is told too"


def test_transition_that_is_rolled_back_is_not_told(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    job_id = new_job(webhook=receiver.address)
    with database.write() as session:
        job_requests.cancel(session, job_id)
        session.rollback()
    assert deliver_due(database, settings) == 0
    assert receiver.got == []


def test_failed_attempts_are_tried_again_with_growing_pauses(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    settings.webhook_pauses_s = [10.0, 100.0, 1000.0]
    receiver.answers = [500, 429, 302]
    end(database, new_job(webhook=receiver.address))
    for number, pause in enumerate([10, 100, 1000], 1):
        assert deliver_due(database, settings) == 1
        assert deliver_due(database, settings) == 0, "not before its time"
        delivery = log_of(database)
        assert (delivery.status, delivery.attempts) == ("pending", number)
        assert delivery.next_at is not None
        assert 0.85 * pause < (delivery.next_at - now()).total_seconds() < 1.15 * pause
        with database.write() as session:
            session.execute(update(WebhookDelivery).values(next_at=now()))
    assert deliver_due(database, settings) == 1
    delivery = log_of(database)
    assert (delivery.status, [a["code"] for a in delivery.log]) == ("delivered", [500, 429, 302, 204])
    assert len({h["webhook-id"] for h, _ in receiver.got}) == 1
    assert len({b for _, b in receiver.got}) == 1


def test_receiver_that_never_takes_it_is_given_up_and_can_be_asked_again(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver, client: TestClient
) -> None:
    receiver.answers = [500] * 4
    job_id = new_job(webhook=receiver.address)
    end(database, job_id)
    while deliver_due(database, settings):
        pass
    (delivery,) = client.get(f"/jobs/{job_id}/webhooks").json()["data"]
    assert (delivery["status"], delivery["attempts"], delivery["next_at"]) == ("failed", 4, None)
    assert [a["code"] for a in delivery["log"]] == [500] * 4
    path = f"/jobs/{job_id}/webhooks/{delivery['id']}/redeliver"
    assert client.post(path).json()["status"] == "pending"
    assert deliver_due(database, settings) == 1
    (delivery,) = client.get(f"/jobs/{job_id}/webhooks").json()["data"]
    assert (delivery["status"], delivery["attempts"], len(delivery["log"])) == ("delivered", 5, 5)
    assert client.post(f"/jobs/{job_id}/webhooks/msg_none/redeliver").json()["code"] == "delivery_not_found"
    other = new_job()
    assert client.post(path.replace(job_id, other)).json()["code"] == "delivery_not_found"
    client.delete(f"/jobs/{job_id}")
    assert client.get(f"/jobs/{job_id}/webhooks").json()["data"] == []


def test_receiver_that_is_gone_is_not_asked_again(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    receiver.answers = [410]
    end(database, new_job(webhook=receiver.address))
    assert deliver_due(database, settings) == 1
    assert log_of(database).status == "failed"


def test_redirects_are_not_followed(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    canary = Receiver()
    server = serve(canary)
    receiver.answers, receiver.location = [307, 302, 301, 308], f"{canary.address}/elsewhere"
    end(database, new_job(webhook=receiver.address))
    while deliver_due(database, settings):
        pass
    assert len(receiver.got) == 4
    assert canary.got == []
    server.shutdown()
    server.server_close()


def test_attempt_ends_after_its_time_however_slowly_the_answer_drips(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    settings.webhook_timeout_s, receiver.drip = 0.5, True
    end(database, new_job(webhook=receiver.address))
    begin = time.monotonic()
    assert deliver_due(database, settings) == 1
    assert time.monotonic() - begin < 10  # the answer would take 23
    assert log_of(database).log[0]["error"] == "TimeoutError"


def test_nobody_listens(database: Database, settings: Settings, new_job: NewJob, receiver: Receiver) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    settings.webhook_hosts = [dead]
    end(database, new_job(webhook=dead))
    assert deliver_due(database, settings) == 1
    assert (log_of(database).status, log_of(database).log[0]["error"]) == ("pending", "ConnectError")


def test_host_that_is_no_longer_allowed_is_not_called(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    end(database, new_job(webhook=receiver.address))
    settings.webhook_hosts = ["https://hooks.example"]
    assert deliver_due(database, settings) == 1
    assert receiver.got == []
    assert (log_of(database).status, log_of(database).log[0]["error"]) == ("failed", "NotAllowed")


def test_two_senders_at_once_send_a_delivery_once(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    for _ in range(8):
        end(database, new_job(webhook=receiver.address))
    with ThreadPoolExecutor(4) as pool:
        sent = list(pool.map(lambda _: deliver_due(database, settings), range(4)))
    assert sum(sent) == len(receiver.got) == 8
    assert len({h["webhook-id"] for h, _ in receiver.got}) == 8


def test_delivery_whose_sender_died_is_sent_again(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver
) -> None:
    from worker.webhooks import Sent, _claim, _note

    end(database, new_job(webhook=receiver.address))
    dead = _claim(database, settings, log_of(database).id)
    assert dead is not None
    assert deliver_due(database, settings) == 0, "it may still be sending"
    with database.write() as session:
        session.execute(update(WebhookDelivery).values(next_at=now()))
    assert deliver_due(database, settings) == 1
    _note(database, settings, dead, Sent(500, None, 1))
    assert log_of(database).status == "delivered", "a sender that was taken for dead writes nothing any more"


NOT_ALLOWED = [
    "http://127.0.0.1:{port}1/", "https://127.0.0.1:{port}/", "http://localhost:{port}/", "http://2130706433:{port}/",
    "http://127.1:{port}/", "http://0x7f000001:{port}/", "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
    "http://user@127.0.0.1:{port}/", "http://127.0.0.1:{port}@evil.example/", "http://evil.example\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@evil.example/", "http://127.0.0.1.evil.example:{port}/", "http://169.254.169.254/latest/",
    "file:///etc/passwd", "gopher://127.0.0.1:{port}/", "//127.0.0.1:{port}/", "127.0.0.1:{port}", "", "http://",
    "http://127.0.0.1:{port}/#x", "http://127.0.0.1:{port}/\r\nHost: x", "http://127.0.0.1:{port}/ x", "http://①27.0.0.1:{port}/",
    "http://127.0.0.1:99999/", "http://127.0.0.1:{port}/" + "x" * 2000,
]  # fmt: skip


def test_address_that_no_operator_allowed_is_refused(
    client: TestClient, database: Database, dataset: Any, receiver: Receiver
) -> None:
    for tricky in NOT_ALLOWED:
        url = tricky.replace("{port}", receiver.address.rpartition(":")[2])
        answer = client.post("/align", json={"dataset": dataset.id, "adapter": "brain", "webhook": url})
        assert answer.status_code == 422, tricky
        assert answer.json()["code"] in ("webhook_not_allowed", "invalid_request"), tricky
        assert receiver.address.rpartition("/")[2] not in answer.json()["detail"]
    with database.read() as session:
        assert session.scalars(select(Job)).all() == []
    assert receiver.got == []


def test_allowed_address_is_taken_whatever_its_path_and_case(
    settings: Settings, client: TestClient, dataset: Any, receiver: Receiver
) -> None:
    settings.webhook_hosts = [receiver.address, "https://Hooks.Example"]
    for url in (f"{receiver.address}/a/b?c=d", "https://hooks.example/x", "https://HOOKS.example:443/x"):
        answer = client.post("/align", json={"dataset": dataset.id, "adapter": "brain", "webhook": url})
        assert answer.status_code == 202, url
    settings.webhook_hosts = []
    answer = client.post("/align", json={"dataset": dataset.id, "adapter": "brain", "webhook": receiver.address})
    assert answer.json()["code"] == "webhook_not_allowed", "without a list nothing is called"


@pytest.mark.parametrize(
    ("hosts", "secret", "what"),
    [
        (["https://x.example"], None, "HSCR_WEBHOOK_SECRET is not set"),
        (["https://x.example"], "", "HSCR_WEBHOOK_SECRET is not set"),
        (["https://x.example"], "whsec_c2hvcnQ=", "24 to 64 bytes"),
        (["https://x.example"], "plain-text-of-some-length-and-more", "24 to 64 bytes"),
        (["https://x.example"], f"{SECRET} whsec_!!!", "24 to 64 bytes"),
        (["x.example"], SECRET, "is no origin"),
        (["https://user@x.example"], SECRET, "is no origin"),
    ],
)
def test_service_does_not_start_with_half_a_configuration(
    settings: Settings, hosts: list[str], secret: str | None, what: str
) -> None:
    settings.webhook_hosts, settings.webhook_secret = hosts, SecretStr(secret) if secret is not None else None
    with pytest.raises(ValueError, match=what):
        create_app(settings)


def test_hosts_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSCR_WEBHOOK_HOSTS", "https://a.example, http://b.example:8080")
    monkeypatch.setenv("HSCR_WEBHOOK_SECRET", SECRET)
    read = Settings()
    webhooks.check_settings(read)
    assert webhooks.is_allowed("http://b.example:8080/x", read)
    assert not webhooks.is_allowed("http://b.example/x", read)
    monkeypatch.setenv("HSCR_WEBHOOK_HOSTS", "")
    assert Settings().webhook_hosts == []


def test_sweep_process_delivers(
    database: Database, settings: Settings, new_job: NewJob, receiver: Receiver, valkey: str, monkeypatch: Any
) -> None:
    for name, value in {
        "DATABASE_URL": settings.database, "REDIS_URL": valkey, "HSCR_DATA_DIR": str(settings.data_dir),
        "HSCR_SWEEP_INTERVAL_S": "0.1", "HSCR_WEBHOOK_HOSTS": receiver.address, "HSCR_WEBHOOK_SECRET": SECRET,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    process = subprocess.Popen([sys.executable, "-m", "worker.sweep"], cwd=Path(__file__).parents[2])
    try:
        end(database, new_job(webhook=receiver.address))
        wait_for(lambda: receiver.got, what="the sweep sends it")
        wait_for(lambda: log_of(database).status == "delivered", 5)
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
