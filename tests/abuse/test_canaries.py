"""Health data where it has no business: one unlike word in every field that a caller can fill and in every header of a file, through good
requests, refusals, failing answers and failing jobs; then a look at logs, metrics, traces, the broker, and rows of errors and events.

What stores a caller's words on purpose is named below, and nothing else may.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from sqlalchemy import select

from service.models import Base, Job
from service.queue import QUEUE, TASK, make_celery
from service.settings import Settings
from tests.abuse.rig import Rig
from tests.conftest import png, record, wait_for, zip_of
from tests.hscr.medical import dicom, nifti

WORD = "Zqxcanary"
# table.column: what a caller gave it to keep.
KEPT_ON_PURPOSE = {
    "dataset_records.record",  # the records themselves
    "dataset_records.record_id",
    "datasets.name",  # `name`; under /v1/files the name of the file
    "jobs.meta",  # `metadata`, which is the caller's own
    "idempotency_keys.response",  # the job as answered, its metadata with it
    "api_keys.name",
    "adapter_versions.notes",
    "alias_history.reason",
    "jobs.webhook",
    "webhook_deliveries.url",
}


class Canaries:
    """A new word for every place, so that a find says where it came from."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}

    def __call__(self, place: str) -> str:
        word = f"{WORD}{len(self.places):03d}x"
        self.places[word] = place
        return word

    def found(self, text: str | bytes) -> list[str]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return [place for word, place in self.places.items() if word.lower() in text.lower()]


def dataset(c: Canaries) -> bytes:
    """Good rows and bad ones, each field with a word; the DICOM files' headers carry words too."""
    rows: list[Any] = [
        record(
            0, id=c("id"), question=c("question"), answer=c("answer"), group=c("group"), image=f"images/{c('file')}.png"
        ),
        record(1, answer={"a": c("an answer that is no text")}),
        record(2, image=c("missing image"), question=c("question of a bad row")),
        record(3, **{c("unknown field"): c("unknown value")}),
        record(4, answer_type=c("answer type")),
        record(5, image="images/scan.dcm"),
        record(6, image="images/damaged.dcm"),
    ]
    named = rows[0]["image"]
    lines = "\n".join(json.dumps(r) for r in rows) + f'\n{{"id": "{c("broken JSON")}\n'
    return zip_of(
        {
            "records.jsonl": lines.encode(),
            named: png(),
            f"{c('another file')}.txt": c("a text file").encode(),
            "images/scan.dcm": dicom_of(c),
            "images/damaged.dcm": dicom_of(c)[:-60],
        }
    )


def dicom_of(c: Canaries) -> bytes:
    from pydicom import dcmread
    from pydicom.filebase import DicomBytesIO

    whole = dcmread(DicomBytesIO(dicom(np.arange(64, dtype=np.uint16).reshape(8, 8))))
    for name in (
        "PatientName",
        "PatientID",
        "InstitutionName",
        "StudyDescription",
        "ReferringPhysicianName",
        "PatientComments",
    ):
        setattr(whole, name, c(f"DICOM {name}"))
    whole.add_new(0x00091010, "LO", c("DICOM private tag"))
    whole.add_new(0x00090010, "LO", c("DICOM private creator"))
    out = DicomBytesIO()
    whole.save_as(out, enforce_file_format=False)
    return bytes(out.getvalue())


def nifti_of(c: Canaries) -> bytes:
    whole = bytearray(nifti(np.arange(64, dtype=np.uint8).reshape(4, 4, 4)))
    whole[148:228] = c("NIfTI descrip").encode().ljust(80, b"\0")  # the header's texts of NIfTI-1
    whole[228:252] = c("NIfTI aux_file").encode().ljust(24, b"\0")
    whole[328:344] = c("NIfTI intent")[:16].encode().ljust(16, b"\0")
    return bytes(whole)


def chat(system: str, text: str, image: dict[str, str]) -> dict[str, Any]:
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image['base64']}"}}
    words = [{"role": "system", "content": system}, {"role": "user", "content": [url, {"type": "text", "text": text}]}]
    return {"model": "hscr-demo", "messages": words}


