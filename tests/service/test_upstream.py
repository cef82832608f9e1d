"""The `openai` engine before a small server that speaks as vLLM does: the same routes, adapters by digest, grounding, its troubles."""

from __future__ import annotations

import logging
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from pydantic import SecretStr

from hscr.answers import Delta
from hscr.masking import blackened, drawn_cells
from hscr.words import spans_of, words_at
from service.app import create_app
from service.batcher import Closed, Full
from service.engine import Question
from service.errors import Problem
from service.settings import Settings
from service.upstream.engine import Upstream
from service.upstream.grounding import NO_LOGPROBS, NOT_NOW, NOT_SPELT, PERTURBATION, SIDE
from service.upstream.loras import Loras, name_of
from service.upstream.server import ModelServer
from tests.conftest import wait_for
from tests.hscr.tiny import picture
from tests.service.model_server import MODEL, Server
from tests.service.serving import put_alias, put_version, served
from tests.service.test_chat import data_url, user

QUESTION = "Where is the lesion?"


@dataclass
class Before:
    """The service, its clients, and the server behind it."""

    server: Server
    state: Any
    client: OpenAI
    http: httpx.Client
    digests: list[str]

    @property
    def engine(self) -> Upstream:
        return self.state.answering.engine

    def ask(self, text: str = QUESTION, *images: Image.Image, **options: Any) -> Any:
        given = {"model": MODEL, "max_tokens": 32, "messages": [user(text, *(images or (picture(0),)))]} | options
        return self.client.chat.completions.create(**given)

    def vqa(self, **options: Any) -> httpx.Response:
        image = {"base64": data_url(picture(0)).partition(",")[2]}
        return self.http.post("/vqa", json={"image": image, "question": QUESTION, "max_tokens": 32} | options)


def settings_for(url: str, data: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "data_dir": data,
        "database_url": f"sqlite:///{data / 'hscr.db'}",
        "engine": "openai",
        "model": MODEL,
        "upstream_url": url,
        "upstream_key": SecretStr("server-key"),
        "upstream_check_s": 0.1,
        "upstream_timeout_s": 20.0,
    }
    return Settings(**(values | changes))


def adapter_folder(folder: Path, number: int) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(f'{{"r": {number}}}')
    return folder


@pytest.fixture(scope="module")
def before(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Before]:
    data = tmp_path_factory.mktemp("upstream")
    shutil.copy(sqlite_template, data / "hscr.db")
    server = Server()
    with served(server.app()) as behind:
        app = create_app(settings_for(behind, data, upstream_adapters_max=2))
        state = app.state.hscr
        digests = [
            put_version(state.database, data, adapter_folder(data / f"a{n}", n), "ward", n, MODEL) for n in (1, 2, 3)
        ]
        put_alias(state.database, "ward", "steady", 1)
        with (
            served(app) as url,
            httpx.Client(base_url=url, timeout=30) as http,
            OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
        ):
            wait_for(lambda: http.get("/readyz").status_code == 200, 30, "the server is found")
            yield Before(server, state, client, http, digests)


