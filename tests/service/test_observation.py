"""Logs, traces and metrics: what they say, what they leave out, and how they are switched on."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service import jobs, logs, tracing
from service.app import create_app
from service.db import Database
from service.decoding import DecodeStats
from service.engine import Stats
from service.job_counts import REASONS
from service.metrics import Metrics
from service.settings import Settings
from tests.conftest import png, wait_for
from tests.service.test_vqa import Echo, body
from worker import room, supervise
from worker.supervise import run_job

CANARY = "Zqxcanary"


@pytest.fixture
def lines() -> Iterator[Any]:
    """What the service's formatter makes of all that is logged in the test; called, it gives the lines as JSON."""
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter("api", console=False))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_line_carries_the_ids_at_hand_and_its_fields(lines: Any) -> None:
    with logs.bound(request_id="req_1"), logs.bound(job_id="job_1"):
        logging.getLogger("hscr.x").info("job %s claimed", "job_1", extra={"ms": 1.5})
    logging.getLogger("hscr.x").warning("later")
    first, second = lines()
    assert {k: first[k] for k in ("event", "level", "logger", "process", "request_id", "job_id", "ms")} == {
        "event": "job job_1 claimed",
        "level": "info",
        "logger": "hscr.x",
        "process": "api",
        "request_id": "req_1",
        "job_id": "job_1",
        "ms": 1.5,
    }
    assert first["timestamp"].endswith("Z")
    assert "request_id" not in second


def test_of_exceptions_and_libraries_no_text_is_written(lines: Any) -> None:
    library = logging.getLogger("sqlalchemy.somewhere")
    try:
        raise ValueError(CANARY) from KeyError(CANARY)
    except ValueError:
        logging.getLogger("hscr.x").exception("it failed")
        library.exception("failed on %r after %d tries", CANARY, 3, stack_info=True)
    library.warning("filled in: " + CANARY)
    library.warning("%(patient)s and %(n)d", {"patient": CANARY, "n": 2})
    library.warning("words", extra={"data": CANARY})
    got = lines()
    assert CANARY not in json.dumps(got)
    assert [x["event"] for x in got] == [
        "it failed",
        "failed on … after 3 tries",
        logs.LEFT_OUT,
        "… and 2",
        logs.LEFT_OUT,
    ]
    assert got[0]["exception"] == got[1]["exception"] == "ValueError"
    assert got[0]["where"].startswith("test_observation.py:")
    assert "/" not in got[0]["where"]


SCRIPT = f"""
import logging, sys, threading, warnings
from service import logs
logs.configure("worker", sys.argv[1])
logging.getLogger("hscr.x").info("hello", extra={{"n": 1}})
logging.getLogger("hscr.x").info("%d", "{CANARY}")
warnings.warn("{CANARY}")
thread = threading.Thread(target=lambda: 1 / int("{CANARY}"))
thread.start(); thread.join()
raise RuntimeError("{CANARY}")
"""


@pytest.mark.parametrize("style", ["auto", "json", "console"])
def test_a_process_says_nothing_else_on_stderr(style: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, style], capture_output=True, text=True)
    assert done.returncode == 1
    assert CANARY not in done.stderr
    assert done.stderr.count("uncaught exception") == 2
    assert "Traceback" not in done.stderr
    if style == "console":
        assert "hello" in done.stderr
        assert "n=1" in done.stderr
        assert not done.stderr.startswith("{")
    else:
        assert json.loads(done.stderr.splitlines()[0])["event"] == "hello"
        assert json.loads(done.stderr.splitlines()[0])["n"] == 1


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.use("test", SimpleSpanProcessor(exporter))
    yield exporter
    tracing.stop()