def openais(rig: Rig, c: Canaries) -> list[httpx.Response]:
    """Files and fine-tuning in OpenAI's words: lines with words in every field, good and bad, and jobs that cannot be."""
    image = "data:image/png;base64," + base64.b64encode(png()).decode()
    shown = {"type": "image_url", "image_url": {"url": image}}
    lines = [
        [
            {"role": "system", "content": c("file system")},
            {
                "role": "user",
                "name": c("file name of a user"),
                "content": [{"type": "text", "text": c("file q")}, shown],
            },
            {"role": "assistant", "content": c("file a")},
        ],
        [{"role": c("file role"), "content": c("file content of no role")}],
        [
            {"role": "user", "content": c("file question without an image")},
            {"role": "assistant", "content": c("file b")},
        ],
    ]
    sent = "\n".join(json.dumps({"messages": m}) for m in lines) + f'\n{{"{c("file broken")}'
    form = {"purpose": "fine-tune"}
    made = rig.http.post("/v1/files", files={"file": (f"{c('v1 file')}.jsonl", sent.encode())}, data=form)
    assert made.status_code == 200, made.text
    job = {"training_file": made.json()["id"], "model": "hscr-demo", "method": {"type": "dpo"}}
    return [
        made,
        rig.http.post(
            "/v1/files", files={"file": (c("v1 bad"), c("v1 no zip").encode())}, data={"purpose": c("purpose")}
        ),
        rig.http.post("/v1/fine_tuning/jobs", json=job | {"suffix": c("v1 suffix") + " /"}),
        rig.http.post("/v1/fine_tuning/jobs", json=job | {"model": c("v1 model").lower()}),
        rig.http.post("/v1/fine_tuning/jobs", json=job | {"method": {"type": c("v1 method")}}),
        rig.http.get("/v1/fine_tuning/jobs", params={f"metadata[{c('v1 key')}]": c("v1 value")}),
        rig.http.get(f"/v1/fine_tuning/jobs/{c('v1 job')}/events"),
        rig.http.get(f"/v1/files/{c('v1 id')}/content"),
    ]


def speak(rig: Rig, c: Canaries) -> None:
    """Say every word at every door."""
    ask = rig.http.post
    head = {
        "User-Agent": c("user agent"),
        "Referer": c("referer"),
        "tracestate": f"a={c('tracestate')}",
        "baggage": f"a={c('baggage')}",
        "Cookie": c("cookie"),
        "Authorization": f"Bearer {c('wrong key')}",
    }
    image = {"base64": base64.b64encode(png()).decode()}
    answers = [
        ask("/vqa", json={"image": image, "question": c("asked")}, headers=head),
        ask("/vqa", json={"image": image, "question": f"engine, fail: {c('asked of a failing engine')}"}),
        ask("/vqa", json={"image": image, "question": "a", "adapter": c("adapter")}),
        ask("/vqa", json={"image": image, "question": "a", "adapter": c("missing adapter").lower()}),
        ask("/vqa", json={"image": {"base64": c("base64")}, "question": "a"}),
        ask("/vqa", json={"image": image, c("field"): c("value")}),
        ask(
            "/vqa", content=b'{"question": "' + c("broken JSON").encode(), headers={"Content-Type": "application/json"}
        ),
        ask("/vqa", content=c("other body").encode(), headers={"Content-Type": f"text/{c('content type')}"}),
        ask("/vqa", files={"image": (f"{c('file name')}.dcm", dicom_of(c))}, data={"question": c("asked of a DICOM")}),
        ask("/vqa", files={"image": (f"{c('file name')}.dcm", dicom_of(c)[:-60])}, data={"question": "a"}),
        ask("/vqa", files={"image": (f"{c('file name')}.nii", nifti_of(c))}, data={"question": "a"}),
        ask("/vqa", files={"image": (f"{c('file name')}.nii", nifti_of(c)[:360])}, data={"question": "a"}),
        ask("/v1/chat/completions", json=chat(c("chat system"), c("chat question"), image)),
        ask("/v1/chat/completions", json=chat(c("chat"), "engine, fail: " + c("chat of a failing engine"), image)),
        ask(
            "/v1/chat/completions",
            json=chat("a", "b", {"base64": c("chat image")}) | {c("chat field"): c("chat value")},
        ),
        rig.http.get(f"/v1/models/{c('chat model')}"),
        ask("/vqa", files={c("part"): ("a", b"a")}, data={c("form field"): c("form value")}),
        rig.http.get(f"/adapters/{c('path')}"),
        rig.http.get(f"/{c('no route')}/{c('no route')}"),
        rig.http.get(f"/jobs/{c('job id')}", params={c("query"): c("query value")}),
        rig.http.request("GET", "/jobs", params={"after": f"{c('cursor')} "}),
        ask(
            "/datasets",
            files={"file": (f"{c('upload name')}.zip", c("no zip").encode())},
            data={"name": c("bad name") + "/"},
        ),
        *openais(rig, c),
        ask("/adapters/x/versions", files={"file": (c("adapter file"), zip_of({f"{c('pickle')}.bin": b"x"}))}),
    ]
    made = ask("/datasets", files={"file": (f"{c('upload name')}.zip", dataset(c))}, data={"name": "canaries"})
    assert made.status_code == 201, made.text
    answers.append(made)
    celery = make_celery(Settings(redis_url=rig.valkey))
    celery.send_task(TASK, args=[c("forged job")], queue=QUEUE)
    celery.send_task(TASK, kwargs={c("forged argument"): 1}, queue=QUEUE)
    celery.send_task(c("forged task"), args=[c("argument of a forged task")], queue=QUEUE)
    with redis.Redis.from_url(rig.valkey) as client:
        client.lpush(QUEUE, c("raw bytes"), json.dumps({"body": c("a message that is none"), "properties": {}}))
    good = {"dataset": made.json()["id"], "adapter": "canaries", "metadata": {c("metadata key"): c("metadata")}}
    for told in (
        {},
        {"noise": True, "secret": c("a run's stray words")},
        {"exit": 2, "secret": c("a refusing run's words")},
        {"crash_at": 1, "crashes": 9, "secret": c("a crashing run's words")},
    ):
        rig.tell(**told)
        job = ask("/align", json=good, headers={"Idempotency-Key": c("idempotency key")})
        answers.append(job)
        wait_for(
            lambda job=job: rig.http.get(f"/jobs/{job.json()['id']}").json()["status"] in ("succeeded", "failed"), 40
        )
    rig.tell()
    answers += [
        ask("/align", json=good | {"model": c("model")}),
        ask("/align", json=good | {"webhook": f"http://{c('webhook')}.example/"}),
        ask("/align", json=good | {"preference": {c("config field"): c("config value")}}),
        ask("/align", json=good | {"optimization": {"epochs": c("config number")}}),
        ask("/align", json=good | {"parent": c("parent").lower()}),
        ask("/evaluate", json={"dataset": made.json()["id"], "adapter": c("evaluated").lower()}),
        rig.http.patch("/adapters/canaries/versions/1", json={"notes": c("notes")}),
        rig.http.patch("/adapters/canaries/versions/1", json={"tags": [c("bad tag") + " "]}),
        rig.http.put("/adapters/canaries/aliases/a", json={"version": 1, "reason": c("reason")}),
        rig.http.put(f"/adapters/canaries/aliases/{c('bad alias')}", json={"version": 1}),
    ]
    seen = {a.status_code for a in answers if isinstance(a, httpx.Response)}
    assert {200, 201, 202, 404, 415, 422, 500} <= seen, "good ones, refused ones and failed ones"