@pytest.fixture(autouse=True)
def _well(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "before" in request.fixturenames:
        server = request.getfixturevalue("before").server
        server.trouble, server.pause_s, server.owner, server.prompt_logprobs = "", 0.0, "vllm", True


def test_both_routes_answer_with_what_the_server_says(before: Before) -> None:
    told = before.vqa(seed=5, temperature=0.5).json()
    sent = before.server.bodies[-1]
    assert told["answer"].startswith("The lesion (base) is 126 bright after 1 turns")
    assert (told["finish_reason"], told["adapter"]) == ("stop", None)
    assert told["model"] == {"id": MODEL, "revision": None, "digest": None}
    assert told["token_ids"] == [100 + n for n in range(told["usage"]["completion_tokens"])]
    assert (sent["model"], sent["seed"], sent["temperature"], sent["max_tokens"]) == (MODEL, 5, 0.5, 32)
    asked = before.ask()
    assert asked.choices[0].message.content == told["answer"]
    assert asked.usage.prompt_tokens == told["usage"]["prompt_tokens"] > 20
    assert asked.model == MODEL


def test_metrics_move_where_another_server_answers(before: Before) -> None:
    def told() -> dict[str, float]:
        rows = [line.rpartition(" ") for line in before.http.get("/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in rows}

    names = ("hscr_engine_questions_total", "hscr_engine_tokens_total", "hscr_vqa_first_token_seconds_count")
    first = told()
    usage = before.vqa().json()["usage"]
    second = told()
    assert [second[n] - first[n] for n in names] == [1, usage["completion_tokens"], 1]
    assert second["hscr_vqa_queue_depth"] == second["hscr_vqa_queue_oldest_seconds"] == 0


def test_streams_usage_logprobs_and_stops_pass_through(before: Before) -> None:
    whole = before.ask(logprobs=True, top_logprobs=2)
    before.server.pause_s = 0.03
    begin, first = time.monotonic(), 0.0
    parts = []
    for part in before.ask(stream=True, logprobs=True, top_logprobs=2, stream_options={"include_usage": True}):
        parts.append(part)
        first = first or (time.monotonic() - begin if part.choices and part.choices[0].delta.content else 0.0)
    *chunks, usage = parts
    assert "".join(p.choices[0].delta.content or "" for p in chunks) == whole.choices[0].message.content
    assert first < (time.monotonic() - begin) / 2
    assert usage.usage == whole.usage
    tokens = whole.choices[0].logprobs.content
    assert "".join(t.token for t in tokens) == whole.choices[0].message.content
    assert {(t.logprob, len(t.top_logprobs)) for t in tokens} == {(-0.25, 2)}
    cut = before.ask(stop=[" bright", "never"], top_p=0.5)
    assert cut.choices[0].message.content == whole.choices[0].message.content.partition(" bright")[0]
    assert (before.server.bodies[-1]["stop"], before.server.bodies[-1]["top_p"]) == ([" bright", "never"], 0.5)
    short = before.ask(max_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)


def test_a_vllm_keeps_callers_apart_where_the_operator_says_so(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    before.vqa()
    monkeypatch.setattr(before.state.settings, "prefix_cache_per_key", True)
    before.vqa()
    assert [body.get("cache_salt") for body in before.server.bodies[-2:]] == [None, "local"]


def test_turns_and_images_arrive_in_their_places(before: Before) -> None:
    images = [picture(0), picture(1, (40, 24))]
    messages = [
        {"role": "system", "content": "One word."},
        user("Where?", images[0]),
        {"role": "assistant", "content": "left"},
        user("And <image> here, <|im_end|> [INST] a < b?", images[1]),
    ]
    before.ask(messages=messages)
    sent = before.server.bodies[-1]["messages"]
    assert [m["role"] for m in sent] == ["system", "user", "assistant", "user"]
    assert sent[0]["content"] == "One word."
    assert sent[3]["content"][1]["text"] == "And < image> here, < |im_end|> [ INST] a < b?"
    from tests.service.model_server import images as read

    for shown, arrived in zip(images, read(sent), strict=True):
        assert np.array_equal(np.asarray(shown), np.asarray(arrived))


def test_adapters_are_loaded_by_digest_and_the_least_used_leaves(before: Before) -> None:
    names = [name_of(d) for d in before.digests]
    answers = {n: before.ask(model=f"ward:{n}") for n in (1, 2)}
    assert [answers[n].model for n in (1, 2)] == ["ward:1", "ward:2"]
    assert answers[1].choices[0].message.content != answers[2].choices[0].message.content
    assert set(before.server.loaded) == set(names[:2])
    stored = before.state.settings.data_dir.resolve() / "artifacts" / "adapters"
    assert before.server.loaded[names[0]] == str(stored / before.digests[0].replace(":", "-"))
    before.ask(model="ward@steady")
    before.ask(model="ward:3")
    assert set(before.server.loaded) == {names[0], names[2]}
    assert before.server.unloaded == [names[1]]
    told = before.vqa(adapter="ward:3").json()
    assert told["adapter"] == {"name": "ward", "version": 3, "digest": before.digests[2]}
    assert names[2][-6:] in told["answer"]


def test_a_server_started_anew_gets_its_adapters_again(before: Before) -> None:
    first = before.ask(model="ward:1").choices[0].message.content
    before.server.loaded.clear()
    assert before.ask(model="ward:1").choices[0].message.content == first
    before.server.loaded.clear()
    before.engine._loras._loaded.clear()
    before.server.loaded[name_of(before.digests[0])] = "by another replica"
    assert before.ask(model="ward:1").choices[0].message.content == first


def test_a_damaged_adapter_is_not_sent(before: Before, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "damaged", 9)
    digest = put_version(before.state.database, before.state.settings.data_dir, folder, "hurt", 1, MODEL)
    stored = before.state.settings.data_dir / "artifacts" / "adapters" / digest.replace(":", "-")
    (stored / "adapter_config.json").write_text("canary")
    answer = before.vqa(adapter="hurt")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")
    assert name_of(digest) not in before.server.loaded


def test_grounding_is_what_a_blackened_image_makes_less_likely(before: Before) -> None:
    """The server lets token n of the answer lose (n + 1) · the share of black pixels, so the least word is the first: 1 · share."""
    told = before.vqa(grounding="tokens").json()
    grounding = told["grounding"]
    forced = before.server.bodies[-2:]
    assert [b["prompt_logprobs"] for b in forced] == [0, 0]
    assert all(b["messages"][-1] == {"role": "assistant", "content": told["answer"]} for b in forced)
    assert all(b["continue_final_message"] and not b["add_generation_prompt"] for b in forced)
    from tests.service.model_server import dark

    # 28 pixels under 24 cells: cells are one or two pixels wide, so the share of pixels is near the ratio, not equal to it.
    shares = sorted(dark(b["messages"]) for b in forced)
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx(0.7, abs=0.05)
    assert grounding["score"] == pytest.approx(shares[1], rel=1e-6)
    assert (grounding["perturbation"], grounding["unavailable"]) == (PERTURBATION, None)
    assert "".join(t["text"] for t in grounding["tokens"]) == told["answer"]
    for n, token in enumerate(grounding["tokens"]):
        assert token["reward"] == pytest.approx(shares[1] * (n + 1), rel=1e-6)
        assert token["logprob"] == -0.5
    assert before.vqa(grounding="tokens").json()["grounding"] == grounding  # the same image, the same mask
    streamed = [p for p in before.ask(stream=True, extra_body={"grounding": "summary"}) if p.choices[0].finish_reason]
    assert streamed[0].hscr["grounding"]["score"] == pytest.approx(shares[1], rel=1e-6)
    assert before.vqa(grounding="none").json()["grounding"] is None


def test_no_threshold_holds_for_another_perturbation(before: Before) -> None:
    from service.models import AdapterVersion

    with before.state.database.write() as session:
        session.get_one(AdapterVersion, ("ward", 1)).metrics = {"adapter/grounding_threshold": 99.0}
    grounding = before.vqa(adapter="ward:1", grounding="summary", abstain=True).json()
    assert grounding["grounding"]["score"] is not None
    assert (grounding["grounding"]["threshold"], grounding["grounding"]["flagged"]) == (None, None)
    assert (grounding["abstained"], grounding["answer"] is None) == (False, False)
    assert "another server answered" in grounding["abstain_note"]


@pytest.mark.parametrize(("owner", "prompt_logprobs"), [("vllm", False), ("somebody", True)])
def test_grounding_that_cannot_be_had_is_said_and_is_no_error(
    before: Before, owner: str, prompt_logprobs: bool
) -> None:
    before.server.owner, before.server.prompt_logprobs = owner, prompt_logprobs
    wait_for(lambda: before.engine._server.vllm == (owner == "vllm"), 20)
    answer = before.vqa(grounding="tokens")
    assert answer.status_code == 200
    assert answer.json()["answer"]
    assert answer.json()["grounding"] == {
        "score": None,
        "flagged": None,
        "threshold": None,
        "tokens": None,
        "perturbation": PERTURBATION,
        "unavailable": NO_LOGPROBS,
    }
    sent = [b for b in before.server.bodies if b.get("stream")][-1]
    assert ("return_token_ids" in sent) == (owner == "vllm")
    before.server.owner = "vllm"
    wait_for(lambda: before.engine._server.vllm, 20)


def test_tokens_that_do_not_spell_the_answer_give_no_score(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.service.model_server as fake

    monkeypatch.setattr(fake, "PIECES", fake.re.compile(r"(?<=x)y|\s*\S+"))
    stock = Server._forced

    def other(self: Server, body: dict[str, Any]) -> Any:
        body["messages"][-1]["content"] = body["messages"][-1]["content"].replace("lesion", "canary")
        return stock(self, body)

    monkeypatch.setattr(Server, "_forced", other)
    assert before.vqa(grounding="summary").json()["grounding"]["unavailable"] == NOT_SPELT

    def broken(self: Server, body: dict[str, Any]) -> Any:
        raise ConnectionError

    monkeypatch.setattr(Server, "_forced", broken)
    assert before.vqa(grounding="summary").json()["grounding"]["unavailable"] == NOT_NOW


@pytest.mark.parametrize(
    ("trouble", "status", "code", "wait_s"),
    [
        ("garbage", 500, "answer_failed", None),
        ("shapes", 500, "answer_failed", None),
        ("endless", 500, "answer_failed", None),
        ("error", 500, "answer_failed", None),
        ("cut", 500, "answer_failed", None),
        ("500", 500, "answer_failed", None),
        ("400", 400, "question_refused", None),
        ("413", 400, "question_refused", None),
        ("429", 503, "overloaded", "7"),
        ("503", 503, "overloaded", "7"),
        ("502", 503, "upstream_unavailable", "5"),
        ("401", 503, "upstream_unavailable", "5"),
        ("404", 503, "upstream_unavailable", "5"),
        ("302", 503, "upstream_unavailable", "5"),
    ],
)
def test_the_servers_troubles_are_ours_to_say(
    before: Before, caplog: pytest.LogCaptureFixture, trouble: str, status: int, code: str, wait_s: str | None
) -> None:
    before.server.trouble = trouble
    with caplog.at_level(logging.INFO):
        answer = before.vqa(question="canary?")
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers.get("retry-after") == wait_s
        with pytest.raises(openai.APIStatusError) as whole:
            before.ask("canary?")
        assert (whole.value.status_code, whole.value.code) == (status, code)
        with pytest.raises(openai.APIError) as streamed:
            list(before.ask("canary?", stream=True))
        assert streamed.value.code == code
    assert "canary" not in answer.text + whole.value.message + streamed.value.message
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("hscr", "httpx"))]
    assert ours
    assert not any("canary" in line or "server-key" in line for line in ours)
    assert wait_for(lambda: before.engine._taken == 0, 20) is True


def test_a_client_that_leaves_ends_the_servers_work_too(before: Before) -> None:
    before.server.pause_s, left = 0.2, before.server.left
    impatient = before.client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model=MODEL, messages=[user(QUESTION, picture(0))])
    wait_for(lambda: before.server.running == 0 and before.server.left == left + 1, 5, "the server stops")
    stream = before.ask(stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: before.server.running == 0 and before.engine._taken == 0, 5, "the server stops")


def question(**changes: Any) -> Question:
    values: dict[str, Any] = {
        "images": (picture(0),),
        "text": QUESTION,
        "adapter_digest": None,
        "adapter_folder": None,
        "max_tokens": 8,
        "temperature": 0.0,
        "seed": 0,
        "grounding": "none",
    }
    return Question(**(values | changes))


def test_so_many_are_asked_at_once_so_many_wait_and_more_are_refused(tmp_path: Path) -> None:
    server = Server(pause_s=0.05)
    with served(server.app()) as behind:
        engine = Upstream(settings_for(behind, tmp_path, upstream_concurrency=2, queue_max=3))
        engine.start()
        wait_for(engine.ready.is_set, 20)
        assert engine.full_for_s is None
        heard: list[Delta] = []
        futures = [engine.submit(question(), heard.append if n == 0 else None) for n in range(5)]
        assert (engine.depth, engine.full_for_s is not None) == (3, True)
        wait_for(lambda: engine.oldest_s > 0, 5, "three wait for the first two")
        with pytest.raises(Full) as full:
            engine.submit(question())
        assert 1 <= full.value.retry_after_s <= 60
        assert futures[4].cancel()
        assert engine.depth == 2
        most = 0
        while not futures[3].done():
            most = max(most, server.running)
            time.sleep(0.01)
        assert most == 2
        assert len({f.result().text for f in futures[:4]}) == 1
        assert (engine.stats.questions, engine.stats.tokens, engine.oldest_s) == (4, 4 * 8, 0.0)
        assert "".join(d.text for d in heard) == futures[0].result().text
        assert len(server.bodies) == 4  # the one that left was never sent
        last = engine.submit(question())
        engine.close()
        assert last.result().text == futures[0].result().text  # what was taken is answered
        with pytest.raises(Closed):
            engine.submit(question())
        assert not engine.ready.is_set()


def test_readiness_follows_the_server(sqlite_template: Path, tmp_path: Path) -> None:
    shutil.copy(sqlite_template, tmp_path / "hscr.db")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    app = create_app(settings_for(f"http://127.0.0.1:{port}/v1", tmp_path, upstream_timeout_s=1.0))
    with served(app) as url, httpx.Client(base_url=url, timeout=10) as http:
        assert http.get("/readyz").status_code == 503
        image = {"base64": data_url(picture(0)).partition(",")[2]}
        answer = http.post("/vqa", json={"image": image, "question": QUESTION})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert (answer.json()["code"], http.get("/readyz").json()["engine"]) == ("upstream_unavailable", "away")
        assert http.get("/healthz").status_code == 200
        server = Server(pause_s=0.0)
        with served(server.app(), socket.create_server(("127.0.0.1", port))):
            wait_for(lambda: http.get("/readyz").status_code == 200, 20)
            assert http.post("/vqa", json={"image": image, "question": QUESTION}).status_code == 200
            server.trouble = "hang"
            begin = time.monotonic()
            hung = http.post("/vqa", json={"image": image, "question": QUESTION})
            assert (hung.status_code, hung.json()["code"]) == (503, "upstream_unavailable")
            assert time.monotonic() - begin < 10
            server.trouble, server.key = "", "another-key"
            wait_for(lambda: http.get("/readyz").status_code == 503, 20)
            server.key = "server-key"
            wait_for(lambda: http.get("/readyz").status_code == 200, 20)
        wait_for(lambda: http.get("/readyz").status_code == 503, 20)


def test_a_connection_that_is_reset_is_said(tmp_path: Path) -> None:
    """Every connection is closed by RST once the request is there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stop = threading.Event()

        def reset() -> None:
            listening.settimeout(0.1)
            while not stop.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                connection.settimeout(5)
                connection.recv(65536)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

        thread = threading.Thread(target=reset)
        thread.start()
        engine = Upstream(settings_for(f"http://127.0.0.1:{listening.getsockname()[1]}", tmp_path))
        engine.start()
        try:
            with pytest.raises(Problem) as failed:
                engine.submit(question()).result(10)
            assert (failed.value.code, failed.value.headers) == ("upstream_unavailable", {"Retry-After": "5"})
            assert not engine.ready.is_set()
        finally:
            engine.close()
            stop.set()
            thread.join()


def test_a_server_that_loads_no_adapters_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from hscr.artifacts import write_manifest

    folder = adapter_folder(tmp_path / "a", 1)
    digest = write_manifest(folder)
    with served(Server(lora_routes=False).app()) as behind:
        engine = Upstream(settings_for(behind, tmp_path))
        engine.start()
        wait_for(engine.ready.is_set, 20)
        with caplog.at_level(logging.ERROR), pytest.raises(Problem) as failed:
            engine.submit(question(adapter_digest=digest, adapter_folder=folder)).result(10)
        engine.close()
    assert failed.value.code == "adapter_not_loadable"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in caplog.text


def test_the_server_may_call_the_data_folder_otherwise(tmp_path: Path) -> None:
    for seen_as, expected in (("", str(tmp_path / "a" / "b")), ("/mnt/hscr/", "/mnt/hscr/a/b")):
        loras = Loras(ModelServer(settings_for("http://x", tmp_path)), tmp_path, seen_as, 1)
        assert loras._path(tmp_path / "a" / "b") == expected
        assert loras._path(Path("/elsewhere/b")) == "/elsewhere/b"


def test_many_at_once_get_their_own_answers(before: Before) -> None:
    alone = {n: before.ask(f"{n}?", picture(n)).choices[0].message.content for n in range(8)}
    with ThreadPoolExecutor(8) as pool:
        again = pool.map(lambda n: before.ask(f"{n}?", picture(n)).choices[0].message.content, range(8))
        assert list(again) == list(alone.values())
    assert len(set(alone.values())) == 8


@pytest.mark.parametrize(
    "url", ["", "vllm:8000", "ftp://x", "http://", "http://a:b@x", "http://x:99999", "http://x?k=1"]
)
def test_an_address_that_is_none_stops_the_start(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="HSCR_UPSTREAM_URL"):
        create_app(settings_for(url, tmp_path))


def test_no_proxy_of_the_environment_sees_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy, served(Server().app()) as behind:
        proxy.settimeout(0.2)
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "")
        engine = Upstream(settings_for(behind, tmp_path))
        engine.start()
        assert engine.submit(question()).result(10).text
        engine.close()
        with pytest.raises(TimeoutError):
            proxy.accept()


def test_a_mask_hides_its_share_and_depends_on_its_seed_only() -> None:
    keep = drawn_cells(SIDE, 0.7, [5, 0])
    assert keep.shape == (SIDE, SIDE)
    assert (~keep).sum() == round(0.7 * SIDE * SIDE)
    assert np.array_equal(keep, drawn_cells(SIDE, 0.7, [5, 0]))
    assert not np.array_equal(keep, drawn_cells(SIDE, 0.7, [5, 1]))
    assert drawn_cells(2, 1.0, 0).sum() == 1
    white = Image.new("RGB", (2 * SIDE, 3 * SIDE), (255, 255, 255))
    assert np.array_equal(np.asarray(blackened(white, keep))[::3, ::2, 0] == 255, keep)


@pytest.mark.parametrize(
    ("text", "pieces", "words"),
    [
        ("left lobe", ["left", " lobe"], [("left", (0,)), ("lobe", (1,))]),
        (" left lobe.", ["le", "ft", "lobe", "."], [("left", (0, 1)), ("lobe", (2,))]),  # a tokenizer that loses spaces
        ("T2-weighted", ["T", "2", "-", "weighted"], [("T2-weighted", (0, 1, 2, 3))]),
        ("é links", ["\ufffd", "\ufffd", " links"], [("é", (0, 1)), ("links", (2,))]),
        ("a a", ["a", " a"], [("a", (0,)), ("a", (1,))]),
        ("left", ["right"], None),
        ("left lobe", ["left"], None),
        ("left", ["left", " lobe"], None),
        ("the left", ["left"], None),
    ],
)
def test_words_are_found_in_tokens_decoded_one_by_one(
    text: str, pieces: list[str], words: list[tuple[str, tuple[int, ...]]] | None
) -> None:
    spans = spans_of(text, pieces)
    found = None if spans is None else [(w.text, w.tokens) for w in words_at(text, spans)]
    assert found == words
