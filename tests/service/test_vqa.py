"""POST /vqa in front of an engine that only echoes: both forms of the request, references, refusals. The real engine is in tests/e2e."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from hscr.answers import Answer, TokenGrounding
from service import adapters, thresholds
from service.app import create_app
from service.decoding import decoders
from service.engine import LocalEngine, Question
from service.routes.vqa import Parameters
from service.settings import Settings
from tests.conftest import png, wait_for
from tests.hscr.medical import dicom, nifti
from worker.supervise import run_job

pytestmark = pytest.mark.either_database


class Echo(LocalEngine):
    """Answers with what it was asked; holds while the gate is shut."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[Question] = []

    def load(self) -> None:
        self.model_digest = "sha256:base"

    def answer(self, questions: list[Question]) -> list[Any]:
        self.asked += questions
        assert self.gate.wait(20)
        return [ValueError("canary") if q.text == "fail" else self._echo(q) for q in questions]

    def _echo(self, q: Question) -> Answer:
        token = TokenGrounding(text="a", logprob=-0.1, logprob_without_image=-2.1, reward=2.0, is_content=True)
        return Answer(
            text=f"{q.text}|{'+'.join(str(i.size) for i in q.images)}|{q.adapter_digest}|{q.max_tokens}|{q.seed}",
            token_ids=[1],
            tokens=[token] if q.grounding == "tokens" else None,
            score=None if q.grounding == "none" else 2.0,
            finish_reason="stop",
            prompt_tokens=3,
            completion_tokens=1,
            grounded=None if q.grounding == "none" else (time.monotonic(), time.monotonic()),
        )


@pytest.fixture
def engine(settings: Settings) -> Echo:
    return Echo(settings)


@pytest.fixture
def asker(settings: Settings, engine: Echo) -> Iterator[TestClient]:
    settings.queue_max, settings.batch_max = 2, 1
    with TestClient(create_app(settings, engine), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200, 20)
        yield client
        engine.gate.set()  # before the client's end, which waits for what the engine holds


def body(**changes: Any) -> dict[str, Any]:
    return {"image": {"base64": base64.b64encode(png()).decode()}, "question": "Where?"} | changes


