"""Prefixes that are kept: found again by the same policy, image, tokens and salt, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hscr.answer import Answerer, AnswerRequest
from hscr.model import VLM, encode_prompts, load_model
from hscr.prefix import Rows
from hscr.prefix_cache import PrefixCache, begin, prefix_key, prefix_length
from hscr.running import Running
from hscr.visual_tokens import dropped
from tests.hscr.test_running import save_adapter
from tests.hscr.tiny import picture, save_tiny_llava

QUESTIONS = ["Where is the lesion?", "Which plane is shown?"]
Answered = Any


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("prefixes") / "model")


@pytest.fixture(scope="module")
def adapters(model: Path) -> list[Path]:
    return [save_adapter(model, model.parent / str(seed), seed) for seed in (1, 2)]


@pytest.fixture
def answerer(model: Path, adapters: list[Path]) -> Answerer:
    made = Answerer(load_model(model, device="cpu"), prefix_cache_bytes=2**20)
    for name, folder in zip(("one", "two"), adapters, strict=True):
        made.load_adapter(name, folder)
    return made


def passes(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of each forward pass from here on."""
    seen: list[tuple[int, int]] = []
    forward = answerer.vlm.model.forward

    def noted(*args: Any, **kw: Any) -> Any:
        seen.append(tuple(kw["input_ids"].shape))
        return forward(*args, **kw)

    monkeypatch.setattr(answerer.vlm.model, "forward", noted)
    assert answerer.decoder is not None
    logits = answerer.decoder.logits

    def layer_by_layer(rows: Rows, *args: Any) -> Any:
        seen.append((len(rows.ids), rows.new))
        return logits(rows, *args)

    monkeypatch.setattr(answerer.decoder, "logits", layer_by_layer)
    return seen


@pytest.mark.parametrize("grounding", ["none", "summary"])
def test_the_next_question_on_an_image_begins_behind_it(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch, grounding: str
) -> None:
    first, second = (AnswerRequest(picture(0), q, max_tokens=4, grounding=grounding) for q in QUESTIONS)
    fresh = Answerer(answerer.vlm).answer([second])[0]
    answerer.answer([first])
    seen = passes(answerer, monkeypatch)
    again = answerer.answer([second])[0]
    assert (again.token_ids, again.text) == (fresh.token_ids, fresh.text)
    assert again.score == (None if fresh.score is None else pytest.approx(fresh.score, abs=1e-4))
    assert max(n for _, n in seen) < 16  # of 16 visual tokens, or the 5 that are not dropped, none was computed again
    assert answerer.prefixes is not None
    assert answerer.prefixes.hits == (1 if grounding == "none" else 2)


