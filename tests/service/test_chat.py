"""OpenAI's chat, driven by its stock client over a real server in front of the real engine on a tiny model (Qwen3-VL's family)."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from service.app import create_app
from service.settings import Settings
from tests.conftest import wait_for
from tests.hscr.medical import dicom
from tests.hscr.tiny import picture
from tests.service.serving import put_alias, put_version, served

QUESTION = "Where is the lesion?"


@dataclass
class Chat:
    """The service, its stock client and a plain one."""

    url: str
    state: Any
    client: OpenAI
    http: httpx.Client
    digests: list[str]
    model: str

    def ask(self, text: str = QUESTION, *images: Image.Image, **options: Any) -> Any:
        given = {"model": self.model, "max_tokens": 8, "messages": [user(text, *(images or (picture(0),)))]} | options
        return self.client.chat.completions.create(**given)

    def stream(self, **options: Any) -> list[Any]:
        return list(self.ask(stream=True, **options))


def data_url(image: Image.Image | bytes, kind: str = "image/png") -> str:
    if isinstance(image, Image.Image):
        out = io.BytesIO()
        image.save(out, "PNG")
        image = out.getvalue()
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.hscr.tiny_families import save_tiny

    return save_tiny("qwen3_vl", tmp_path_factory.mktemp("models") / "tiny-qwen")


@pytest.fixture(scope="module")
def tiny_adapters(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters strong enough to change answers."""
    import torch

    from hscr.config import OptimizationConfig
    from hscr.model import add_lora, load_model

    folders = []
    for seed in (1, 2):
        vlm = load_model(tiny_qwen, device="cpu")
        add_lora(vlm, OptimizationConfig(lora_rank=2), seed=seed)
        stream = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in vlm.model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.5, generator=stream)
        folders.append(tmp_path_factory.mktemp("adapters") / str(seed))
        vlm.model.save_pretrained(str(folders[-1]), safe_serialization=True)
    return folders


@pytest.fixture(scope="module")
def chat(
    tiny_qwen: Path, tiny_adapters: list[Path], sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chat]:
    data = tmp_path_factory.mktemp("chat")
    shutil.copy(sqlite_template, data / "hscr.db")
    settings = Settings(
        data_dir=data, database_url=f"sqlite:///{data / 'hscr.db'}", model=str(tiny_qwen), device="cpu", queue_max=4
    )
    app = create_app(settings)
    state = app.state.hscr
    digests = [put_version(state.database, data, f, "ward", n, "tiny-qwen") for n, f in enumerate(tiny_adapters, 1)]
    put_alias(state.database, "ward", "steady", 1)
    put_version(state.database, data, tiny_adapters[0], "elsewhere", 1, "another-base")
    with (
        served(app) as url,
        httpx.Client(base_url=url, timeout=30) as http,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
    ):
        wait_for(lambda: http.get("/readyz").status_code == 200, 60, "the model loads")
        yield Chat(url, state, client, http, digests, "tiny-qwen")


def vqa(chat: Chat, **options: Any) -> Any:
    image = {"base64": data_url(picture(0)).partition(",")[2]}
    answer = chat.http.post("/vqa", json={"image": image, "question": QUESTION, "max_tokens": 8} | options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_is_vqas_token_for_token(chat: Chat) -> None:
    told, asked = vqa(chat), chat.ask()
    (choice,) = asked.choices
    assert choice.message.content == told["answer"]
    assert len(told["answer"]) > 3
    assert (choice.message.role, choice.finish_reason) == ("assistant", told["finish_reason"])
    assert asked.usage.prompt_tokens == told["usage"]["prompt_tokens"]
    assert asked.usage.completion_tokens == told["usage"]["completion_tokens"]
    assert asked.usage.total_tokens == asked.usage.prompt_tokens + asked.usage.completion_tokens
    assert (asked.object, asked.model) == ("chat.completion", "tiny-qwen")
    assert asked.hscr["model"] == told["model"]
    assert (asked.hscr["adapter"], asked.hscr["grounding"]) == (None, None)
    assert asked.system_fingerprint.startswith("fp_")
    assert asked._request_id.startswith("req_")
    sampled = {"temperature": 1.5, "seed": 7}
    assert chat.ask(**sampled).choices[0].message.content == vqa(chat, **sampled)["answer"]


def test_streamed_text_is_the_answer_and_comes_in_parts(chat: Chat) -> None:
    whole = chat.ask(max_tokens=24, logprobs=True, top_logprobs=2)
    parts = chat.stream(max_tokens=24, logprobs=True, top_logprobs=2, stream_options={"include_usage": True})
    *said, end, usage = parts
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in said) == whole.choices[0].message.content
    assert len([p for p in said if p.choices[0].delta.content]) > 3
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert all(p.usage is None for p in parts[:-1])
    assert {p.id for p in parts} == {parts[0].id}
    assert {(p.model, p.system_fingerprint) for p in parts} == {("tiny-qwen", whole.system_fingerprint)}
    streamed = [t for p in said if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in whole.choices[0].logprobs.content]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in whole.choices[0].logprobs.content])


