"""Iteration-level scheduling: whoever shares the batch, and whenever they came, an answer is the one it would be alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hscr import plain_decoder, shared_prefix, static_steps
from hscr.answer import AnswerBatch, Answerer, AnswerRequest
from hscr.answers import Answer
from hscr.config import OptimizationConfig
from hscr.model import VLM, add_lora, encode_prompts, load_model
from hscr.plain_decoder import logits_of
from hscr.prefix import GrowingLayer, Rows
from hscr.prefix_cache import prefix_length
from hscr.shared_prefix import Sharing
from hscr.static_steps import StaticSteps
from tests.hscr.tiny import picture
from tests.hscr.tiny_families import NAMES, save_tiny

QUESTIONS = ["Where is the lesion?", "Which plane?", "Is there a lesion in the left frontal lobe? yes no", "what"]
ADAPTERS = (None, "one", "two")


def save_adapter(model: Path, folder: Path, seed: int, rank: int = 2) -> Path:
    """Random weights, strong enough to change answers."""
    vlm = load_model(model, device="cpu")
    add_lora(vlm, OptimizationConfig(lora_rank=rank), seed=seed)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in vlm.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=stream)
    vlm.model.save_pretrained(str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(request.param, folder / "model")
    adapters = {name: save_adapter(model, folder / name, seed, seed) for seed, name in enumerate(("one", "two"), 1)}
    return load_model(model, device="cpu"), adapters


def answerer_of(family: tuple[VLM, dict[str, Path]], **options: Any) -> Answerer:
    answerer = Answerer(family[0], **options)
    for name, folder in family[1].items():
        answerer.load_adapter(name, folder)
    return answerer


def close(answerer: Answerer) -> None:
    for name in ("one", "two"):
        answerer.unload_adapter(name)


def asked(rng: random.Random, images: int = 4, adapters: Sequence[str | None] = ADAPTERS) -> AnswerRequest:
    image = rng.randrange(images)
    return AnswerRequest(
        picture(image, ((28, 28), (40, 28))[image % 2]),
        rng.choice(QUESTIONS),
        rng.choice(adapters),
        max_tokens=rng.randint(1, 9),
        temperature=rng.choice([0.0, 0.0, 1.5]),
        top_p=rng.choice([1.0, 0.6]),
        seed=rng.randrange(3),
        grounding=rng.choice(["none", "summary", "tokens"]),
        logprobs=rng.choice([None, None, 2]),
    )


def same(a: Answer, b: Answer) -> None:
    assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
    assert a.score == pytest.approx(b.score, abs=2e-4)
    if a.tokens is not None:
        assert b.tokens is not None
        assert [t.reward for t in a.tokens] == pytest.approx([t.reward for t in b.tokens], abs=2e-4)
    if a.logprobs is not None:
        assert b.logprobs is not None
        assert [t.logprob for t in a.logprobs] == pytest.approx([t.logprob for t in b.logprobs], abs=2e-4)
        assert [[x for x, _ in t.top] for t in a.logprobs] == [[x for x, _ in t.top] for t in b.logprobs]


@pytest.mark.parametrize("shared", [False, True])
def test_random_mixes_answer_as_alone(
    family: tuple[VLM, dict[str, Path]], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that join at any step, leave at any step, repeat images, and a prefix cache that holds about two of them; `shared`: wherever
    two rows stand behind one prefix, it is read once."""
    monkeypatch.setattr(shared_prefix, "WORTH", 1 if shared else 10**9)
    steps: list[Sharing | None] = []
    monkeypatch.setattr(plain_decoder, "sharing", lambda *a: steps.append(shared_prefix.sharing(*a)) or steps[-1])
    plain, mixed = answerer_of(family), answerer_of(family, prefix_cache_bytes=60_000)
    said = set()
    for seed in range(2):
        rng = random.Random(seed)
        batch, rows, got = AnswerBatch(mixed), {}, {}
        waiting = [asked(rng, 2, (None,)) if shared else asked(rng) for _ in range(10)]
        cancelled = 0
        while waiting or len(batch):
            if waiting and (rng.random() < 0.6 or not len(batch)):
                new = [waiting.pop() for _ in range(min(len(waiting), rng.randint(1, 5 if shared else 3)))]
                rows |= dict(zip(batch.join(new), new, strict=True))
            if len(batch) > 2 and rng.random() < 0.15:
                gone = rng.choice(list(batch._asked))
                batch.leave([gone])
                cancelled += 1
            got |= batch.step()
        assert len(got) == 10 - cancelled
        for row, answer in got.items():
            same(answer, plain.answer([rows[row]])[0])
            said.add(answer.text)
    assert len(said) > 8  # the answers differ, so equality says something
    used = [s for s in steps if s is not None]
    assert bool(used) == (shared and mixed.decoder is not None)
    if used:  # several prefixes, also of rows that do not stand side by side
        assert any(len(s.groups) > 1 for s in used)
        assert any(s.order is not None for s in used)
    close(plain)
    close(mixed)


