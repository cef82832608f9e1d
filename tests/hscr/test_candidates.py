"""Wrong answers that are no token replacement: the model's own samples, random words, and what becomes of several sources."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hscr.candidates
from hscr.candidates import word_contexts, words_of_its_kind
from hscr.config import PreferenceConfig
from hscr.decode import decode
from hscr.images import decode_image
from hscr.model import VLM, decode_text, encode_answer, encode_prompts, load_model
from hscr.preferences import generate
from hscr.records import PreferenceRecord, VQARecord, read_records
from hscr.replacement import same_word
from hscr.similarity import token_f1
from hscr.visual_tokens import derived_seed
from hscr.words import normalized

# Everything kept, so that the raw candidates can be looked at.
OPEN = PreferenceConfig(
    n_levels=20, similarity_gap=0.0, max_similarity=1.0, similarity="token_f1", closed="replace", max_new_tokens=8
)


@pytest.fixture
def records(data_folder: Path) -> list[VQARecord]:
    return read_records(data_folder)[0]


@pytest.fixture
def open_image(data_folder: Path) -> Callable[[VQARecord], Image.Image]:
    return lambda record: decode_image(data_folder / record.image)


def made(
    vlm: VLM, records: Sequence[VQARecord], open_image: Any, config: PreferenceConfig, **options: Any
) -> list[PreferenceRecord]:
    return list(generate(vlm, records, open_image, config, token_f1, seed=1, **options))


def test_sampled_levels_are_what_the_model_says_under_seeds_of_record_and_sample(
    vlm: VLM, records: list[VQARecord], open_image: Any
) -> None:
    """Made here one by one; nothing is replaced and no word counts as coupled, while the rewards are still measured."""
    record = records[0]
    (result,) = made(vlm, [record], open_image, dataclasses.replace(OPEN, candidates="sampled"))
    prompts = encode_prompts(vlm, [open_image(record)], [record.question])
    said = []
    for sample in range(OPEN.n_candidates):
        seed = derived_seed("sample", "1/r0", sample)
        (ids,) = decode(vlm, prompts, max_tokens=OPEN.max_new_tokens, temperature=1.0, seeds=[seed])
        said.append(decode_text(vlm, ids))
    assert {x.text for x in result.levels} == set(said)
    assert {(x.source, x.replaced) for x in result.levels} == {("sampled", ())}
    assert len(set(said)) > 1
    assert not any(w.coupled for w in result.words)
    assert any(w.reward for w in result.words)


def test_samples_do_not_depend_on_their_batch(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    config = dataclasses.replace(OPEN, candidates="sampled")
    whole = made(vlm, records[:3], open_image, config)
    assert made(vlm, records[:3], open_image, dataclasses.replace(config, batch_size=2)) == whole


def test_a_lower_temperature_gives_fewer_different_samples(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    """Near zero every sample is the greedy answer: one level of five samples, four duplicates."""
    config = dataclasses.replace(OPEN, candidates="sampled", sample_temperature=1e-6)
    for result in made(vlm, records[:2], open_image, config):
        assert len(result.levels) == 1
        assert result.dropped["duplicate_or_right"] == 4


def test_samples_that_are_right_or_too_similar_or_empty_are_dropped_and_counted(
    vlm: VLM, records: list[VQARecord], open_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y_w in other case, nothing at all, y_w with one word more (F1 22/23 = .957 > .9), and two wrong ones of which the nearer is first."""
    answer = records[0].answer
    texts = [answer.upper(), " . ", f"{answer} yes", "axial", "There is a lesion in the right lobe."]

    def says(vlm: VLM, prompts: Sequence[Any], **kw: Any) -> list[list[int]]:
        return [encode_answer(vlm, records[0].question, text) for text in texts]

    monkeypatch.setattr(hscr.candidates, "decode", says)
    config = PreferenceConfig(similarity="token_f1", candidates="sampled")
    (result,) = made(vlm, records[:1], open_image, config)
    assert [x.text for x in result.levels] == [texts[4], texts[3]]
    assert result.dropped == {"duplicate_or_right": 1, "empty_answer": 1, "too_similar": 1}