def test_nothing_on_the_way_may_keep_or_collect_a_stream(chat: Chat) -> None:
    body = {"model": "tiny-qwen", "max_tokens": 1, "messages": [user(QUESTION, picture(0))], "stream": True}
    said = chat.http.post("/v1/chat/completions", json=body)
    assert said.headers["content-type"].startswith("text/event-stream")
    assert (said.headers["cache-control"], said.headers["x-accel-buffering"]) == ("no-store", "no")
    assert said.text.endswith("\n\ndata: [DONE]\n\n")  # the stock client ends without it, others wait for it


def test_usage_is_streamed_only_where_asked_for(chat: Chat) -> None:
    assert all(p.choices and p.usage is None for p in chat.stream())


def test_logprobs_are_of_what_was_said(chat: Chat) -> None:
    answer = chat.ask(logprobs=True, top_logprobs=3).choices[0]
    tokens = answer.logprobs.content
    assert "".join(t.token for t in tokens).strip() == answer.message.content
    for token in tokens:
        assert token.logprob <= 0
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        best = [t.logprob for t in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert token.logprob == pytest.approx(best[0])  # greedy
    assert chat.ask().choices[0].logprobs is None
    assert all(t.top_logprobs == [] for t in chat.ask(logprobs=True).choices[0].logprobs.content)


def test_stop_ends_before_the_text(chat: Chat) -> None:
    whole = chat.ask(max_tokens=24).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    for given in (stop, ["never said", stop]):
        cut = chat.ask(max_tokens=24, stop=given).choices[0]
        assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)].strip(), "stop")
        parts = chat.stream(max_tokens=24, stop=given)
        assert "".join(p.choices[0].delta.content or "" for p in parts) == cut.message.content


def test_a_limit_of_tokens_counts_under_either_name(chat: Chat) -> None:
    for limit in ({"max_tokens": 3}, {"max_tokens": openai.omit, "max_completion_tokens": 3}):
        answer = chat.ask(**limit)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_seeds_repeat_and_their_absence_does_not(chat: Chat) -> None:
    def said(**options: Any) -> str:
        return chat.ask(max_tokens=16, temperature=2, **options).choices[0].message.content

    assert said(seed=3) == said(seed=3) != said(seed=4)
    assert said(seed=-(2**62)) == said(seed=-(2**62))
    assert len({said() for _ in range(4)}) > 1
    assert said(seed=3, top_p=1e-6) == chat.ask(max_tokens=16).choices[0].message.content  # only the likeliest is left


def test_several_turns_and_images_are_the_conversation(chat: Chat) -> None:
    from hscr.chat import Turn
    from hscr.model import load_model
    from tests.service.oracle import greedy

    images = [picture(0), picture(1, (40, 24))]
    messages = [
        {"role": "system", "content": "Answer in one word."},
        user(QUESTION, images[0]),
        {"role": "assistant", "content": "left", "refusal": None, "tool_calls": None, "annotations": []},
        user("And here?", images[1]),
    ]
    turns = (
        Turn("system", "Answer in one word."),
        Turn("user", QUESTION, 1),
        Turn("assistant", "left"),
        Turn("user", "And here?", 1),
    )
    answer = chat.ask(messages=messages)
    vlm = load_model(chat.state.settings.model, device="cpu")
    assert answer.choices[0].message.content == greedy(vlm, images, turns, 8)
    assert answer.choices[0].message.content != chat.ask("And here?", *images).choices[0].message.content
    renamed = [{"role": "developer", "content": "Answer in one word."}, *messages[1:]]
    assert chat.ask(messages=renamed).choices[0].message.content == answer.choices[0].message.content
    more = [*messages, answer.choices[0].message, user("Sure?")]
    assert chat.ask(messages=more).usage.prompt_tokens > answer.usage.prompt_tokens + 8