def as_form(asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments that send the same as a form."""
    fields = {k: str(v).lower() if isinstance(v, bool) else v for k, v in asked.items() if k != "image"}
    return {"files": {"image": ("x.png", png())}, "data": fields}


def test_base_answers_in_both_forms(asker: TestClient) -> None:
    form = asker.post("/vqa", files={"image": ("canary.png", png())}, data={"question": "Where?", "seed": "7"})
    answer = asker.post("/vqa", json=body(seed=7))
    assert form.status_code == answer.status_code == 200
    got = answer.json()
    assert got["answer"] == form.json()["answer"] == "Where?|(8, 8)|None|64|7"
    assert got["model"] == {"id": "hscr-demo", "revision": None, "digest": "sha256:base"}
    assert (got["adapter"], got["grounding"]) == (None, None)
    assert got["usage"] == {"prompt_tokens": 3, "completion_tokens": 1}
    assert got["request_id"] == answer.headers["x-request-id"]
    assert set(got["timing_ms"]) == {"model", "total"}


def test_grounding_comes_as_asked(asker: TestClient) -> None:
    assert asker.post("/vqa", json=body(grounding="summary")).json()["grounding"] == {
        "score": 2.0,
        "flagged": None,
        "threshold": None,
        "tokens": None,
        "perturbation": "token_dropout",
        "unavailable": None,
    }
    tokens = asker.post("/vqa", json=body(grounding="tokens")).json()["grounding"]["tokens"]
    assert tokens[0] == {"text": "a", "logprob": -0.1, "logprob_without_image": -2.1, "reward": 2.0, "is_content": True}


def test_adapter_is_resolved_to_its_digest_before_it_is_asked(
    asker: TestClient,
    engine: Echo,
    database: Any,
    settings: Settings,
    new_job: Callable[..., str],
    stand_in: Callable[..., None],
) -> None:
    run_job(database, settings, new_job(), lambda: False)
    digest = asker.get("/adapters/brain/versions/1").json()["digest"]
    for reference in ("brain", "brain:1"):
        got = asker.post("/vqa", json=body(adapter=reference)).json()
        assert got["adapter"] == {"name": "brain", "version": 1, "digest": digest}
        assert digest in got["answer"]
    run_job(database, settings, new_job(model="other", adapter_name="foreign"), lambda: False)
    assert asker.post("/vqa", json=body(adapter="foreign")).json()["code"] == "adapter_for_other_model"
    assert asker.post("/vqa", json=body(adapter="none@champion")).status_code == 404


@pytest.mark.parametrize(
    ("threshold", "flagged"),
    [(2.5, True), (2.0, False), (1.5, False), (None, None)],
)
def test_an_answer_below_its_versions_threshold_is_flagged(
    asker: TestClient,
    database: Any,
    settings: Settings,
    new_job: Callable[..., str],
    stand_in: Callable[..., None],
    threshold: float | None,
    flagged: bool | None,
) -> None:
    """The engine's score is 2.0 nats; at the threshold itself an answer is not below it."""
    metrics = {"adapter/grounding_auroc": 0.75, "base/grounding_threshold": 9.0}
    if threshold is not None:
        metrics["adapter/grounding_threshold"] = threshold
    stand_in(metrics=metrics)
    job_id = new_job()
    run_job(database, settings, job_id, lambda: False)
    grounding = asker.post("/vqa", json=body(adapter="brain", grounding="summary")).json()["grounding"]
    assert (grounding["score"], grounding["threshold"], grounding["flagged"]) == (2.0, threshold, flagged)
    assert asker.get("/adapters/brain/versions/1").json()["grounding"] == {
        "auroc": 0.75,
        "threshold": threshold,
        "reason": None if threshold is not None else thresholds.UNTOLD,
        "evaluation": job_id,
    }
    assert (
        asker.post("/vqa", json=body(grounding="summary")).json()["grounding"]["flagged"] is None
    )  # the base has none
    assert asker.post("/vqa", json=body(adapter="brain")).json()["grounding"] is None


def test_a_threshold_of_another_dropout_ratio_flags_nothing(
    asker: TestClient, database: Any, settings: Settings, new_job: Callable[..., str], stand_in: Callable[..., None]
) -> None:
    stand_in(metrics={"adapter/grounding_threshold": 9.0})
    for ratio, threshold in ((0.5, None), (0.7, 9.0)):
        run_job(database, settings, new_job(config={"preference": {"dropout_ratio": ratio}}), lambda: False)
        grounding = asker.post("/vqa", json=body(adapter="brain", grounding="summary")).json()["grounding"]
        assert grounding["threshold"] == threshold
        told = asker.post("/vqa", json=body(adapter="brain", abstain=True)).json()["abstain_note"]
        assert ("dropout_ratio 0.5" in (told or "")) == (threshold is None)


def test_several_images_are_asked_in_order_in_both_forms(asker: TestClient, engine: Echo) -> None:
    engine.several_images = True
    pictures = [png(), png(200)]
    inline = [{"base64": base64.b64encode(p).decode()} for p in pictures]
    answer = asker.post("/vqa", json={"images": inline, "question": "Where?"})
    form = asker.post("/vqa", files=[("images", p) for p in pictures], data={"question": "Where?"})
    assert answer.status_code == form.status_code == 200, answer.text + form.text
    assert answer.json()["answer"] == form.json()["answer"] == "Where?|(8, 8)+(8, 8)|None|64|0"
    assert [[i.getpixel((0, 0))[0] for i in q.images] for q in engine.asked] == [[0, 200]] * 2


def test_several_images_are_refused_where_the_family_takes_one(asker: TestClient, engine: Echo) -> None:
    image = body()["image"]
    answer = asker.post("/vqa", json={"images": [image] * 2, "question": "Where?"})
    assert (answer.status_code, answer.json()["code"], engine.asked) == (422, "one_image_only", [])
    assert asker.post("/vqa", json={"images": [image], "question": "Where?"}).status_code == 200


@pytest.mark.parametrize("n", [0, 17])
def test_neither_both_nor_too_many_images_are_taken(asker: TestClient, engine: Echo, n: int) -> None:
    engine.several_images = True
    image = body()["image"]
    for request in (body(images=[image]), {"question": "Where?"}, {"images": [image] * n, "question": "Where?"}):
        answer = asker.post("/vqa", json=request)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    for parts in ([("image", png()), ("images", png())], [("image", png())] * 2, [("images", png())] * n):
        if parts:
            assert asker.post("/vqa", files=parts, data={"question": "Where?"}).status_code in (400, 422)


def test_frame_plane_slice_and_window_choose_what_is_asked_about_in_both_forms(asker: TestClient, engine: Echo) -> None:
    volume = nifti(np.arange(4 * 6 * 8, dtype=np.int16).reshape(4, 6, 8))  # sizes along right, front, up
    for plane, size in (("axial", (4, 6)), ("coronal", (4, 8)), ("sagittal", (6, 8))):
        image = {"base64": base64.b64encode(volume).decode(), "plane": plane, "slice": 1}
        answer = asker.post("/vqa", json=body(image=image))
        form = asker.post(
            "/vqa", files={"image": ("v.nii", volume)}, data={"question": "Where?", "plane": plane, "slice": "1"}
        )
        assert answer.status_code == form.status_code == 200, answer.text + form.text
        assert engine.asked[-1].images[0].size == engine.asked[-2].images[0].size == size
        assert answer.json()["images"] == form.json()["images"] == [{"format": "nifti", "modality": None, "flags": []}]
    frames = dicom(np.stack([np.zeros((4, 4)), np.full((4, 4), 100)]).astype(np.uint16), BurnedInAnnotation="YES")
    image = {"base64": base64.b64encode(frames).decode(), "frame": 1, "window": [100, 1]}
    told = asker.post("/vqa", json=body(image=image)).json()["images"]
    assert told == [{"format": "dicom", "modality": "CT", "flags": ["burned_in_annotation"]}]
    assert engine.asked[-1].images[0].getpixel((0, 0)) == (127, 127, 127)  # a window's centre is its middle grey
    asker.post("/vqa", json=body(image=image | {"frame": 0}))
    assert engine.asked[-1].images[0].getpixel((0, 0)) == (0, 0, 0)
    for window in ("100,1", "[100, 1]", " [100,1] "):
        data = {"question": "Where?", "frame": "1", "window": window}
        assert asker.post("/vqa", files={"image": ("f.dcm", frames)}, data=data).status_code == 200
        assert engine.asked[-1].images[0].getpixel((0, 0)) == (127, 127, 127)
    data = {"question": "Where?", "plane": "axial", "slice": "8"}
    beyond = asker.post("/vqa", files={"image": ("v.nii", volume)}, data=data)
    assert beyond.json()["detail"] == "slice: the volume has fewer in this plane, 8 of them, numbered from 0."


@pytest.mark.parametrize(
    "view",
    [{"plane": "axial"}, {"frame": 1}, {"window": [1.0, 0.0]}, {"slice": -1}, {"plane": "canary"}, {"frame": 10**9}],
)
def test_a_view_that_the_image_has_not_is_refused(asker: TestClient, view: dict[str, Any]) -> None:
    answer = asker.post("/vqa", json=body(image=body()["image"] | view))
    assert (answer.status_code, answer.json()["code"]) in ((422, "invalid_image"), (422, "invalid_request"))
    assert "canary" not in answer.text


def test_busy_decoders_are_a_503_to_be_asked_again(asker: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from service import decoding

    def busy(*args: Any) -> Any:
        raise decoding.DecodersBusy

    monkeypatch.setattr(decoding.Decoders, "decode", busy)
    answer = asker.post("/vqa", json=body())
    assert (answer.status_code, answer.json()["code"]) == (503, "decoders_busy")
    assert int(answer.headers["retry-after"]) > 0


def test_the_first_question_finds_a_decoder_that_has_started(settings: Settings, engine: Echo) -> None:
    settings.decode_max_s = 19.0  # a pool of its own: those of other tests are warm
    with TestClient(create_app(settings, engine), base_url="http://127.0.0.1"):
        started = decoders(settings)._free.queue[-1]
        assert started is not None
        assert started.process.poll() is None
    decoders(settings).close()


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"question": ""}, 422, "invalid_request"),
        ({"question": "  "}, 422, "invalid_request"),
        ({"question": "x" * 9000}, 422, "invalid_request"),
        ({"max_tokens": 0}, 422, "invalid_request"),
        ({"max_tokens": 10**9}, 422, "invalid_request"),
        ({"temperature": -1}, 422, "invalid_request"),
        ({"temperature": 1e308}, 422, "invalid_request"),
        ({"grounding": "all"}, 422, "invalid_request"),
        ({"chat_template": "canary"}, 422, "invalid_request"),
        ({"image": {"url": "http://127.0.0.1/canary"}}, 422, "invalid_request"),
        ({"image": {"base64": "canary!"}}, 422, "invalid_image"),
        ({"image": {"base64": base64.b64encode(b"canary").decode()}}, 422, "invalid_image"),
        ({"image": {"base64": base64.b64encode(png()[:50]).decode()}}, 422, "invalid_image"),
        ({"question": "fail"}, 500, "answer_failed"),
    ],
)
def test_refusals_say_nothing_of_the_content(asker: TestClient, change: dict[str, Any], status: int, code: str) -> None:
    answer = asker.post("/vqa", json=body(**change))
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "canary" not in answer.text


