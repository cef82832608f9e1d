"""Parsers against the real server: heads and bodies that are endless, slow, deep or of a million parts; ranges; numbers beyond reason."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from service.body import _values
from service.timely import PIPELINE_MAX
from tests.abuse.rig import Rig, raw
from tests.conftest import dataset_zip, png

JSON = {"Content-Type": "application/json"}
HEAD = b"POST /align HTTP/1.1\r\nHost: 127.0.0.1\r\n"
ASK = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
FORM = {"Content-Type": "multipart/form-data; boundary=X"}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("one endless header", [HEAD + b"X-A: ", *[b"a" * 2**20] * 8]),
        ("endless headers", [HEAD, *[b"".join(b"X-%d: a\r\n" % i for i in range(20_000))] * 8]),
        ("an endless address", [b"GET /jobs?after=", *[b"a" * 2**20] * 8]),
        ("no HTTP", [b"\x16\x03\x01" + b"\0" * 1000]),
        ("a length of 5,000 digits", [HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"]),
        ("two lengths", [HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"]),
        ("a negative length", [HEAD + b"Content-Length: -5\r\n\r\n"]),
        ("no host", [b"GET /healthz HTTP/1.1\r\n\r\n"]),
        ("two hosts", [HEAD + b"Host: other.example\r\n\r\n"]),
    ],
)
def test_a_head_that_is_none_is_refused_at_once(rig: Rig, untouched: None, kind: str, parts: list[bytes]) -> None:
    begin = time.monotonic()
    answer = raw(rig.port, *parts)
    assert time.monotonic() - begin < 5
    assert answer == b"" or b" 400 " in answer.splitlines()[0], answer[:200]  # reset where it goes on sending
    assert b"Traceback" not in answer


def test_a_length_beyond_the_limit_is_refused_before_the_body_comes(rig: Rig, untouched: None) -> None:
    answer = raw(rig.port, HEAD + b"Content-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n")
    assert b" 413 " in answer.splitlines()[0]
    assert b"body_too_large" in answer


def test_clients_that_send_their_head_or_body_too_slowly_are_given_up(rig: Rig, untouched: None) -> None:
    body = HEAD + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", rig.port), 10) for _ in range(60)]
    begin = time.monotonic()
    for n, connection in enumerate(slow):
        connection.sendall([b"", b"POST /al", HEAD + b"X-A: a", body][n % 4])
    assert rig.http.get("/healthz").elapsed.total_seconds() < 2
    answers = [connection.recv(65536) for connection in slow]  # a test's own limit of 10 s holds
    assert time.monotonic() - begin < 8
    assert [a == b"" for a in answers] == [n % 4 < 3 for n in range(60)]
    for n in range(3, 60, 4):
        assert b" 408 " in answers[n].splitlines()[0]
        assert b"body_too_slow" in answers[n]
    for connection in slow:
        connection.close()


CHUNKED = HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"


@pytest.mark.parametrize(
    ("kind", "first", "piece"),
    [
        ("one endless header", HEAD + b"X-A: ", b"a" * 2**18),
        ("endless headers", HEAD, b"X-A: a\r\n" * 2**15),
        ("endless empty lines", b"", b"\r\n" * 2**17),
        ("an endless line after a body", CHUNKED + b"0\r\nX-A: ", b"a" * 2**18),
        ("endless lines after a body", CHUNKED + b"0\r\n", b"X-A: a\r\n" * 2**15),
        ("an endless remark at a chunk", CHUNKED + b"1;a=", b"a" * 2**18),
    ],
)
def test_what_makes_no_request_is_not_read_on(rig: Rig, untouched: None, kind: str, first: bytes, piece: bytes) -> None:
    sent, begin = 0, time.monotonic()
    with socket.create_connection(("127.0.0.1", rig.port), 10) as connection, suppress(ConnectionError):
        connection.sendall(first)
        while sent < 64 * 2**20:
            connection.sendall(piece)
            sent += len(piece)
    assert sent < 16 * 2**20, "more than the system itself holds back"
    assert time.monotonic() - begin < 5


def test_pipelined_requests_are_answered_in_order_and_only_so_many_wait(rig: Rig, untouched: None) -> None:
    last = b"GET /nope HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    answer = raw(rig.port, ASK * 3 + last[:20], last[20:], pause_s=0.3)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"200"] * 3 + [b"404"]
    assert raw(rig.port, ASK * 5000).count(b"HTTP/1.1") <= 1 + PIPELINE_MAX


def test_a_connection_that_lingers_behind_its_answer_is_closed(rig: Rig, untouched: None) -> None:
    """A byte now and then of a body that is refused long since, or an empty line, holds no connection."""
    for first in (b"GET /nope HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n", ASK):
        with socket.create_connection(("127.0.0.1", rig.port), 10) as connection:
            connection.sendall(first)
            begin, closed = time.monotonic(), False
            while not closed and time.monotonic() - begin < 8:
                time.sleep(0.3)
                try:
                    connection.sendall(b"\r\n")
                    connection.setblocking(False)
                    closed = not connection.recv(65536)
                except BlockingIOError:
                    pass
                except ConnectionError:
                    closed = True
                finally:
                    connection.setblocking(True)
        assert closed


@pytest.mark.parametrize(
    ("parts", "status", "allow"),
    [
        ([b"FOO /vqa"], 405, b"POST"),
        ([b"vqa-2! /datasets"], 405, b"GET, POST"),
        ([b"FOO /v1/files/x"], 405, b"DELETE, GET"),
        ([b"CONNECT /vqa"], 405, b"POST"),
        ([b"FOO /nope"], 404, None),
        ([b"P", b"ATCH /vqa"], 405, b"POST"),
        ([b"F(O /vqa"], 400, None),  # no method's name
        ([b"F" * 65 + b" /vqa"], 400, None),
    ],
)
def test_a_method_that_nobody_knows_is_told_what_is_allowed(
    rig: Rig, untouched: None, parts: list[bytes], status: int, allow: bytes | None
) -> None:
    """Its body is a body: what stands in it is no request, and the next one on the connection is answered."""
    rest = b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(ASK) + ASK
    last = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    answer = raw(rig.port, *parts[:-1], parts[-1] + rest + last, pause_s=0.2)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"%d" % status] + [b"200"] * (status != 400)
    told = re.search(rb"\r\nallow: ([^\r]*)\r\n", answer)
    assert (told and told[1]) == allow
    if status != 400:
        assert (b"application/json" if b"/v1" in parts[0] else b"application/problem+json") in answer


def drip(n: int, pause_s: float) -> Iterator[bytes]:
    for _ in range(n):
        yield b" "
        time.sleep(pause_s)


def test_a_body_that_drips_for_ever_is_given_up(rig: Rig, untouched: None, refused: Callable[..., Any]) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as other:  # meanwhile others are served
        answer = other.submit(rig.http.post, "/align", content=drip(3, 1.4), headers=JSON)
        assert rig.http.get("/jobs").status_code == 200
        refused(answer.result(), "body_too_slow")


BODIES = {
    "ten million lists": (b'{"preference":{"x":[' + b"[]," * 10_000_000 + b"[]]}}", "body_too_large"),
    "a million keys": (b"{" + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b"}", "body_too_large"),
    "depth a million": (b'{"x":' + b"[" * 1_000_000, "body_too_large"),
    "depth 50,000": (b'{"x":' + b"[" * 50_000, "invalid_request"),
    "many keys": (b"{" + b",".join(b'"k%d":1' % i for i in range(40_000)) + b"}", "invalid_request"),
    "beyond the limit": (b" " * (33 * 2**20), "body_too_large"),
    "a number of a million digits": (b'{"seed":' + b"1" * 1_000_000 + b"}", "invalid_request"),
}


@pytest.mark.parametrize("path", ["/vqa", "/align"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_small_body_cannot_become_much_memory(
    rig: Rig, untouched: None, refused: Callable[..., Any], kind: str, path: str
) -> None:
    """Without service/body.py ten million lists took 2.8 GB and stopped every other request for a minute."""
    body, code = BODIES[kind]
    answer = rig.http.post(path, content=body, headers=JSON)
    if code == "invalid_request" and answer.status_code == 400:
        refused(answer, "bad_request")
    else:
        refused(answer, code)
    assert len(answer.content) < 20_000


@pytest.mark.parametrize("body", [b"a" * 5000 + b'{"x": [1, 2]}&', b"[{,&]}" * 1000, b",", b""])
def test_bytes_of_structure_are_counted_however_many_there_are(body: bytes) -> None:
    assert _values(body) == sum(body.count(mark) for mark in (b"[", b"{", b",", b"&"))


def many_parts(n: int, size: int, file: bytes = b"") -> Iterator[bytes]:
    for i in range(n):
        yield b'--X\r\nContent-Disposition: form-data; name="a%d"%s\r\n\r\n' % (i, file) + b"a" * size + b"\r\n"
    yield b"--X--\r\n"


@pytest.mark.parametrize("path", ["/datasets", "/adapters/x/versions", "/vqa"])
def test_a_form_of_many_parts_is_refused(rig: Rig, untouched: None, refused: Callable[..., Any], path: str) -> None:
    for n, size, file in ((90, 2**20 - 1, b""), (90, 2**20 - 1, b'; filename="x"'), (5000, 1, b"")):
        if path == "/vqa":
            size = min(size, 300_000)
        answer = rig.http.post(path, content=many_parts(n, size, file), headers=FORM)
        code = answer.json()["code"]
        refused(answer, "bad_request" if code == "bad_request" else "body_too_large")


def test_odd_forms_are_refused(rig: Rig, untouched: None, refused: Callable[..., Any]) -> None:
    def endless_name() -> Iterator[bytes]:
        yield b'--X\r\nContent-Disposition: form-data; name="'
        for _ in range(30):
            yield b"a" * 2**20

    refused(rig.http.post("/datasets", content=endless_name(), headers=FORM), "bad_request")
    urlencoded = {"Content-Type": "application/x-www-form-urlencoded"}
    refused(rig.http.post("/datasets", content=b"name=" + b"a" * 30 * 2**20, headers=urlencoded), "bad_request")
    refused(rig.http.post("/datasets", content=b"a" * 33 * 2**20, headers=urlencoded), "body_too_large")
    refused(
        rig.http.post("/datasets", content=b"--\r\n", headers={"Content-Type": "multipart/form-data"}), "bad_request"
    )
    for charset in ("undefined", "idna", "utf-7", "unicode_escape", "zip"):
        part = next(many_parts(1, 3)) + b"--X--\r\n"
        odd = {"Content-Type": f"multipart/form-data; boundary=X; charset={charset}"}
        refused(rig.http.post("/vqa", content=part, headers=odd), "unsupported_media_type")


def test_a_storm_of_ranges_costs_no_more_than_the_file(rig: Rig) -> None:
    dataset = rig.http.post("/datasets", files={"file": ("x.zip", dataset_zip())}).json()["id"]
    path = f"/datasets/{dataset}/records/1/image"
    with rig.bounded(60):
        for ranges in (
            ",".join(f"{i}-{i}" for i in range(0, 100, 2)),
            ",".join(["0-"] * 5000),
            ",".join("0-1" for _ in range(8000)),
            "-".join("9" * 3000 for _ in range(2)),
            "0-0," * 6000,
        ):
            begin = time.monotonic()
            answer = rig.http.get(path, headers={"Range": f"bytes={ranges}"})
            assert answer.status_code in (200, 206, 400, 416), ranges[:20]
            assert time.monotonic() - begin < 5
            assert len(answer.content) < 20_000
    assert rig.http.get(path, headers={"Range": "bytes=0-3"}).content == png()[:4]


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e308", "1e309", "-1", "1e9", str(2**70), '"1"', "null", "[]"]
)
@pytest.mark.parametrize(
    "field",
    [
        "max_tokens",
        "temperature",
        "seed",
        "optimization.beta",
        "optimization.gamma",
        "optimization.lora_rank",
        "optimization.epochs",
        "optimization.batch_size",
        "optimization.lr",
        "deadline_s",
        "seed@align",
        *(f"{name}@chat" for name in ("max_tokens", "temperature", "top_p", "seed", "n", "top_logprobs")),
        *(f"{name}@tuning" for name in ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")),
    ],
)
def test_numbers_beyond_reason_are_refused(rig: Rig, dataset_id: str, field: str, value: str) -> None:
    """Each of them, or taken where it is a value that the field may have; never a 5xx, and no job comes of a refused one."""
    before = rig.stored()["jobs"]
    field, _, door = field.partition("@")
    if door == "chat":
        shown = {"url": "data:image/png;base64," + base64.b64encode(png()).decode()}
        content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": shown}]
        asked = json.dumps({"model": "hscr-demo", "logprobs": True, "messages": [{"role": "user", "content": content}]})
        answer = rig.http.post("/v1/chat/completions", content=f'{asked[:-1]}, "{field}": {value}}}', headers=JSON)
        fine = 200
    elif door == "tuning":
        given = f'{{"type": "dpo", "dpo": {{"hyperparameters": {{"{field}": {value}}}}}}}'
        body = f'{{"training_file": "{dataset_id}", "model": "hscr-demo", "method": {given}}}'
        answer = rig.http.post("/v1/fine_tuning/jobs", content=body, headers=JSON)
        fine = 200
    elif field in ("max_tokens", "temperature", "seed") and not door:
        image = base64.b64encode(png()).decode()
        body = f'{{"image": {{"base64": "{image}"}}, "question": "a", "{field}": {value}}}'
        answer = rig.http.post("/vqa", content=body, headers=JSON)
        fine = 200
    else:
        group, _, name = field.partition(".")
        given = f'"{group}": {{"{name}": {value}}}' if name else f'"{group}": {value}'
        body = f'{{"dataset": "{dataset_id}", "adapter": "numbers", {given}}}'
        answer = rig.http.post("/align", content=body, headers=JSON)
        fine = 202
    named = f"{field}@{door}" if door else field
    if answer.status_code == fine:
        assert (named, value) in TAKEN, "nobody has looked whether this may be taken"
        if fine == 202 or door == "tuning":
            rig.http.post(f"/jobs/{answer.json()['id']}/cancel")
        return
    assert (named, value) not in TAKEN
    told = answer.json()
    assert (answer.status_code, (told.get("error") or told)["code"]) in (
        (400, "invalid_parameter"),
        (400, "unsupported_parameter"),
        (422, "invalid_request"),
        (422, "invalid_config"),
        (400, "bad_request"),
    )
    assert len(answer.text) < 1500
    assert rig.stored()["jobs"] == before


# JSON's 1e9 is a whole number and a question may give numbers as text, as forms do; null is the default.
TAKEN = {
    ("max_tokens", '"1"'),
    ("temperature", '"1"'),
    ("seed", '"1"'),
    ("seed", "1e9"),
    ("deadline_s", "null"),
    ("seed@align", "null"),
    ("seed@chat", "-1"),
    ("seed@chat", "1e9"),
    *((f"{name}@chat", '"1"') for name in ("max_tokens", "temperature", "top_p", "seed", "top_logprobs")),
    *((f"{name}@chat", "null") for name in ("max_tokens", "temperature", "top_p", "seed", "n", "top_logprobs")),
    *((f"{name}@tuning", "null") for name in ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")),
}


@pytest.fixture(scope="module")
def dataset_id(rig: Rig) -> str:
    return str(rig.http.post("/datasets", files={"file": ("x.zip", dataset_zip(2))}).json()["id"])
