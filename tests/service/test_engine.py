"""The local engine before a batcher, on a tiny model: adapters in and out by their bytes, failures, streams, who leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hscr.answer import Answerer, AnswerRequest
from hscr.answers import Delta
from hscr.artifacts import write_manifest
from hscr.model import load_model
from service.batcher import Batcher
from service.engine import AdapterDamaged, LocalEngine, Question
from service.settings import Settings
from tests.conftest import wait_for
from tests.hscr.test_running import save_adapter
from tests.hscr.tiny import picture, save_tiny_llava

WHERE = Question((picture(0),), "Where is the lesion?", None, None, 6, 0.0, 0, "none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
def versions(model: Path) -> dict[str, Path]:
    """Three adapters by digest."""
    folders = [save_adapter(model, model.parent / str(seed), seed) for seed in (1, 2, 3)]
    return {write_manifest(folder): folder for folder in folders}


@pytest.fixture
def plain(model: Path, versions: dict[str, Path]) -> Callable[[Question], str]:
    """What the one-request route answers."""
    answerer = Answerer(load_model(model, device="cpu"))
    for digest, folder in versions.items():
        answerer.load_adapter(digest, folder)

    def text(q: Question) -> str:
        return answerer.answer([AnswerRequest(q.images, q.text, q.adapter_digest, q.max_tokens)])[0].text

    return text


@pytest.fixture
def settings(model: Path) -> Settings:
    return Settings(model=str(model), device="cpu", feature_cache="off", window_s=0)  # type: ignore[call-arg]


@pytest.fixture
def start(settings: Settings) -> Iterator[Callable[[], tuple[LocalEngine, Batcher[Question, Any]]]]:
    made: list[Batcher[Question, Any]] = []

    def begin() -> tuple[LocalEngine, Batcher[Question, Any]]:
        engine = LocalEngine(settings)
        made.append(Batcher(engine, batch_max=8, window_s=0.02, queue_max=64, tokens_max=4096, setup=engine.load))
        made[-1].start()
        assert made[-1].ready.wait(60)
        return engine, made[-1]

    yield begin
    for batcher in made:
        batcher.close()


def ask(digest: str | None, versions: dict[str, Path], **changes: Any) -> Question:
    return replace(WHERE, adapter_digest=digest, adapter_folder=versions[digest] if digest else None, **changes)


@pytest.mark.parametrize("scheduling", ["continuous", "static"])
def test_mixed_questions_are_answered_as_alone(
    start: Any, settings: Settings, versions: dict[str, Path], plain: Callable[[Question], str], scheduling: str
) -> None:
    settings.scheduling = scheduling  # type: ignore[assignment]
    engine, batcher = start()
    assert engine.joins == (scheduling == "continuous")
    questions = [
        ask(digest, versions, images=(picture(i % 3),), max_tokens=2 + i)
        for i, digest in enumerate([None, *versions, None, *versions])
    ]
    futures = [batcher.submit(q) for q in questions]
    assert [f.result(60).text for f in futures] == [plain(q) for q in questions]
    assert engine.stats.questions == 8
    assert engine.stats.tokens == sum(f.result().completion_tokens for f in futures)
    assert engine.stats.prefix_hits + engine.stats.prefix_misses >= 8


def test_adapters_leave_by_their_bytes_and_come_back(
    start: Any, settings: Settings, versions: dict[str, Path], plain: Callable[[Question], str]
) -> None:
    engine, batcher = start()
    first, second, third = versions
    batcher.submit(ask(first, versions)).result(60)
    one = engine.stats.adapter_bytes
    assert one > 0
    settings.adapters_max_bytes = 2 * one
    for digest in (second, first, third):
        assert batcher.submit(ask(digest, versions)).result(60).text == plain(ask(digest, versions))
    assert list(engine._loaded) == [first, third]  # the second was unused for longest
    assert engine.stats.adapter_bytes == 2 * one
    settings.adapters_max_bytes = 0
    for digest in (*versions, None):
        assert batcher.submit(ask(digest, versions)).result(60).text == plain(ask(digest, versions))
    assert len(engine._loaded) == 1
    assert (engine.stats.adapter_loads, engine.stats.adapter_evictions) == (5, 4)


def test_adapters_come_again_after_the_engine_was_away(
    start: Any, versions: dict[str, Path], plain: Callable[[Question], str]
) -> None:
    engine, batcher = start()
    question = ask(next(iter(versions)), versions)
    batcher.submit(question).result(60)
    engine.unload()  # nothing runs: the batcher's thread waits
    engine.load()
    assert batcher.submit(question).result(60).text == plain(question)


def test_an_adapter_that_answers_is_not_taken_away(
    start: Any, settings: Settings, versions: dict[str, Path], plain: Callable[[Question], str]
) -> None:
    """One byte of room: another version comes in while the first is in the middle of its answer."""
    settings.adapters_max_bytes = 1
    engine, batcher = start()
    first, second, _ = versions
    said, go = threading.Event(), threading.Event()

    def hold(delta: Delta) -> None:
        said.set()
        assert go.wait(30)

    long = ask(first, versions, max_tokens=40)
    slow = batcher.submit(long, hold)
    assert said.wait(30)
    quick = batcher.submit(ask(second, versions, max_tokens=2))
    go.set()
    assert quick.result(60).text == plain(ask(second, versions, max_tokens=2))
    assert not slow.done()
    assert list(engine._loaded) == [first, second]
    assert slow.result(60).text == plain(long)


@pytest.mark.parametrize("scheduling", ["continuous", "static"])
def test_a_damaged_adapter_fails_its_own_question_only(
    start: Any,
    settings: Settings,
    versions: dict[str, Path],
    plain: Callable[[Question], str],
    tmp_path: Path,
    scheduling: str,
) -> None:
    settings.scheduling = scheduling  # type: ignore[assignment]
    _, batcher = start()
    first = next(iter(versions))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"other")
    good, bad = (
        batcher.submit(ask(None, versions)),
        batcher.submit(replace(ask(first, versions), adapter_folder=tmp_path)),
    )
    with pytest.raises(AdapterDamaged):
        bad.result(60)
    swapped = replace(ask(first, versions), adapter_folder=[*versions.values()][1])  # whole, but another one
    with pytest.raises(AdapterDamaged):
        batcher.submit(swapped).result(60)
    assert good.result(60).text == plain(WHERE)
    assert batcher.submit(ask(first, versions)).result(60).text == plain(ask(first, versions))


@pytest.mark.parametrize("scheduling", ["continuous", "static"])
def test_a_question_the_model_cannot_take_fails_alone(
    start: Any, settings: Settings, plain: Callable[[Question], str], scheduling: str
) -> None:
    settings.scheduling = scheduling  # type: ignore[assignment]
    _, batcher = start()
    two = replace(WHERE, images=(picture(0), picture(1)))  # LLaVA takes one image
    good, bad, also = (batcher.submit(q) for q in (WHERE, two, WHERE))
    with pytest.raises(ValueError, match="images"):
        bad.result(60)
    assert good.result(60).text == also.result(60).text == plain(WHERE)


def test_after_an_exception_in_a_mixed_step_the_base_is_the_base(
    start: Any, versions: dict[str, Path], plain: Callable[[Question], str]
) -> None:
    engine, batcher = start()
    mix = [ask(digest, versions, max_tokens=30) for digest in (None, *versions)]
    broken = threading.Event()

    def fail(*args: Any) -> None:
        if broken.is_set():
            broken.clear()
            raise RuntimeError("in a layer")

    layer = engine._answerer.vlm.base.model.language_model.layers[1].mlp.act_fn  # type: ignore[union-attr]
    hook = layer.register_forward_pre_hook(fail)
    futures = [batcher.submit(q, (lambda delta: broken.set()) if q is mix[-1] else None) for q in mix]
    failures = [type(f.exception(60)) for f in futures]
    assert RuntimeError in failures
    hook.remove()
    for q in (WHERE, *(ask(digest, versions) for digest in versions)):
        assert batcher.submit(q).result(60).text == plain(q)


@pytest.mark.parametrize("stop", [(), ("|",)])
def test_deltas_join_to_the_answer(start: Any, plain: Callable[[Question], str], stop: tuple[str, ...]) -> None:
    _, batcher = start()
    heard: list[Delta] = []
    question = replace(WHERE, max_tokens=30, logprobs=2, stop=stop)
    answer = batcher.submit(question, heard.append).result(60)
    whole = plain(replace(question, stop=()))
    assert "|" in whole
    assert answer.text == (whole.split("|")[0].strip() if stop else whole)
    assert answer.finish_reason == ("stop" if stop else "length")
    assert "".join(d.text for d in heard) == answer.text
    assert [t for d in heard for t in d.token_ids] == answer.token_ids
    assert [t for d in heard for t in d.logprobs or []] == answer.logprobs
    assert len(answer.logprobs) == len(answer.token_ids)
    assert all(len(t.top) == 2 and t.logprob <= t.top[0][1] for t in answer.logprobs)
    assert stop or len(heard) > 1
    assert not stop or len(answer.token_ids) < answer.completion_tokens


def test_who_leaves_is_answered_no_further(start: Any, plain: Callable[[Question], str]) -> None:
    engine, batcher = start()
    said = threading.Event()
    gone = batcher.submit(replace(WHERE, max_tokens=1000), lambda delta: said.set())
    assert said.wait(30)
    stays = batcher.submit(replace(WHERE, max_tokens=12))
    assert gone.cancel()
    assert stays.result(60).text == plain(replace(WHERE, max_tokens=12))
    wait_for(lambda: not engine._entries and not len(engine._batch), 10)  # type: ignore[arg-type]
    assert engine.stats.questions == 1