def test_other_bodies_are_refused(asker: TestClient) -> None:
    assert asker.post("/vqa", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    assert asker.post("/vqa", content=b"{", headers={"Content-Type": "application/json"}).status_code == 422
    assert asker.post("/vqa", content=b"[" * 10**5, headers={"Content-Type": "application/json"}).status_code == 422
    assert asker.post("/vqa", data={"question": "Where?"}, files={"other": b"x"}).status_code in (400, 422)
    assert (
        asker.post("/vqa", files={"image": png()}, data={"question": "Where?", "temperature": "nan"}).status_code == 422
    )


def test_too_many_questions_are_refused_at_once(asker: TestClient, engine: Echo) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(asker.post, "/vqa", json=body())]
        wait_for(lambda: engine.asked, 20, "the engine works on the first")
        waiting += [pool.submit(asker.post, "/vqa", json=body()) for _ in range(2)]
        wait_for(lambda: asker.app.state.hscr.answering.asked.depth == 2, 20, "two wait")  # type: ignore[attr-defined]
        refused = asker.post("/vqa", json=body())
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        told = asker.get("/metrics").text
        assert "hscr_vqa_refused_total 1.0" in told
        assert "hscr_vqa_queue_depth 2.0" in told
        assert "hscr_vqa_queue_oldest_seconds 0.0\n" not in told
        engine.gate.set()
        assert [w.result().status_code for w in waiting] == [200, 200, 200]