def test_both_sources_are_ranked_in_one_pool(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    replaced = made(vlm, records[:3], open_image, OPEN)
    sampled = made(vlm, records[:3], open_image, dataclasses.replace(OPEN, candidates="sampled"))
    both = made(vlm, records[:3], open_image, dataclasses.replace(OPEN, candidates="both"))
    for r, s, b in zip(replaced, sampled, both, strict=True):
        assert {x.text for x in b.levels} == {x.text for x in (*r.levels, *s.levels)}
        assert {x.source for x in b.levels} == {"replacement", "sampled"}
        values = [x.similarity for x in b.levels]
        assert values == sorted(values, reverse=True)
        assert b.words == r.words
    kept = made(vlm, records[:3], open_image, PreferenceConfig(similarity="token_f1", candidates="both"))
    assert all(len(r.levels) <= 3 for r in kept)


@pytest.mark.parametrize("candidates", ["replacement", "sampled", "both", "random"])
def test_closed_questions_keep_their_own_rule_whatever_the_source(
    vlm: VLM, records: list[VQARecord], open_image: Any, candidates: str
) -> None:
    closed = [r for r in records if r.answer_type == "closed"]
    config = PreferenceConfig(similarity="token_f1", candidates=candidates)
    for result in made(vlm, closed, open_image, config):
        assert [(x.text, x.source) for x in result.levels] == [("no", "replacement")]
    for result in made(vlm, closed, open_image, dataclasses.replace(config, closed="skip")):
        assert result.levels == ()


def test_words_of_a_kind_stand_in_the_same_context() -> None:
    """Between "the" and "lobe": left and right; after "the" alone also "top"; of "lobe"'s neighbours "left" has none but itself."""
    contexts = word_contexts(["in the left lobe", "in the right lobe", "at the top", "Lefts lobe"])
    assert words_of_its_kind(contexts, ["in", "the", "left", "lobe"], 2) == ["right"]
    assert words_of_its_kind(contexts, ["on", "the", "left", "side"], 2) == ["right", "top"]
    assert words_of_its_kind(contexts, ["on", "her", "left", "lobe"], 2) == ["right"]
    assert words_of_its_kind(contexts, ["on", "her", "left", "side"], 2) == []


def test_one_word_answers_are_of_a_kind_and_numbers_and_case_are_kept() -> None:
    contexts = word_contexts(["yes", "no", "Axial", "2.5 cm", "3 cm"])
    assert words_of_its_kind(contexts, ["yes"], 0) == ["Axial", "no"]
    assert words_of_its_kind(contexts, ["2.5", "cm"], 0) == ["3"]


def test_random_words_replace_as_many_words_in_nested_sets_and_come_from_other_answers(
    vlm: VLM, records: list[VQARecord], open_image: Any
) -> None:
    by_model = made(vlm, records, open_image, OPEN)
    by_chance = made(vlm, records, open_image, dataclasses.replace(OPEN, candidates="random"))
    known = {w for r in records for w in normalized(r.answer).split()}
    assert any(len(r.levels) > 1 for r in by_chance)
    for model, chance in zip(by_model, by_chance, strict=True):
        n = sum(w.coupled for w in model.words)
        coupled = [w.text for w in chance.words if w.coupled]
        assert len(coupled) == n or chance.dropped["no_word_of_its_kind"] > 0
        assert len(coupled) <= n
        for level in chance.levels:
            assert level.source == "random"
            assert normalized(level.text) != normalized(chance.record.answer)
            assert len(normalized(level.text).split()) == len(normalized(chance.record.answer).split())
            for old, new in level.replaced:
                assert old in coupled
                assert new.lower() in known
                assert not same_word(old, new)
        by_size = sorted(chance.levels, key=lambda x: len(x.replaced))
        for small, large in itertools.pairwise(by_size):
            assert set(small.replaced) < set(large.replaced)
    assert [r.words for r in by_model] != [r.words for r in by_chance]


def test_random_words_are_the_same_in_a_resumed_run(
    vlm: VLM, records: list[VQARecord], open_image: Any, tiny_folder: Path
) -> None:
    """The words of the records that were made before are still drawn from."""
    config = dataclasses.replace(OPEN, candidates="random", batch_size=2)
    records[0] = dataclasses.replace(records[0], answer="There was one small dark lesion near the right parietal lobe.")
    whole = made(vlm, records, open_image, config)
    assert made(vlm, records, open_image, config) == whole
    assert made(load_model(tiny_folder, device="cpu"), records, open_image, config, start=4) == whole[4:]
    assert made(vlm, records[4:], open_image, config) != whole[4:]


def test_random_words_go_on_as_the_continuation_says(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    config = dataclasses.replace(OPEN, candidates="random")
    spliced = made(vlm, records[:3], open_image, config)
    redone = made(vlm, records[:3], open_image, dataclasses.replace(config, continuation="redecode"))
    assert [r.words for r in spliced] == [r.words for r in redone]
    assert {x.text for r in spliced for x in r.levels} != {x.text for r in redone for x in r.levels}
