"""Decode steps of fixed shape: the plain steps' tokens whatever the shapes, the faster kind kept, and plain steps after any failure."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hscr.static_steps
from hscr.answer import Answerer, AnswerRequest
from hscr.decode import decode
from hscr.model import VLM, encode_answer, encode_prompts
from hscr.plain_decoder import PlainDecoder
from hscr.prefix import GrowingLayer, empty_cache
from hscr.static_steps import StaticStep, StaticSteps, captured_events, rounded_rows
from hscr.trees import Prefixes
from hscr.visual_tokens import Prompt, dropped
from tests.hscr.test_running import save_adapter
from tests.hscr.tiny import picture

QUESTIONS = ["Where is the lesion?", "Which plane?", "Is there a lesion in the left frontal lobe? yes no", "what"]
Rows = list[tuple[Prompt, list[int], int, float, int]]


class Captured:
    """In a graph's place: the work itself, counted. A replay takes `seconds` of `clock`."""

    def __init__(self, seconds: float = 0.0, fails_at: int = -1) -> None:
        self.seconds, self.fails_at, self.shapes, self.replays, self.clock = seconds, fails_at, 0, 0, 0.0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.shapes += 1
        compute()  # as a capture warms up

        def replay() -> Tensor:
            self.replays += 1
            if self.replays == self.fails_at:
                raise torch.OutOfMemoryError("no memory\nfor a graph")
            self.clock += self.seconds
            return compute()

        return replay


def rows_of(vlm: VLM, seed: int, n: int) -> Rows:
    """Prompts whole and cut, several continuations of some, other limits, greedy and sampled."""
    rng = random.Random(seed)
    prompts = encode_prompts(vlm, [picture(i) for i in range(4)], QUESTIONS)
    tail = encode_answer(vlm, QUESTIONS[0], "There is a large lesion in the left lobe.")[:-1]
    pool = prompts + [dropped(p, 0.7, i, 0) for i, p in enumerate(prompts)]
    return [
        (rng.choice(pool), tail[: rng.randint(0, 8)], rng.randint(1, 12), rng.choice([0.0, 0.0, 1.0]), rng.randrange(9))
        for _ in range(n)
    ]


def said(vlm: VLM, rows: Rows) -> list[list[int]]:
    prompts, tails, limits, heats, seeds = (list(column) for column in zip(*rows, strict=True))
    return decode(
        vlm, prompts, tails, max_tokens=limits, temperature=heats, seeds=seeds, known=Prefixes()
    )  # known: by trees