def test_model_that_cannot_be_loaded_is_said_and_readiness_is_down(settings: Settings) -> None:
    class Broken(Echo):
        def load(self) -> None:
            raise OSError("canary")

    with TestClient(create_app(settings, Broken(settings)), base_url="http://127.0.0.1") as client:
        wait_for(lambda: client.get("/readyz").json()["engine"] == "failed", 20)
        assert client.get("/readyz").json()["engine_failure"] == "OSError; the log says where"
        answer = client.post("/vqa", json=body())
        assert (answer.status_code, answer.json()["code"]) == (503, "engine_unavailable")
        assert "canary" not in answer.text


def test_why_a_model_cannot_be_loaded_is_told_without_its_folder_and_logged_with_it(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    away = settings.model_copy(update={"model": "/canary/models/llava"})

    class Broken(Echo):
        def load(self) -> None:
            raise ValueError("model '/canary/models/llava': no config.json there, see /canary/hub/x.json")

    with TestClient(create_app(away, Broken(away)), base_url="http://127.0.0.1") as client:
        wait_for(lambda: client.get("/readyz").json()["engine"] == "failed", 20)
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["engine_failure"] == "model 'llava': no config.json there, see x.json"
        assert client.get("/v1/models").json()["data"][0]["id"] == "llava"
    (logged,) = [r for r in caplog.records if r.getMessage() == "the model could not be loaded"]
    assert getattr(logged, "reason", "").startswith("model '/canary/models/llava': no config.json")


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("", "hscr-demo"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("gpt2", "gpt2"),
        ("/canary/llava", "llava"),
        ("/canary/llava/", "llava"),
        ("../llava", "llava"),
        ("~/llava", "llava"),
        ("canary/models/llava", "llava"),
    ],
)
def test_a_models_name_is_no_path_whether_its_folder_is_there_or_not(model: str, shown: str) -> None:
    settings = Settings(model=model)
    assert settings.model_id == shown
    assert settings.shown(f"model {settings.model_path!r}: is odd") == f"model {shown!r}: is odd"