def test_adapters_answer_by_every_name(chat: Chat) -> None:
    base = chat.ask()
    first, second = (chat.ask(model=f"ward:{n}") for n in (1, 2))
    assert len({a.choices[0].message.content for a in (base, first, second)}) == 3
    assert len({a.system_fingerprint for a in (base, first, second)}) == 3
    for name, number in {"ward": 2, "ward@steady": 1, "ward:1": 1}.items():
        answer = chat.ask(model=name)
        assert answer.model == f"ward:{number}"
        assert answer.hscr["adapter"] == {"name": "ward", "version": number, "digest": chat.digests[number - 1]}
        assert answer.choices[0].message.content == (first, second)[number - 1].choices[0].message.content
        assert answer.choices[0].message.content == vqa(chat, adapter=name)["answer"]
        assert {p.model for p in chat.stream(model=name)} == {f"ward:{number}"}


def test_models_are_listed_with_root_and_parent(chat: Chat) -> None:
    listed = {m.id: m for m in chat.client.models.list()}
    assert list(listed) == ["tiny-qwen", "ward:1", "ward:2", "ward@steady"]
    assert (listed["tiny-qwen"].root, listed["tiny-qwen"].parent) == ("tiny-qwen", None)
    for name in ("ward:1", "ward@steady"):
        assert (listed[name].root, listed[name].parent, listed[name].digest) == ("ward:1", "tiny-qwen", chat.digests[0])
        assert abs(listed[name].created - time.time()) < 3600
    for name in listed:
        assert chat.client.models.retrieve(name) == listed[name]
    bare = chat.client.models.retrieve("ward")
    assert (bare.id, bare.root) == ("ward", "ward:2")
    for name in ("nobody", "ward:9", "ward@nobody", "elsewhere", "elsewhere:1", "a/b", "ward:1/x"):
        with pytest.raises(openai.NotFoundError) as refused:
            chat.client.models.retrieve(name)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_grounding_comes_as_in_vqa(chat: Chat) -> None:
    vqa(chat, grounding="tokens")  # from here on all begin behind the kept prefix, and are equal to the last bit
    told = vqa(chat, grounding="tokens")["grounding"]
    asked = chat.ask(extra_body={"grounding": "tokens"}).hscr["grounding"]
    assert asked == told
    assert len(told["tokens"]) > 3
    summary = chat.ask(extra_body={"grounding": "summary"}).hscr["grounding"]
    assert (summary["score"], summary["tokens"]) == (told["score"], None)
    streamed = [p for p in chat.stream(extra_body={"grounding": "summary"}) if p.choices[0].finish_reason]
    assert [p.hscr["grounding"] for p in streamed] == [summary]


def test_dicom_and_views_are_read_as_in_vqa(chat: Chat) -> None:
    import numpy as np

    rows = np.arange(64 * 64).reshape(64, 64)
    frames = dicom(np.stack([rows % 251, rows[::-1] % 193]).astype(np.uint16))

    def said(**view: Any) -> str:
        part = {
            "type": "image_url",
            "image_url": {"url": data_url(frames, "application/dicom"), "detail": "high"} | view,
        }
        message = {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
        return chat.ask(messages=[message], max_tokens=16).choices[0].message.content

    assert said() == said(frame=0) != said(frame=1)
    with pytest.raises(openai.UnprocessableEntityError, match="has fewer"):
        said(frame=9)


def png_message(**image_url: Any) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": data_url(picture(0))} | image_url}
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "canary"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "canary", "format": "mp3"}}, "audio"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"extra_body": {"chat_template": "canary"}}, "chat_template"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_tokens"),  # and max_tokens
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"grounding": "canary"}}, "grounding"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "canary, without an image"}]}, "messages"),
        ({"messages": [*png_message(), {"role": "assistant", "content": "left"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "canary", "tool_call_id": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "canary"}]}]}, "messages[0].content[0]"),
        ({"messages": png_message(url="http://127.0.0.1:9/canary.png")}, "messages[0].content[0].image_url.url"),
        ({"messages": png_message(url="file:///canary")}, "messages[0].content[0].image_url.url"),
        ({"messages": png_message(url="data:image/png;base64,canary!")}, "messages[0].content[0].image_url.url"),
        ({"messages": png_message(url="data:image/png,canary")}, "messages[0].content[0].image_url.url"),
        ({"messages": png_message(canary=1)}, "messages[0].content[0].image_url.canary"),
        ({"messages": png_message(frame=-1)}, "messages[0].content[0].image_url.frame"),
        ({"messages": [user("", picture(0))]}, "messages[0].content"),
        ({"messages": [user("x" * 9000, picture(0))]}, "messages[0].content[1].text"),
        ({"messages": [*png_message(), *[user("x" * 7999)] * 5]}, "messages"),
        ({"messages": [user(QUESTION, *[picture(0)] * 17)]}, "messages"),
        (
            {"messages": [{"role": "system", "content": [*png_message()[0]["content"]]}, user("x")]},
            "messages[0].content",
        ),
    ],
)
def test_what_is_not_done_here_is_refused_by_its_name(chat: Chat, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat.ask(**change)
    assert (refused.value.type, refused.value.param) == ("invalid_request_error", param)
    assert refused.value.code in ("invalid_parameter", "unsupported_parameter")
    assert "canary" not in refused.value.message
    assert f"{param}: " in refused.value.message or param == "chat_template" or "canary" in param


def test_addresses_are_never_fetched(chat: Chat) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.3)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"
        with pytest.raises(openai.BadRequestError, match="send the bytes as data:image/png;base64"):
            chat.ask(messages=png_message(url=url))
        with pytest.raises(TimeoutError):
            listening.accept()