def test_trees_and_rows_of_any_shape_say_the_same(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches one after another over one memory; buffers of few columns, so that batches outgrow them."""
    monkeypatch.setattr(hscr.static_steps, "COLUMNS", 16)
    monkeypatch.setattr(hscr.static_steps, "ROOM", 4)
    batches = [rows_of(vlm, seed, n) for seed, n in enumerate((1, 9, 4, 7))]
    plain = [said(vlm, rows) for rows in batches]
    capture = Captured()
    vlm.static_steps = StaticSteps(capture, samples=0)
    assert [said(vlm, rows) for rows in batches] == plain
    assert vlm.static_steps.off is None
    assert capture.replays > 30
    assert capture.shapes > 4
    assert len({tuple(ids) for own in plain for ids in own}) > 12


def test_a_shape_is_captured_once_whatever_batches_come(vlm: VLM) -> None:
    """And whatever the last one left in the memory: an answer that overflowed must not reach another."""
    capture = Captured()
    vlm.static_steps = StaticSteps(capture, samples=0)
    first = said(vlm, rows_of(vlm, 1, 3))
    shapes = capture.shapes
    for keys, values in vlm.static_steps._memory:
        keys.fill_(torch.nan), values.fill_(torch.nan)
    assert said(vlm, rows_of(vlm, 1, 3)) == first
    assert capture.shapes == shapes


def test_steps_move_with_the_memory_when_it_grows(vlm: VLM) -> None:
    small, large = rows_of(vlm, 1, 3), rows_of(vlm, 1, 9)
    plain = said(vlm, small)
    vlm.static_steps = StaticSteps(Captured(), samples=0)
    assert said(vlm, small) == plain
    before = list(vlm.static_steps._memory)
    said(vlm, large)
    assert vlm.static_steps._memory[0][0].numel() > before[0][0].numel()
    for keys, values in before:  # what steps must not work on any more
        keys.fill_(torch.nan), values.fill_(torch.nan)
    assert said(vlm, small) == plain


def test_few_shapes_are_kept_and_rows_that_nobody_has_see_themselves(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hscr.static_steps, "MOST", 2)
    vlm.static_steps = StaticSteps(Captured(), samples=0)
    said(vlm, rows_of(vlm, 1, 9))
    shapes = list(vlm.static_steps._shapes.values())
    assert len(shapes) == 2
    for shape in shapes:
        assert shape.step is not None
        assert (shape.step.mask.amax(-1) == 0).all()


@pytest.mark.parametrize(("seconds", "inputs", "kept"), [(0.009, 0, True), (0.011, 0, False), (0.009, 0.002, False)])
def test_the_faster_step_is_kept(
    vlm: VLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
    inputs: float,
    kept: bool,
) -> None:
    """Two plain steps are timed, of 10 ms by the clock here, one is captured, and two more are timed, what lays their inputs out too."""
    caplog.set_level(logging.INFO, "hscr.static_steps")
    prompts = encode_prompts(vlm, [picture(0), picture(1)], QUESTIONS[:2])
    vlm.base.generation_config.eos_token_id = 399  # nobody ends, so there is one shape
    plain = decode(vlm, prompts, max_tokens=12, known=Prefixes())
    capture = Captured(seconds)
    vlm.static_steps = StaticSteps(capture, samples=2)
    stock, put = StaticSteps.logits, StaticStep.put

    def slow_put(self: StaticStep, *args: Any) -> None:
        capture.clock += inputs
        put(self, *args)

    monkeypatch.setattr(StaticStep, "put", slow_put)

    def slow(self: StaticSteps, plain: Callable[[], Tensor], *rest: Any) -> Tensor:
        def ten_ms() -> Tensor:
            capture.clock += 0.01
            return plain()

        return stock(self, ten_ms, *rest)

    monkeypatch.setattr(StaticSteps, "logits", slow)
    monkeypatch.setattr(hscr.static_steps, "time", SimpleNamespace(perf_counter=lambda: capture.clock))
    assert decode(vlm, prompts, max_tokens=12, known=Prefixes()) == plain
    assert capture.replays == (11 - 2 if kept else 3)  # the first token is the prompt's own pass
    (choice,) = vlm.static_steps.choices
    timed = {"plain_ms": pytest.approx(10), "captured_ms": pytest.approx(1000 * (seconds + inputs))}
    assert choice == {"rows": 2, "columns": 256, "new": 1, **timed}
    assert caplog.messages[0].endswith("captured; captured" if kept else "captured; plain")


def test_after_a_failure_the_plain_steps_go_on(vlm: VLM, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a batch: what the failed step wrote is overwritten, and nothing is captured any more."""
    rows = rows_of(vlm, 5, 6)
    plain = said(vlm, rows)
    capture = Captured(fails_at=4)
    vlm.static_steps = StaticSteps(capture, samples=0)
    assert said(vlm, rows) == plain
    assert capture.replays == 4
    assert vlm.static_steps.off == "OutOfMemoryError: no memory"
    assert caplog.messages == [
        "decode steps are not captured any more, the plain ones go on: OutOfMemoryError: no memory"
    ]
    assert said(vlm, rows) == plain
    assert capture.replays == 4


def test_the_memory_is_one_caches_at_a_time(vlm: VLM) -> None:
    """While another cache lives in it a batch takes the plain steps, and afterwards the memory."""
    rows = rows_of(vlm, 2, 3)
    capture = Captured()
    vlm.static_steps = StaticSteps(capture, samples=0)
    other = empty_cache(vlm)
    plain = said(vlm, rows)
    replays = capture.replays
    assert replays
    vlm.static_steps._owner = hscr.static_steps.weakref.ref(other)
    assert said(vlm, rows) == plain
    assert capture.replays == replays
    del other
    assert said(vlm, rows) == plain
    assert capture.replays == 2 * replays


def test_what_is_held_moves_within_one_memory(vlm: VLM) -> None:
    """From 2 rows of 8 columns to 3 of 12 over the same numbers."""
    layer, memory = GrowingLayer(), torch.zeros(2, 3 * 2 * 12 * 4)
    states = torch.randn(2, 2, 5, 4)
    with torch.no_grad():
        layer.update(states, 2 * states)
    for rows, columns in ((2, 8), (3, 12)):
        layer.lie_in([t[: rows * 2 * columns * 4].view(rows, 2, columns, 4) for t in memory])
        assert torch.equal(torch.as_tensor(layer.keys), states)
        assert torch.equal(torch.as_tensor(layer.values), 2 * states)


def test_a_cpu_takes_plain_steps(vlm: VLM) -> None:
    said(vlm, rows_of(vlm, 2, 3))
    assert vlm.static_steps is None


def test_a_stage_tells_what_its_steps_took_and_gives_their_memory_back(vlm: VLM) -> None:
    assert list(captured_events(vlm, "generating")) == []
    steps = vlm.static_steps = StaticSteps(Captured())
    steps.choices = [{"plain_ms": p, "captured_ms": c} for p, c in ((8.0, 5.0), (4.0, 6.0), (9.0, 7.0))]
    steps.off = "RuntimeError: capture"
    metrics, warning = captured_events(vlm, "generating")
    assert metrics.values == {  # type: ignore[union-attr]
        "decode/shapes": 3,
        "decode/shapes_captured": 2,
        "decode/plain_ms": 8.0,
        "decode/captured_ms": 6.0,
    }
    assert warning.message == "decode steps went on without CUDA graphs: RuntimeError: capture"  # type: ignore[union-attr]
    assert vlm.static_steps is None


def test_adapters_are_captured_once_they_last_and_let_go_of_when_they_left(
    vlm: VLM, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hscr.static_steps, "LASTING", 3)
    vlm.base.generation_config.eos_token_id = 399  # nobody ends
    answerer = Answerer(vlm)
    answerer.load_adapter("one", save_adapter(tiny_folder, tmp_path / "one", 1))
    assert answerer.decoder is not None

    def ids(adapter: str | None) -> list[int]:
        return list(answerer.answer([AnswerRequest(picture(0), "what", adapter, max_tokens=9)])[0].token_ids)

    plain = ids("one")
    capture = Captured()
    steps = answerer.decoder.steps = StaticSteps(capture, samples=0)
    assert ids("one") == plain
    assert capture.replays == 8 - 3  # the first token is the prompt's own pass
    assert any(shape.side is not None for shape in steps._shapes.values())
    answerer.unload_adapter("one")
    assert ids(None) != plain  # steps of the base
    assert capture.replays == 8 - 3 + 8
    assert all(shape.side is None for shape in steps._shapes.values())


@pytest.mark.parametrize("fails", [False, True])
def test_memory_goes_back_at_once_though_a_decoder_keeps_its_steps(vlm: VLM, fails: bool) -> None:
    """At a stage's end and after a failure; not when the garbage collector comes round."""
    steps = vlm.static_steps = StaticSteps(Captured(fails_at=9 if fails else -1), samples=0)
    decoder = PlainDecoder.of(vlm)
    assert decoder is not None
    held: list[weakref.ref[Any]] = []
    place = steps._place

    def placed(*args: Any) -> bool:
        found = place(*args)
        held.extend(weakref.ref(t) for pair in steps._memory for t in pair)
        return found

    steps._place = placed  # type: ignore[method-assign,assignment]
    gc.collect()
    gc.disable()
    try:
        said(vlm, rows_of(vlm, 1, 3))
        assert held
        assert (steps.off is not None) == fails
        if not fails:
            assert any(ref() is not None for ref in held)
            list(captured_events(vlm, "generating"))
        assert decoder.steps is steps
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_rows_are_rounded_by_hand() -> None:
    assert [rounded_rows(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