def test_questions_and_file_names_are_not_logged(asker: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    with caplog.at_level(logging.DEBUG):
        asker.post("/vqa", json=body(question="canary question"))
        asker.post("/vqa", files={"image": ("canary.png", png())}, data={"question": "canary"})
        asker.post("/vqa", json=body(question="canary", temperature=-1))
        asker.post("/vqa", json=body(question="fail", adapter="canary"))
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("hscr", "sqlalchemy", "service"))]
    assert ours
    assert not any("canary" in line for line in ours)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events as (name, data)."""
    parts = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


@pytest.fixture
def versions(
    database: Any, settings: Settings, new_job: Callable[..., str], stand_in: Callable[..., None]
) -> dict[str, str]:
    """Two versions of `brain`, the first with a threshold above the engine's score of 2.0 nats; their digests."""
    digests = {}
    few = {"adapter/grounding_calibration/n": 55.0, "adapter/grounding_calibration/n_wrong": 15.0}
    for steps, (number, metrics) in enumerate((("brain:1", {"adapter/grounding_threshold": 9.0}), ("brain:2", few)), 1):
        stand_in(metrics=metrics, steps=steps)  # other weights
        run_job(database, settings, new_job(), lambda: False)
        with database.read() as session:
            digests[number] = adapters.resolve(session, number).digest
    return digests


@pytest.mark.parametrize("grounding", ["none", "summary", "tokens"])
def test_a_flagged_answer_is_withheld_and_nothing_of_it_is_told(
    asker: TestClient, engine: Echo, versions: dict[str, str], grounding: str
) -> None:
    asked = body(question="canary", adapter="brain:1", abstain=True, grounding=grounding)
    for answer in (asker.post("/vqa", json=asked), asker.post("/vqa", **as_form(asked))):
        got = answer.json()
        assert (got["answer"], got["abstained"], got["token_ids"]) == (None, True, [])
        assert got["abstain_note"] == "The grounding score is below the threshold of this version."
        told = [got["grounding"][name] for name in ("score", "flagged", "threshold", "tokens")]
        assert told == [2.0, True, 9.0, None]
        assert "canary" not in answer.text
    given = asker.post("/vqa", json=asked | {"abstain": False}).json()
    assert (given["answer"].split("|")[0], given["abstained"], given["abstain_note"]) == ("canary", None, None)


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (None, "a threshold belongs to a version, and the base answered."),
        ("brain:2", "the calibration part has 15 wrong and 40 right answers; 20 of each are needed."),
    ],
)
def test_without_a_threshold_nothing_is_withheld_and_it_is_said(
    asker: TestClient, versions: dict[str, str], adapter: str | None, why: str
) -> None:
    got = asker.post("/vqa", json=body(adapter=adapter, abstain=True)).json()
    assert got["answer"].startswith("Where?")
    assert (got["abstained"], got["grounding"]["flagged"]) == (False, None)
    assert got["abstain_note"] == f"No threshold is known here, so nothing can be withheld: {why}"


def test_two_versions_answer_in_one_call_with_one_picture(
    asker: TestClient, engine: Echo, versions: dict[str, str]
) -> None:
    asked = body(adapter="brain:1", compare="brain:2", grounding="summary", abstain=True)
    for request in ({"json": asked}, as_form(asked)):
        got = asker.post("/vqa", **request).json()
        assert (got["adapter"]["version"], got["answer"], got["abstained"]) == (1, None, True)
        other = got["compare"]
        assert (other["adapter"]["version"], other["adapter"]["digest"]) == (2, versions["brain:2"])
        assert versions["brain:2"] in other["answer"]
        assert (other["grounding"]["score"], other["abstained"]) == (2.0, False)
        first, second = engine.asked[-2:]
        assert first.images[0] is second.images[0]  # decoded once; its features are found by its pixels
    assert asker.post("/vqa", json=body(compare="brain:1")).json()["adapter"] is None  # the base beside a version
    assert asker.post("/vqa", json=body()).json()["compare"] is None
    assert asker.post("/vqa", json=body(compare="nobody")).json()["code"] == "adapter_not_found"
    failed = asker.post("/vqa", json=body(question="fail", compare="brain:1"))
    assert (failed.status_code, failed.json()["code"]) == (500, "answer_failed")