def test_steps_of_fixed_shape_answer_as_plain_ones(
    family: tuple[VLM, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that join and leave in buffers that are rounded up and shared, with adapters that change from step to step."""
    monkeypatch.setattr(static_steps, "LASTING", 0)
    plain, static = answerer_of(family), answerer_of(family)
    if static.decoder is None:
        pytest.skip("no plain decoder")
    replayed = []

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            logits = compute()
            replayed.append(logits.shape[0])
            return logits

        return replay

    static.decoder.steps = StaticSteps(capture, samples=0)
    rng, batch, rows, got = random.Random(1), AnswerBatch(static), {}, {}
    waiting = [asked(rng) for _ in range(14)]
    while waiting or len(batch):
        if waiting and (rng.random() < 0.6 or not len(batch)):
            new = [waiting.pop() for _ in range(min(len(waiting), rng.randint(1, 3)))]
            rows |= dict(zip(batch.join(new), new, strict=True))
        got |= batch.step()
    assert static.decoder.steps.off is None
    assert len(set(replayed)) > 2  # sizes of steps
    assert max(replayed) > 3
    sides = {id(shape.side) for shape in static.decoder.steps._shapes.values() if shape.side is not None}
    assert len(sides) == 1  # what lies beside each other no more is not kept
    for row, answer in got.items():
        same(answer, plain.answer([rows[row]])[0])
    close(plain)
    close(static)


def test_layer_by_layer_logits_are_the_stock_forwards(family: tuple[VLM, dict[str, Path]]) -> None:
    """Whole prompts, what follows kept prefixes, and steps; rows of other lengths, adapters of other ranks beside the base."""
    answerer = answerer_of(family)
    vlm, decoder, lora = answerer.vlm, answerer.decoder, answerer.lora
    assert (decoder is None) == (vlm.family.name == "gemma3")  # its layers are of another kind
    prompts = encode_prompts(vlm, [picture(i, ((28, 28), (40, 28))[i % 2]) for i in range(4)], QUESTIONS)
    adapters, tails = [None, "one", "two", "one"], [[65, 66], [], [67], [68, 69, 70]]
    with torch.inference_mode(), lora.rows(adapters):
        stock, ours = Rows(vlm, prompts, tails), Rows(vlm, prompts, tails)
        torch.testing.assert_close(logits_of(ours, decoder, lora, 3), stock.logits(3), atol=2e-4, rtol=0)
        for rows in (stock, ours):
            rows.append([63, 64, 65, 66])
        torch.testing.assert_close(logits_of(ours, decoder, lora), stock.logits(), atol=2e-4, rtol=0)
        held = [stock.beginning(i, prefix_length(p)) for i, p in enumerate(prompts)]
        stock, ours = Rows.after(vlm, prompts, held, tails), Rows.after(vlm, prompts, held, tails)
        torch.testing.assert_close(logits_of(ours, decoder, lora, 4), stock.logits(4), atol=2e-4, rtol=0)
    close(answerer)


def test_who_leaves_first_makes_room_for_who_came_last(family: tuple[VLM, dict[str, Path]]) -> None:
    """Outside of inference mode, as the engine calls it: the last row moves into buffers that a step has written."""
    answerer = answerer_of(family)
    batch = AnswerBatch(answerer)
    requests = [AnswerRequest(picture(i), QUESTIONS[i], max_tokens=9) for i in range(3)]
    rows = batch.join(requests)
    got = {**batch.step(), **batch.step()}
    if rows[0] not in got:
        batch.leave([rows[0]])
    while len(batch):
        got |= batch.step()
    for row, request in list(zip(rows, requests, strict=True))[1:]:
        same(got[row], answerer.answer([request])[0])
    close(answerer)


def test_answers_fit_into_the_room_that_was_made_for_them(
    family: tuple[VLM, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs lies where it was laid, however long its answers are: growing copies the keys and values of all."""
    answerer = answerer_of(family, prefix_cache_bytes=2**24)
    batch = AnswerBatch(answerer)
    monkeypatch.setattr(VLM, "eos_ids", frozenset())
    batch.join([AnswerRequest(picture(0), question, max_tokens=256) for question in QUESTIONS])
    batch.step()

    def copied(*given: object) -> None:
        raise AssertionError("the cache grew")

    monkeypatch.setattr(GrowingLayer, "_make", copied)
    while len(batch):
        batch.step()
    close(answerer)