def leaks(rig: Rig, c: Canaries) -> dict[str, list[str]]:
    """Where a word is that should not be there: {place of storage: the words' origins}."""
    texts: dict[str, str | bytes] = {
        "logs": rig.log(),
        "metrics": rig.http.get("/metrics").text,
        "broker": rig.broker(),
        "traces": b"".join(rig.collector.heard),
    }
    with rig.database.read() as session:
        for table in Base.metadata.sorted_tables:
            for column in table.columns:
                if f"{table.name}.{column.name}" not in KEPT_ON_PURPOSE:
                    values = session.execute(select(column)).scalars().all()
                    texts[f"{table.name}.{column.name}"] = json.dumps(values, default=str)
    return {where: found for where, text in texts.items() if (found := c.found(text))}


@pytest.fixture(scope="module")
def spoken(rig: Rig) -> Canaries:
    c = Canaries()
    rig.start_workers()
    speak(rig, c)
    spans = (b"request", b"vqa.decode", b"vqa.answer", b"vqa.model", b"job.attempt")
    wait_for(lambda: all(s in b"".join(rig.collector.heard) for s in spans), 20, "traces of questions and jobs")
    return c


def test_no_word_of_a_caller_is_where_it_has_no_business(rig: Rig, spoken: Canaries) -> None:
    assert len(spoken.places) > 60
    assert leaks(rig, spoken) == {}


def test_the_words_were_really_said_and_are_where_they_belong(rig: Rig, spoken: Canaries) -> None:
    """Else the test above would find nothing because there is nothing."""
    with rig.database.read() as session:
        kept = {
            f"{table.name}.{column.name}"
            for table in Base.metadata.sorted_tables
            for column in table.columns
            if spoken.found(json.dumps(session.execute(select(column)).scalars().all(), default=str))
        }
    assert (
        {"dataset_records.record", "jobs.meta", "adapter_versions.notes", "alias_history.reason"}
        <= kept
        <= KEPT_ON_PURPOSE
    )
    lines = [json.loads(line) for line in rig.log().splitlines() if line.startswith("{")]
    failed = [x for x in lines if x["event"] == "the engine failed on a question"]
    assert [(x["exception"], x["request_id"][:4]) for x in failed] == [("RuntimeError", "req_")] * 2, (
        "asked at /vqa and in chat"
    )
    assert len({x["request_id"] for x in lines if x["event"] == "request"}) > 30
    assert {x["job_id"] for x in lines if x["process"] == "worker" and "job_id" in x}


def test_a_leak_is_found(rig: Rig, spoken: Canaries) -> None:
    """The same look with a word in each place that it looks at."""
    word = next(iter(spoken.places))
    with (rig.logs / "api").open("a") as log:
        log.write(f'{{"event": "question {word.upper()}", "process": "api"}}\n')
    with redis.Redis.from_url(rig.valkey) as client:
        client.lpush("canary", word)
    rig.collector.heard.append(b"\x0a\x20" + word.encode())
    with rig.database.write() as session:
        job = session.scalars(select(Job).where(Job.status == "failed").limit(1)).one()
        before, job.error_message = job.error_message, f"the run refused {word}"
        job_id = job.id
    try:
        assert set(leaks(rig, spoken)) == {"logs", "broker", "traces", "jobs.error_message"}
    finally:
        rig.collector.heard.pop()
        with redis.Redis.from_url(rig.valkey) as client:
            client.delete("canary")
        with rig.database.write() as session:
            session.get_one(Job, job_id).error_message = before
        log = rig.logs / "api"
        log.write_text("".join(x for x in log.read_text().splitlines(True) if word.upper() not in x))