def test_a_new_image_takes_one_pass_and_one_more_to_be_grounded(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = passes(answerer, monkeypatch)
    requests = [AnswerRequest(picture(i), QUESTIONS[i % 2], max_tokens=3, grounding="summary") for i in range(3)]
    answerer.answer(requests)
    assert len([n for _, n in seen if n > 1]) == 2
    assert answerer.prefixes is not None
    for layers in answerer.prefixes._items.values():  # what is kept holds nothing larger alive than is counted
        assert all(t.untyped_storage().nbytes() == t.nbytes for pair in layers for t in pair)


def test_known_and_new_images_and_twins_begin_in_two_passes(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Answerer(answerer.vlm)
    plain.lora = answerer.lora
    answerer.answer([AnswerRequest(picture(0), QUESTIONS[0], max_tokens=2)])
    mix = [
        AnswerRequest(picture(i), q, adapter, max_tokens=4)
        for i, q, adapter in [
            (1, QUESTIONS[0], None),
            (0, QUESTIONS[1], None),
            (1, QUESTIONS[1], None),
            (0, "a", "one"),
        ]
    ]
    wanted = [plain.answer([r])[0].token_ids for r in mix]
    seen = passes(answerer, monkeypatch)
    assert [a.token_ids for a in answerer.answer(mix)] == wanted
    # Image 1 and the adapter's image 0; then image 0 and the other question on image 1.
    (two, whole), (also, behind) = (shape for shape in seen if shape[1] > 1)
    assert two == also == 2
    assert whole > 16 > behind


def test_everything_a_prefix_depends_on_is_in_its_name(vlm: VLM) -> None:
    grey = Image.new("RGB", (28, 28), (7, 7, 7))
    images = [picture(0), picture(1), grey, Image.new("RGB", (14, 56), (7, 7, 7)), grey.convert("L").convert("RGB")]
    prompts = encode_prompts(vlm, images, ["Where?"] * len(images))
    prompts.append(encode_prompts(vlm, [picture(0)], ["Which?"])[0])
    cuts = [dropped(prompts[0], 0.7, seed, 0) for seed in ("a", "b")]

    def name(prompt: Any, adapter: str | None = None, salt: str = "") -> str:
        return prefix_key(prompt, prefix_length(prompt), adapter, salt)

    # Another question on the same image, and the same pixels come by another way, are the same prefix; nothing else is.
    assert name(prompts[5]) == name(prompts[0])
    assert name(prompts[4]) == name(prompts[2])
    others = [*(name(p) for p in (*prompts[:4], *cuts)), name(prompts[0], "one"), name(prompts[0], "two")]
    others += [name(prompts[0], None, "key"), name(prompts[0], "one", "key"), name(prompts[0], "", "")]
    assert len(set(others)) == len(others)
    before = prompts[0].input_ids.clone()
    before[0] += 1  # another word before the image, as of another system text or turn
    assert name(replace(prompts[0], input_ids=before)) not in others
    longer = prefix_key(prompts[0], prefix_length(prompts[0]) + 1, None, "")
    assert longer not in others


def test_versions_and_images_are_never_confused(answerer: Answerer) -> None:
    """Three policies, two images, both questions, with and without grounding, over one cache in every order."""
    plain = Answerer(answerer.vlm)
    plain.lora = answerer.lora
    requests = [
        AnswerRequest(picture(i), q, adapter, max_tokens=5, grounding="summary")
        for q in QUESTIONS
        for adapter in (None, "one", "two")
        for i in range(2)
    ]
    wanted = [plain.answer([r])[0] for r in requests]
    assert len({a.text for a in wanted}) == len(wanted)
    for order in (requests, requests[::-1]):
        for request in order:
            got, want = answerer.answer([request])[0], wanted[requests.index(request)]
            assert got.token_ids == want.token_ids
            assert got.score == pytest.approx(want.score, abs=1e-4)
    assert answerer.prefixes is not None
    assert answerer.prefixes.misses == 2 * 3 * 2  # a full and a dropped one each policy and image


def test_another_salt_finds_nothing(answerer: Answerer) -> None:
    request = AnswerRequest(picture(0), QUESTIONS[0], max_tokens=2)
    for salt, hits in (("a", 0), ("b", 0), ("a", 1)):
        answerer.answer([replace(request, salt=salt)])
        assert answerer.prefixes is not None
        assert answerer.prefixes.hits == hits


def test_bytes_are_bounded_and_the_longest_unused_goes_first() -> None:
    def layers(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros(1, n, 1), torch.zeros(1, n, 1))]  # 8·n bytes

    cache = PrefixCache(max_bytes=80)
    cache.put("a", layers(4))
    cache.put("b", layers(4))
    assert cache.get("a") is not None
    cache.put("c", layers(4))
    assert (cache.get("b"), cache.n_bytes) == (None, 64)
    assert cache.get("a") is not None
    cache.put("huge", layers(11))
    assert cache.get("huge") is None
    assert cache.n_bytes == 64


def test_a_cache_that_forgets_before_its_window_gets_whole_prompts(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stock sliding window: nothing is kept, nothing joins what runs, and answers are those of whole batches."""
    text = answerer.vlm.base.config.get_text_config()
    monkeypatch.setattr(text, "sliding_window", 8, raising=False)
    monkeypatch.setattr(text, "layer_types", ["sliding_attention"] * text.num_hidden_layers, raising=False)
    prompts = encode_prompts(answerer.vlm, [picture(0)], QUESTIONS[:1])
    seen = passes(answerer, monkeypatch)
    (part,) = begin(answerer.vlm, answerer.lora, answerer.prefixes, prompts, [()], [None], [""])
    assert seen == [(1, len(prompts[0].input_ids))]
    assert not part.rows.can_join
    assert answerer.prefixes is not None
    assert answerer.prefixes.n_bytes == 0
    from hscr.running import Row

    running = Running(answerer.vlm, answerer.lora, answerer.prefixes)
    running.join([Row(prompts[0], None, 5)])
    with pytest.raises(ValueError, match="nothing can join"):
        running.join([Row(prompts[0], None, 5)])
    assert len(running.rows) == 1
