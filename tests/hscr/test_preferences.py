"""Preference generation: graded wrong answers from the model itself. Paper §3.1 and §3.2."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import hscr.preferences
import hscr.replacement
from hscr.config import PERTURBATIONS, REWARDS, PreferenceConfig
from hscr.images import decode_image
from hscr.model import VLM, encode_answer, encode_prompts
from hscr.parts import shard_bounds
from hscr.preferences import generate
from hscr.records import PreferenceRecord, VQARecord, read_records
from hscr.replacement import hallucinated_token, same_word
from hscr.reward import Branches, words_of
from hscr.similarity import rerank, token_f1
from hscr.words import normalized

# Everything kept, so that the raw candidates can be looked at.
OPEN = PreferenceConfig(n_levels=20, similarity_gap=0.0, max_similarity=1.0, similarity="token_f1", closed="replace")


@pytest.fixture
def records(data_folder: Path) -> list[VQARecord]:
    return read_records(data_folder)[0]


@pytest.fixture
def open_image(data_folder: Path) -> Callable[[VQARecord], Image.Image]:
    return lambda record: decode_image(data_folder / record.image)


def made(vlm: VLM, records: Sequence[VQARecord], open_image: Any, config: PreferenceConfig) -> list[PreferenceRecord]:
    return list(generate(vlm, records, open_image, config, token_f1, seed=1))


def token(vlm: VLM, word: str) -> int:
    ids = vlm.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
    assert len(ids) == 1, word
    return ids[0]


def log_probs(vlm: VLM, values: dict[str, float]) -> Tensor:
    """Log-probabilities [1, V] of " word" tokens; the rest of the mass lies thinly over the vocabulary."""
    out = torch.full((len(vlm.tokenizer),), (1 - sum(values.values())) / len(vlm.tokenizer))
    for word, p in values.items():
        out[token(vlm, word)] += p
    return out.log()[None]


@pytest.fixture
def left(vlm: VLM) -> tuple[list[int], Any]:
    ids = [token(vlm, "left")]
    return ids, words_of(vlm, ids)[1][0]


def test_the_plausible_token_with_the_lowest_p_diff_is_taken(vlm: VLM, left: Any) -> None:
    """p(·|i') = left .6, right .2, temporal .1, frontal .05; α = .1 allows ≥ .06. p(·|i): right .3, temporal .05, frontal .001.
    log P_diff ∝ 1.9·ln p − .9·ln p': right −2.288 + 1.448 = −.84; temporal −5.692 + 2.072 = −3.62; frontal (−10.4) is not plausible."""
    full = log_probs(vlm, {"left": 0.6, "right": 0.3, "temporal": 0.05, "frontal": 0.001})
    cut = log_probs(vlm, {"left": 0.6, "right": 0.2, "temporal": 0.1, "frontal": 0.05})
    ids, word = left
    pick = hallucinated_token(vlm, Branches(full, cut), ids, word, PreferenceConfig())
    assert pick == token(vlm, "temporal")
    wider = hallucinated_token(vlm, Branches(full, cut), ids, word, PreferenceConfig(alpha=0.05))
    assert wider == token(vlm, "frontal")
    narrower = hallucinated_token(vlm, Branches(full, cut), ids, word, PreferenceConfig(alpha=0.3))
    assert narrower == token(vlm, "right")
    from_full = hallucinated_token(vlm, Branches(full, cut), ids, word, PreferenceConfig(candidates_from="full"))
    assert from_full == token(vlm, "right")  # .1 · .6 = .06: only right (.3) is plausible with the image


def test_beta_weighs_the_branch_without_the_image(vlm: VLM, left: Any) -> None:
    """right .1 with, .4 without; temporal .09 with, .09 without. β = 0: lowest is temporal (.09). β = .9: right −4.375 + .825 = −3.55
    against temporal −4.575 + 2.167 = −2.41: right is what the image speaks against."""
    full = log_probs(vlm, {"left": 0.7, "right": 0.1, "temporal": 0.09})
    cut = log_probs(vlm, {"left": 0.45, "right": 0.4, "temporal": 0.09})
    ids, word = left
    assert hallucinated_token(vlm, Branches(full, cut), ids, word, PreferenceConfig(beta=0.0)) == token(vlm, "temporal")
    assert hallucinated_token(vlm, Branches(full, cut), ids, word, PreferenceConfig()) == token(vlm, "right")


@pytest.mark.parametrize(("likely", "other"), [("right", "temporal"), ("temporal", "right")])
def test_the_most_plausible_word_is_what_the_model_says_without_the_image(
    vlm: VLM, left: Any, likely: str, other: str
) -> None:
    """p(·|i') = left .6, likely .2, other .1; p(·|i): likely .05, other .3. log P_diff ∝ 1.9·ln p − .9·ln p': likely −5.692 + 1.448 =
    −4.24, other −2.288 + 2.072 = −.22: here both rules take the likely one. With p(·|i) the other way round P_diff takes the other
    (−.84 against −3.62)."""
    ids, word = left
    cut = log_probs(vlm, {"left": 0.6, likely: 0.2, other: 0.1})
    config = PreferenceConfig(replacement_choice="most_plausible")
    against = Branches(log_probs(vlm, {"left": 0.6, likely: 0.05, other: 0.3}), cut)
    spoken_for = Branches(log_probs(vlm, {"left": 0.6, likely: 0.3, other: 0.05}), cut)
    assert hallucinated_token(vlm, against, ids, word, config) == token(vlm, likely)
    assert hallucinated_token(vlm, spoken_for, ids, word, config) == token(vlm, likely)
    assert hallucinated_token(vlm, against, ids, word, PreferenceConfig()) == token(vlm, likely)
    assert hallucinated_token(vlm, spoken_for, ids, word, PreferenceConfig()) == token(vlm, other)


def test_top_candidates_stand_in_the_place_of_alpha(vlm: VLM, left: Any) -> None:
    """p(·|i') = left .9, right .05, temporal .02, frontal .01: α = .1 leaves left alone. The K most plausible others: right; right and
    temporal; … of which the lowest P_diff (p(·|i): right .05, temporal .01, frontal .001) is the last."""
    full = log_probs(vlm, {"left": 0.9, "right": 0.05, "temporal": 0.01, "frontal": 0.001})
    cut = log_probs(vlm, {"left": 0.9, "right": 0.05, "temporal": 0.02, "frontal": 0.01})
    for piece in ("</s>", ".", "here"):  # none of them starts a word: they take no place
        cut[0, vlm.tokenizer.convert_tokens_to_ids(piece)] = -1.0
    ids, word = left
    assert hallucinated_token(vlm, Branches(full, cut), ids, word, PreferenceConfig()) is None
    for k, expected in ((1, "right"), (2, "temporal"), (3, "frontal")):
        config = PreferenceConfig(top_candidates=k)
        assert hallucinated_token(vlm, Branches(full, cut), ids, word, config) == token(vlm, expected)


def test_where_only_the_word_itself_is_plausible_there_is_no_replacement(vlm: VLM, left: Any) -> None:
    peaked = log_probs(vlm, {"left": 0.95, "right": 0.04})
    ids, word = left
    assert hallucinated_token(vlm, Branches(peaked, peaked), ids, word, PreferenceConfig()) is None


def test_end_of_sequence_punctuation_and_half_words_are_no_replacements(vlm: VLM, left: Any) -> None:
    """All of these are more plausible than "right": the end, a stop, a piece that continues a word (no space before it)."""
    ids, word = left
    cut = log_probs(vlm, {"left": 0.3, "right": 0.05})
    for piece in ("</s>", ".", "here", "<image>", "Ġ"):
        cut[0, vlm.tokenizer.convert_tokens_to_ids(piece)] = -3.0
    full = cut.clone()
    full[0, token(vlm, "right")] = -0.5
    assert hallucinated_token(vlm, Branches(full, cut), ids, word, PreferenceConfig()) == token(vlm, "right")


def test_positions_without_a_plausible_replacement_are_skipped_and_counted(
    vlm: VLM, records: list[VQARecord], open_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both branches are sure of the right answer: of its 10 or 11 words 5 are coupled, none can be replaced, and no level is made up."""

    def sure(vlm: VLM, prompts: Any, cuts: Any, answers: Sequence[list[int]], known: Any) -> list[Branches]:
        out = []
        for ids in answers:
            peaked = torch.full((len(ids), len(vlm.tokenizer)), -20.0)
            peaked[torch.arange(len(ids)), torch.tensor(ids)] = 0.0
            out.append(Branches(peaked, peaked))
        return out

    monkeypatch.setattr(hscr.preferences, "contrast", sure)
    (result,) = made(vlm, records[:1], open_image, OPEN)
    assert result.levels == ()
    assert result.dropped == {"no_plausible_replacement": len(result.words) // 2, "no_level": 1}


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("left", "Left", True),
        ("lobe", "lobes", True),
        ("temporal", "tempo", True),
        ("enhancing", "enhanced", True),
        ("opacity", "opacities", True),
        ("left", "right", False),
        ("red", "right", False),  # "red" is no "r" with an ending
        ("bed", "bright", False),
        ("yes", "no", False),
        ("frontal", "parietal", False),
    ],
)
def test_variants_of_a_word_are_recognised(a: str, b: str, same: bool) -> None:
    assert same_word(a, b) is same
    assert same_word(b, a) is same


def test_levels_are_nested_replacements_of_whole_words(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    results = made(vlm, records, open_image, OPEN)
    assert any(len(r.levels) > 1 for r in results)
    for result in results:
        coupled = {w.text for w in result.words if w.coupled}
        by_size = sorted(result.levels, key=lambda level: len(level.replaced))
        for level in by_size:
            expected = result.record.answer
            for old, new in level.replaced:
                assert old in coupled
                assert not same_word(old, new)
                assert f" {old}" in f" {result.record.answer}"
                expected = expected.replace(old, new, 1) if expected.count(old) == 1 else level.text
            assert normalized(level.text) != normalized(result.record.answer)
            assert level.text == expected
        for small, large in itertools.pairwise(by_size):
            assert set(small.replaced) < set(large.replaced)
    assert max(len(r.levels) for r in results) <= OPEN.n_candidates


def test_the_most_coupled_word_is_replaced_first(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    for result in made(vlm, records, open_image, OPEN):
        coupled = [w for w in result.words if w.coupled]
        if result.levels and coupled:
            smallest = min(result.levels, key=lambda level: len(level.replaced)).replaced
            best = max(coupled, key=lambda w: w.reward)
            assert best.text in {old for old, _ in smallest}


def test_a_word_that_is_still_growing_when_decoding_stops_is_dropped(
    vlm: VLM, records: list[VQARecord], open_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding that never ends a word ("herehere…") gives half words only: none is used, each is counted."""
    piece = vlm.tokenizer.convert_tokens_to_ids("here")

    def endless(vlm: VLM, prompts: Any, prefixes: Any = None, *, max_tokens: int, **kw: Any) -> list[list[int]]:
        return [[piece] * max_tokens for _ in prompts]

    monkeypatch.setattr(hscr.replacement, "decode", endless)
    for result in made(vlm, [r for r in records if r.answer_type == "open"], open_image, OPEN):
        assert result.levels == ()
        assert result.dropped["replacement_is_no_word"] > 0


def test_redecode_goes_on_from_the_very_tokens_of_the_right_answer(
    vlm: VLM, records: list[VQARecord], open_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix is y_w's own tokens up to the first replaced word: no second space from the chat template."""
    stock, seen = hscr.replacement.decode, []

    def spy(vlm: VLM, prompts: Any, prefixes: Any = None, **kw: Any) -> list[list[int]]:
        seen.append([list(p) for p in prefixes])
        return stock(vlm, prompts, prefixes, **kw)

    monkeypatch.setattr(hscr.replacement, "decode", spy)
    config = dataclasses.replace(OPEN, continuation="redecode", max_new_tokens=8)
    results = made(vlm, records[:1], open_image, config)
    ids = encode_answer(vlm, records[0].question, records[0].answer)
    assert len(seen) == 2  # words grown, then answers continued
    for prefix in seen[1]:
        same = next((i for i, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), len(prefix))
        shared = vlm.tokenizer.decode(ids[:same]).strip()
        assert records[0].answer.startswith(shared)
        assert prefix[0] == ids[0] or not shared
        assert vlm.tokenizer.decode(prefix)[:2].strip(" ") != ""  # one space at most
    assert results[0].levels


def test_splice_keeps_the_remainder_and_redecode_makes_its_own(
    vlm: VLM, records: list[VQARecord], open_image: Any
) -> None:
    """Both begin alike up to the last replacement; spliced answers end as the reference does."""
    spliced = made(vlm, records[:3], open_image, OPEN)
    redone = made(vlm, records[:3], open_image, dataclasses.replace(OPEN, continuation="redecode", max_new_tokens=8))
    assert [r.words for r in spliced] == [r.words for r in redone]
    assert {x.text for r in spliced for x in r.levels} != {x.text for r in redone for x in r.levels}
    for result in spliced:
        for level in result.levels:
            last = max(result.record.answer.rfind(old) + len(old) for old, _ in level.replaced)
            assert level.text.endswith(result.record.answer[last:])


def closed_record(records: list[VQARecord], **changes: Any) -> VQARecord:
    return dataclasses.replace(next(r for r in records if r.answer_type == "closed"), **changes)


def test_closed_opposite_gives_the_other_option_as_the_one_level(
    vlm: VLM, records: list[VQARecord], open_image: Any
) -> None:
    config = PreferenceConfig(closed="opposite", similarity="token_f1", max_similarity=-1.0)
    (result,) = made(vlm, [closed_record(records)], open_image, config)
    assert [x.text for x in result.levels] == ["no"]  # wrong by construction: no similarity limit
    (without,) = made(vlm, [closed_record(records, options=())], open_image, config)
    assert [x.text for x in without.levels] == ["no"]


def test_closed_opposite_of_several_options_is_what_the_model_says_from_habit(
    vlm: VLM, records: list[VQARecord], open_image: Any
) -> None:
    """The wrong option with the largest log-probability under the dropped branch, computed here option by option."""
    from hscr.packing import packed_logits, token_logprobs
    from hscr.visual_tokens import dropped

    config = PreferenceConfig(closed="opposite", similarity="token_f1")
    options = ("axial", "coronal", "sagittal")
    record = closed_record(records, question="Which plane is shown?", answer="axial", options=options)
    (result,) = made(vlm, [record], open_image, config)
    (prompt,) = encode_prompts(vlm, [open_image(record)], [record.question])
    cut = dropped(prompt, config.dropout_ratio, f"1/{record.id}", 0)

    def log_probability(option: str) -> float:
        ids = encode_answer(vlm, record.question, option)
        with torch.no_grad():
            return float(token_logprobs(packed_logits(vlm, [cut], [[ids]])[0][0], ids).sum())

    assert [x.text for x in result.levels] == [max(options[1:], key=log_probability)]


def test_closed_without_another_option_has_no_level(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    (result,) = made(
        vlm, [closed_record(records, answer="maybe", options=())], open_image, PreferenceConfig(similarity="token_f1")
    )
    assert result.levels == ()
    assert result.dropped["no_level"] == 1


def test_closed_skip_gives_no_level_and_says_so(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    (result,) = made(vlm, [closed_record(records)], open_image, PreferenceConfig(closed="skip", similarity="token_f1"))
    assert result.levels == ()
    assert result.dropped["closed_question"] == 1


def test_closed_replace_treats_it_like_an_open_question(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    record = closed_record(records)
    closed = made(vlm, [record], open_image, OPEN)
    opened = made(vlm, [dataclasses.replace(record, answer_type="open")], open_image, OPEN)
    assert closed[0].levels == opened[0].levels


def test_generation_is_deterministic_and_a_resumed_one_gives_the_same_records(
    vlm: VLM, records: list[VQARecord], open_image: Any, tiny_folder: Path
) -> None:
    """The second half in a fresh process' stead: a freshly loaded model with an empty feature cache, images repeated across halves."""
    from hscr.model import load_model

    config = PreferenceConfig(batch_size=4, similarity="token_f1")
    repeated = [dataclasses.replace(r, id=f"again-{r.id}", image=records[0].image) for r in records[:4]]
    whole = made(vlm, records[:4] + repeated, open_image, config)
    assert made(vlm, records[:4] + repeated, open_image, config) == whole
    assert made(load_model(tiny_folder, device="cpu"), repeated, open_image, config) == whole[4:]


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("reward", REWARDS)
def test_every_perturbation_with_every_reward_gives_levels(
    vlm: VLM, records: list[VQARecord], open_image: Any, perturbation: str, reward: str
) -> None:
    config = dataclasses.replace(OPEN, perturbation=perturbation, reward=reward, n_masks=2)
    results = made(vlm, records[:3], open_image, config)
    assert any(r.levels for r in results)
    rewards = [w.reward for r in results for w in r.words]
    assert any(rewards)
    assert reward == "signed" or min(rewards) >= 0
    assert results != made(vlm, records[:3], open_image, dataclasses.replace(config, n_masks=1))
    zero = made(vlm, records[:3], open_image, dataclasses.replace(config, dropout_ratio=0.0))
    assert all(abs(w.reward) <= 2e-6 for r in zero for w in r.words)


def test_the_perturbations_and_the_rewards_differ(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    seen = [
        [w.reward for r in made(vlm, records[:2], open_image, dataclasses.replace(OPEN, **change)) for w in r.words]
        for change in [*({"perturbation": p} for p in PERTURBATIONS), {"reward": "abs"}, {"reward": "js"}]
    ]
    assert len({tuple(s) for s in seen}) == 6


def test_random_coupling_replaces_as_many_words_and_others(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    """The reward of a word doesn't matter to it; the seed and the record's id do."""
    config = dataclasses.replace(OPEN, coupling="random", top_candidates=3)
    by_reward = made(vlm, records[:3], open_image, dataclasses.replace(config, coupling="reward"))
    by_chance = made(vlm, records[:3], open_image, config)
    assert [[w.reward for w in r.words] for r in by_chance] == [[w.reward for w in r.words] for r in by_reward]
    assert [[w.coupled for w in r.words] for r in by_chance] != [[w.coupled for w in r.words] for r in by_reward]
    assert by_chance == made(vlm, records[:3], open_image, config)
    other = list(generate(vlm, records[:3], open_image, config, token_f1, seed=2))
    assert [[w.coupled for w in r.words] for r in by_chance] != [[w.coupled for w in r.words] for r in other]


def test_masks_depend_on_record_and_seed(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    one = made(vlm, records[:1], open_image, OPEN)[0]
    other_id = made(vlm, [dataclasses.replace(records[0], id="other")], open_image, OPEN)[0]
    other_seed = next(generate(vlm, records[:1], open_image, OPEN, token_f1, seed=2))
    assert one.words != other_id.words
    assert one.words != other_seed.words


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1), max_size=12), st.integers(1, 5), st.floats(0, 0.5), st.floats(-0.5, 1))
def test_kept_levels_always_hold_gap_order_and_limit(values: list[float], n: int, gap: float, limit: float) -> None:
    kept, dropped = rerank(values, n, gap, limit)
    chosen = [values[i] for i in kept]
    assert len(kept) <= n
    assert len(kept) + sum(dropped.values()) == len(values)
    assert all(s <= limit for s in chosen)
    assert all(a - b >= gap - 1e-6 for a, b in itertools.pairwise(chosen))
    assert chosen == sorted(chosen, reverse=True)
    assert bool(kept) == any(v <= limit for v in values)
    if kept:
        assert chosen[0] == max(v for v in values if v <= limit)


def test_levels_of_generated_records_hold_gap_and_limit(vlm: VLM, records: list[VQARecord], open_image: Any) -> None:
    config = PreferenceConfig(similarity="token_f1")
    for result in made(vlm, records, open_image, config):
        if result.record.answer_type == "open":
            values = [x.similarity for x in result.levels]
            assert len(values) <= 3
            assert all(v <= 0.9 for v in values)
            assert all(a - b >= 0.1 - 1e-6 for a, b in itertools.pairwise(values))
            texts = [x.text for x in result.levels]
            assert values == pytest.approx(token_f1(result.record.answer, texts), abs=1e-6)


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_shards_in_order_are_one_workers_result(vlm: VLM, records: list[VQARecord], open_image: Any, of: int) -> None:
    config = dataclasses.replace(OPEN, batch_size=2, candidates="random")
    whole = made(vlm, records, open_image, config)
    parts = []
    for part in range(1, of + 1):
        start, stop = shard_bounds(len(records), 2, part, of)
        parts += list(generate(vlm, records, open_image, config, token_f1, seed=1, start=start, stop=stop))
    assert parts == whole


def test_shards_by_hand() -> None:
    """Seven records in batches of two are four batches: 1 and 1 and 2 of them for three shards; a fifth shard of five gets none twice."""
    assert [shard_bounds(7, 2, part, 3) for part in (1, 2, 3)] == [(0, 2), (2, 4), (4, 7)]
    assert [shard_bounds(7, 2, part, 5) for part in range(1, 6)] == [(0, 0), (0, 2), (2, 4), (4, 6), (6, 7)]
    for part in (0, 4):
        with pytest.raises(ValueError, match="shard: must be 1/3 to 3/3"):
            shard_bounds(7, 2, part, 3)


def test_a_replacement_word_is_decoded_until_it_is_whole(
    vlm: VLM, records: list[VQARecord], open_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same candidates as with eight tokens for every word, from far fewer."""
    stock, counts = hscr.replacement.decode, []

    def counted(keep: bool) -> Callable[..., Any]:
        def decode(*args: Any, **kwargs: Any) -> Any:
            ended = kwargs.pop("ended")
            tails = stock(*args, **kwargs, **({"ended": ended} if keep else {}))
            counts[-1] += sum(map(len, tails))
            return tails

        return decode

    results = []
    for keep in (False, True):
        counts.append(0)
        monkeypatch.setattr(hscr.replacement, "decode", counted(keep))
        results.append(made(vlm, records, open_image, OPEN))
    assert results[0] == results[1]
    assert any(level.replaced for p in results[0] for level in p.levels)
    assert counts[1] < 0.7 * counts[0]