def test_a_comparison_that_finds_no_room_leaves_nothing_behind(
    asker: TestClient, engine: Echo, versions: dict[str, str]
) -> None:
    """Two places wait, one is taken: the second question of a comparison is refused, and its first goes too."""
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(asker.post, "/vqa", json=body())
        wait_for(lambda: engine.asked, 20, "the engine works on the first")
        waiting = pool.submit(asker.post, "/vqa", json=body())
        batcher = asker.app.state.hscr.answering.asked  # type: ignore[attr-defined]
        wait_for(lambda: batcher.depth == 1, 20, "one waits")
        for stream in (False, True):
            refused = asker.post("/vqa", json=body(compare="brain:1", stream=stream))
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            wait_for(lambda: batcher.depth == 1, 20, "its first is gone")
        engine.gate.set()
        assert [w.result().status_code for w in (running, waiting)] == [200, 200]


def test_a_stream_ends_with_the_whole_response(asker: TestClient, versions: dict[str, str]) -> None:
    plain = asker.post("/vqa", json=body(adapter="brain:1", compare="brain:2", grounding="tokens")).json()
    asked = body(adapter="brain:1", compare="brain:2", grounding="tokens", stream=True)
    for request in ({"json": asked}, as_form(asked)):
        answer = asker.post("/vqa", **request)
        assert answer.headers["content-type"].startswith("text/event-stream")
        *deltas, (name, whole) = events_of(answer.text)
        assert (name, {n for n, _ in deltas}) == ("answer", {"delta"})
        assert "".join(d["text"] for _, d in deltas) == whole["answer"]
        assert whole["request_id"] == answer.headers["x-request-id"]
        for got in (plain, whole):
            got.pop("timing_ms", None)
            got.pop("request_id", None)
        assert whole == plain


def test_what_fails_in_a_stream_is_its_last_event(asker: TestClient) -> None:
    answer = asker.post("/vqa", json=body(question="fail", stream=True))
    ((name, problem),) = events_of(answer.text)
    assert (answer.status_code, name, problem["code"]) == (200, "error", "answer_failed")
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert "canary" not in answer.text


def test_a_stream_cannot_abstain(asker: TestClient, engine: Echo) -> None:
    for request in ({"json": body(stream=True, abstain=True)}, as_form(body(stream=True, abstain=True))):
        answer = asker.post("/vqa", **request)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        (told,) = answer.json()["errors"]
        assert told["field"] == "stream"
        assert told["reason"].startswith("does not go together with abstain")
    assert engine.asked == []


def test_a_key_has_its_own_limit_of_questions(asker: TestClient, engine: Echo, settings: Settings) -> None:
    settings.key_questions_max = 2
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(asker.post, "/vqa", json=body()) for _ in range(2)]
        state = asker.app.state.hscr  # type: ignore[attr-defined]
        wait_for(lambda: state.asked["local"] == 2, 20, "both are on their way")
        refused = asker.post("/vqa", json=body())
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_questions")
        assert int(refused.headers["retry-after"]) >= 1
        unread = asker.post("/vqa", content=b"no form at all", headers={"Content-Type": "text/plain"})
        assert unread.status_code == 429, "refused before anything of it is read or decoded"
        engine.gate.set()
        assert [w.result().status_code for w in waiting] == [200, 200]
    assert asker.post("/vqa", json=body()).status_code == 200
    assert not state.asked


def test_callers_share_no_prefix_where_the_operator_says_so(
    asker: TestClient, engine: Echo, settings: Settings
) -> None:
    asker.post("/vqa", json=body())
    settings.prefix_cache_per_key = True
    asker.post("/vqa", json=body())
    assert [q.salt for q in engine.asked] == ["", "local"]


def test_every_field_of_both_forms_is_in_the_document(asker: TestClient) -> None:
    document = asker.get("/openapi.json").json()
    operation = document["paths"]["/vqa"]["post"]
    for kind in ("application/json", "multipart/form-data"):
        fields = operation["requestBody"]["content"][kind]["schema"]["properties"]
        assert set(Parameters.model_fields) <= set(fields)
    answered = operation["responses"]["200"]["content"]
    assert set(answered) == {"application/json", "text/event-stream"}
    assert {"compare", "abstained", "abstain_note"} <= set(
        document["components"]["schemas"]["VQAResponse"]["properties"]
    )