def test_a_question_is_a_request_with_its_parts(settings: Settings, spans: InMemorySpanExporter) -> None:
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    with TestClient(
        create_app(settings, Echo(settings)), base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        spans.clear()
        headers = {"traceparent": parent, "tracestate": f"a={CANARY}", "baggage": f"a={CANARY}"}
        assert client.post("/vqa", json=body(question=CANARY, grounding="summary"), headers=headers).status_code == 200
        wait_for(lambda: len(spans.get_finished_spans()) >= 6)
        by_name = {s.name: s for s in spans.get_finished_spans()}
        failing = client.post(f"/vqa?a={CANARY}", json=body(question="fail"), headers={"X-Request-Id": "req_mine"})
        assert failing.status_code == 500
        client.get(f"/{CANARY}/{CANARY}")
        client.request(CANARY, "/vqa")
        client.post("/vqa", files={"image": (CANARY, png())}, data={CANARY: CANARY})
    assert set(by_name) == {"request", "vqa.decode", "vqa.answer", "vqa.grounding", "vqa.queue", "vqa.model"}
    request = by_name["request"]
    assert format(request.context.trace_id, "032x") == "a" * 32
    assert format(request.parent.span_id, "016x") == "b" * 16
    assert dict(request.attributes)["hscr.route"] == "/vqa"
    assert dict(request.attributes)["hscr.status"] == 200
    for name in set(by_name) - {"request"}:
        assert by_name[name].context.trace_id == request.context.trace_id
        assert request.start_time <= by_name[name].start_time <= by_name[name].end_time <= request.end_time + 1e9
    assert dict(by_name["vqa.answer"].attributes)["hscr.completion_tokens"] == 1
    finished = spans.get_finished_spans()
    failed = next(s for s in finished if (s.attributes or {}).get("hscr.request_id") == "req_mine")
    assert failed.attributes["hscr.problem"] == "answer_failed"
    assert any((s.attributes or {}).get("hscr.error") == "ValueError" for s in finished)
    everything = "".join(s.to_json() for s in finished)
    assert CANARY.lower() not in everything.lower()
    assert "canary" not in everything, "the failing engine's text"


def test_an_attempt_is_a_span_with_its_stages(
    settings: Settings, database: Database, new_job: Any, stand_in: Any, spans: InMemorySpanExporter
) -> None:
    stand_in(steps=2, secret=CANARY)
    job_id = new_job(meta={CANARY: CANARY})
    run_job(database, settings, job_id, lambda: False)
    finished = {s.name: s for s in spans.get_finished_spans()}
    assert {"job.attempt", "job.generating", "job.optimizing"} <= set(finished)
    attempt = finished["job.attempt"]
    assert dict(attempt.attributes) == {"hscr.job_id": job_id, "hscr.attempt": 1, "hscr.ended": "done"}
    assert finished["job.optimizing"].parent.span_id == attempt.context.span_id
    assert CANARY not in "".join(s.to_json() for s in spans.get_finished_spans())


def test_an_exception_in_a_span_keeps_its_type_only(spans: InMemorySpanExporter) -> None:
    with pytest.raises(RuntimeError), tracing.span("x", given=CANARY + " with a space", digest="sha256:ab"):
        raise RuntimeError(CANARY)
    (span,) = spans.get_finished_spans()
    assert dict(span.attributes) == {"hscr.given": "other", "hscr.digest": "sha256:ab", "hscr.error": "RuntimeError"}
    assert not span.events
    assert not span.status.description
    assert not span.status.is_ok


MISSING = """
import sys
sys.modules["opentelemetry"] = None
from service import tracing
print(tracing.start("api", "auto"), end=" ")
with tracing.span("x", n=1) as span:
    span.set(n=2)
tracing.past("y", 0.0, 1.0); tracing.flush(); tracing.stop()
"""


@pytest.mark.parametrize("endpoint", ["", "http://127.0.0.1:9"])
def test_nothing_is_traced_unasked_and_missing_packages_break_nothing(endpoint: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} if endpoint else {}
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
    assert ("hscr[trace]" in done.stderr) == bool(endpoint)
    assert tracing.wanted("off") is False
    assert tracing.wanted("on") is True


def test_spans_are_sent_to_a_collector(tmp_path: Path) -> None:
    """The real exporter against a real server, from the worker's kind of process, which sends in `flush` without a thread."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    code = (
        "import threading; from service import tracing; assert tracing.start('worker', threads=False)\n"
        "with tracing.span('job.attempt', job_id='job_1'): pass\n"
        "assert threading.active_count() == 1; tracing.flush()"
    )
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert [path for path, _ in got] == ["/v1/traces"]
    assert b"job.attempt" in got[0][1]
    assert b"hscr-worker" in got[0][1]


def metric(text: str, name: str) -> float:
    (line,) = [x for x in text.splitlines() if x.startswith(name + " ")]
    return float(line.rpartition(" ")[2])


def test_metrics_tell_of_jobs_questions_refusals_and_decoders(
    settings: Settings, database: Database, new_job: Any, stand_in: Any
) -> None:
    with TestClient(
        create_app(settings, Echo(settings)), base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        client.get("/metrics")  # from here on jobs are counted
        assert client.post("/vqa", json=body()).status_code == 200
        client.post("/vqa", files={"image": ("x", b"no image")}, data={"question": "a"})
        client.get("/nope")
        stand_in(crash_at=1, crashes=1)
        job_id = new_job()
        run_job(database, settings, job_id, lambda: False)
        text = client.get("/metrics").text
        assert metric(text, 'hscr_job_attempts_ended_total{reason="run_crashed"}') == 1
        run_job(database, settings, job_id, lambda: False)
        with database.write() as session:  # a lease that runs out
            lost = jobs.create(
                session, dataset_id=jobs.get(session, job_id).dataset_id, adapter_name="b", model="m", config={}
            ).id
            assert jobs.claim(session, lost, -1)
        with database.write() as session:
            assert jobs.reap(session, lost, 3) == "queued"
        text = client.get("/metrics").text
        assert metric(client.get("/metrics").text, 'hscr_job_attempts_ended_total{reason="lease_expired"}') == 1
    assert metric(text, 'hscr_job_entries_total{status="succeeded"}') == 1
    assert metric(text, 'hscr_job_attempts_ended_total{reason="lease_expired"}') == 1
    assert metric(text, 'hscr_jobs{status="queued"}') == 1
    assert metric(text, "hscr_jobs_oldest_queued_seconds") > 0
    assert metric(text, 'hscr_refusals_total{code="invalid_image"}') == 1
    assert metric(text, 'hscr_refusals_total{code="not_found"}') == 1
    assert metric(text, "hscr_vqa_first_token_seconds_count") == 1
    assert metric(text, "hscr_vqa_batch_size_count") == 1
    assert metric(text, "hscr_vqa_queue_oldest_seconds") == 0
    assert metric(text, "hscr_decode_orders_total") >= 2
    assert metric(text, "hscr_decode_refused_total") >= 1
    for name in ("tokens_total", "prefix_hits_total", "feature_misses_total", "adapter_evictions_total", "adapters"):
        assert metric(text, f"hscr_engine_{name}") == 0, "an echo has none"
    assert "hscr_gpu_memory_bytes{" not in text


def test_every_metric_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    metrics = Metrics()
    metrics.watch_engine(lambda: asdict(Stats()))
    metrics.watch_decoders(lambda: DecodeStats(1, 0, 0, 0, 0, 0))
    for family in metrics.registry.collect():
        assert f"`{family.name}" in page, family.name


def test_every_way_an_attempt_ends_has_a_reason_of_its_own_in_the_metrics() -> None:
    source = Path(supervise.__file__).read_text()
    named = set(re.findall(r'(?:_crash\(|hand_back\(s, self\.mine, )"(\w+)"', source))
    assert {"device_busy", "no_result"} <= named
    named |= {*supervise._HANDED_BACK.values(), room.CODE}
    assert named <= set(REASONS)