def test_values_that_ask_for_nothing_are_taken(chat: Chat) -> None:
    plain = chat.ask().choices[0].message.content
    asked = chat.ask(
        n=1,
        user="ward-7",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tool_choice="none",
        parallel_tool_calls=True,
        service_tier="auto",
        stop=[],
        extra_body={"audio": None, "tools": None, "seed": None, "temperature": None},
    )
    assert asked.choices[0].message.content == plain


def test_images_that_are_none_and_bodies_that_are_none_are_refused_in_openais_shape(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        chat.ask(messages=png_message(url=data_url(b"canary")))
    assert (refused.value.code, refused.value.type) == ("invalid_image", "invalid_request_error")
    path = "/v1/chat/completions"
    for content in (b"{", b"[]", b'"x"', b"[" * 10**5, b"\xff"):
        answer = chat.http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_parameter")
    answers = {
        415: chat.http.post(path, content=b"x", headers={"Content-Type": "text/plain"}),
        404: chat.http.get("/v1/canary"),
        405: chat.http.delete(path),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers["x-request-id"].startswith("req_")
        assert "canary" not in answer.text
    monkeypatch.setattr(chat.state.settings, "body_max_bytes", 100)
    with pytest.raises(openai.APIStatusError) as too_large:
        chat.ask()
    assert (too_large.value.status_code, too_large.value.code) == (413, "body_too_large")


def test_unknown_models_are_not_found(chat: Chat) -> None:
    for name in ("gpt-4o", "ward:9", "elsewhere:1", "", "../canary"):
        with pytest.raises(openai.NotFoundError) as refused:
            chat.ask(model=name)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert "canary" not in refused.value.message


class Busy:
    """In the place of the engine's queue: full for so many questions, then as it was."""

    def __init__(self, real: Any, times: int, problem: Exception) -> None:
        self.real, self.times, self.problem = real, times, problem
        self.ready, self.failure, self.depth, self.full_for_s = real.ready, None, 0, None

    def submit(self, *args: Any) -> Any:
        if self.times > 0:
            self.times -= 1
            raise self.problem
        return self.real.submit(*args)


def test_the_client_waits_and_asks_again_where_it_is_told_to(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.batcher import Closed, Full
    from service.errors import Problem

    plain = chat.ask().choices[0].message.content
    limit = Problem("too_many_jobs", "canary", headers={"Retry-After": "1"})
    for problem, raised, kind in (
        (Full(1), openai.InternalServerError, "server_error"),
        (limit, openai.RateLimitError, "rate_limit_error"),
    ):
        monkeypatch.setattr(chat.state.answering, "asked", Busy(chat.state.answering.asked, 2, problem))
        with pytest.raises(raised) as refused:
            chat.ask()
        assert (refused.value.response.headers["retry-after"], refused.value.type) == ("1", kind)
        assert refused.value.request_id.startswith("req_")
        begin = time.monotonic()
        again = chat.client.with_options(max_retries=1).chat.completions.create(
            model="tiny-qwen", max_tokens=8, messages=[user(QUESTION, picture(0))]
        )
        assert again.choices[0].message.content == plain
        assert 0.9 < time.monotonic() - begin < 10
        monkeypatch.undo()
    monkeypatch.setattr(chat.state.answering, "asked", Busy(chat.state.answering.asked, 9, Closed()))
    for streamed in (False, True):
        with pytest.raises(openai.InternalServerError) as refused:
            chat.ask(stream=streamed)
        assert refused.value.status_code == 503
        assert refused.value.code == "draining"


def test_a_client_that_gives_up_takes_its_question_along(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is held, so the question waits; once its client is gone its future is cancelled."""
    from concurrent.futures import Future

    asked: list[Future[Any]] = []

    class Held(Busy):
        def submit(self, *args: Any) -> Any:
            asked.append(Future())
            return asked[-1]

    monkeypatch.setattr(chat.state.answering, "asked", Held(chat.state.answering.asked, 0, ValueError()))
    impatient = chat.client.with_options(timeout=0.4)
    for streamed in (False, True):
        with pytest.raises(openai.APITimeoutError):
            for _ in impatient.chat.completions.create(
                model="tiny-qwen", messages=[user(QUESTION, picture(0))], stream=streamed
            ):
                pass
        # It may reach the queue after its client has given up.
        wait_for(lambda streamed=streamed: len(asked) == 1 + streamed and asked[-1].cancelled(), 30, "it is dropped")


def test_a_failure_on_the_way_is_raised_by_the_stream(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import Future

    from hscr.answers import Delta

    class Breaks(Busy):
        def submit(self, item: Any, on_delta: Any = None) -> Any:
            future: Future[Any] = Future()

            def work() -> None:
                if on_delta is not None:
                    on_delta(Delta("left", [5]))
                future.set_exception(ValueError("canary"))

            threading.Timer(0.05, work).start()
            return future

    monkeypatch.setattr(chat.state.answering, "asked", Breaks(chat.state.answering.asked, 0, ValueError()))
    said: list[str] = []
    with pytest.raises(openai.APIError) as failed:
        said.extend(part.choices[0].delta.content for part in chat.ask(stream=True))
    assert said == ["", "left"]
    assert failed.value.code == "answer_failed"
    assert "canary" not in str(failed.value)
    with pytest.raises(openai.InternalServerError) as whole:
        chat.ask()
    assert (whole.value.status_code, whole.value.code) == (500, "answer_failed")


def test_many_clients_at_once_get_their_own_answers(chat: Chat) -> None:
    alone = {n: chat.ask("Which plane?", picture(n)).choices[0].message.content for n in range(4)}
    assert len(set(alone.values())) > 1
    with ThreadPoolExecutor(4) as pool:
        again = pool.map(lambda n: chat.ask("Which plane?", picture(n)).choices[0].message.content, range(4))
        assert list(again) == list(alone.values())


def test_a_family_of_one_image_and_no_system_role_says_so(
    tiny_folder_llava: Path, sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "hscr.db")
    settings = Settings(
        data_dir=tmp_path,
        database_url=f"sqlite:///{tmp_path / 'hscr.db'}",
        model=str(tiny_folder_llava),
        device="cpu",
    )
    app = create_app(settings)
    with (
        served(app) as url,
        httpx.Client(base_url=url) as http,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        wait_for(lambda: http.get("/readyz").status_code == 200, 60)

        def ask(*messages: dict[str, Any]) -> Any:
            return client.chat.completions.create(model=tiny_folder_llava.name, messages=messages, max_tokens=4)

        assert ask(user(QUESTION, picture(0)), {"role": "assistant", "content": "left"}, user("Sure?")).choices
        with pytest.raises(openai.UnprocessableEntityError, match="takes one image"):
            ask(user(QUESTION, picture(0), picture(1)))
        for messages in (
            ({"role": "system", "content": "canary"}, user(QUESTION, picture(0))),
            (user(QUESTION, picture(0)), user("canary")),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                ask(*messages)
            assert (refused.value.code, refused.value.param) == ("conversation_refused", "messages")
            assert "canary" not in refused.value.message


@pytest.fixture(scope="module")
def tiny_folder_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.hscr.tiny import save_tiny_llava

    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


def test_questions_of_a_chat_are_not_logged(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    with caplog.at_level(logging.DEBUG):
        chat.ask("canary question")
        with pytest.raises(openai.BadRequestError):
            chat.ask("canary", temperature=9)
        with pytest.raises(openai.NotFoundError):
            chat.ask("x", model="canary")
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("hscr", "sqlalchemy", "service", "uvicorn"))]
    assert ours
    assert not any("canary" in line for line in ours)


def test_the_document_describes_the_request(chat: Chat) -> None:
    body = chat.http.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]
    schema = body["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages", "stream", "grounding"} <= set(schema["properties"])
    assert json.dumps(schema)
