"""Evaluation: conditions, paired intervals, verdict, and tables computed again from the stored file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hscr.answer import Answer, Answerer, AnswerRequest
from hscr.config import EvaluationConfig
from hscr.evaluate import derangement, evaluate, plan
from hscr.images import decode_image
from hscr.model import VLM
from hscr.predictions import Prediction, read_predictions
from hscr.records import VQARecord, read_records, to_json
from hscr.selective import in_calibration_part, interval
from hscr.tables import summarize, verdict

CONFIG = EvaluationConfig(max_new_tokens=4, batch_size=3, n_bootstrap=200)


@given(st.integers(2, 60), st.integers(0, 1000))
def test_derangement_is_a_permutation_without_fixed_points(n: int, seed: int) -> None:
    order = derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert all(i != j for i, j in enumerate(order))
    assert order == derangement(n, seed)


def test_derangement_depends_on_the_seed() -> None:
    assert derangement(20, 1) != derangement(20, 2)


def test_plan_covers_policies_conditions_and_records_in_order() -> None:
    batches = plan(4, ["base", "adapter"], CONFIG)
    assert len(batches) == 2 * 3 * 2
    assert batches[:2] == [("base", "real", [0, 1, 2]), ("base", "real", [3])]
    assert [b[1] for b in plan(1, ["base"], CONFIG)] == ["real"]  # one record has no other image
    assert [b[1] for b in plan(2, ["base"], EvaluationConfig(counterfactual=False))] == ["real"]


class Recorder:
    """In the place of an Answerer: notes the requests, says the question back."""

    def __init__(self) -> None:
        self.requests: list[AnswerRequest] = []

    def answer(self, requests: list[AnswerRequest]) -> list[Answer]:
        self.requests += requests
        return [Answer(r.question, [], None, None, "stop", 0, 0) for r in requests]


def coloured(n: int) -> tuple[list[VQARecord], Any]:
    records = [VQARecord(f"r{i}", f"{i}.png", f"q{i}", "left") for i in range(n)]
    return records, lambda r: Image.new("RGB", (4 + int(r.id[1:]), 5), (10 + int(r.id[1:]), 0, 0))


def test_blank_is_black_of_the_same_size_and_shuffled_is_another_records_image() -> None:
    records, open_image = coloured(5)
    asked = Recorder()
    made = [p for batch in evaluate(asked, records, open_image, {"base": None}, CONFIG) for p in batch]  # type: ignore[arg-type]
    real, blank, shuffled = (asked.requests[i : i + 5] for i in (0, 5, 10))
    assert [r.image.getpixel((0, 0)) for r in real] == [(10 + i, 0, 0) for i in range(5)]
    for i, request in enumerate(blank):
        assert request.image.size == (4 + i, 5)
        assert request.image.getextrema() == ((0, 0),) * 3
    others = [int(r.image.getextrema()[0][0]) - 10 for r in shuffled]  # type: ignore[index]
    assert sorted(others) == list(range(5))
    assert all(i != j for i, j in enumerate(others))
    assert [r.question for r in shuffled] == [f"q{i}" for i in range(5)]
    assert {r.grounding for r in real} == {"summary"}
    assert {r.grounding for r in (*blank, *shuffled)} == {"none"}
    assert [(p.condition, p.id) for p in made[:5]] == [("real", f"r{i}") for i in range(5)]


def test_a_resumed_evaluation_yields_the_remaining_batches() -> None:
    records, open_image = coloured(5)
    batches = list(evaluate(Recorder(), records, open_image, {"base": None}, CONFIG))  # type: ignore[arg-type]
    rest = list(evaluate(Recorder(), records, open_image, {"base": None}, CONFIG, skip_batches=2))  # type: ignore[arg-type]
    assert rest == batches[2:]


def test_interval_of_constant_values_is_a_point() -> None:
    assert interval([0.5] * 7, 200) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 7}


def test_interval_of_a_fair_coin_matches_the_normal_approximation() -> None:
    """n = 400 of mean .5: standard error .5/20 = .025, 95 % = ±1.96 · .025 = ±.049."""
    found = interval([0.0, 1.0] * 200, 4000)
    assert found["low"] == pytest.approx(0.451, abs=0.006)
    assert found["high"] == pytest.approx(0.549, abs=0.006)
    assert found == interval([0.0, 1.0] * 200, 4000)


def test_interval_in_chunks_equals_all_resamples_at_once() -> None:
    x = np.random.default_rng(1).random(3000)
    draws = np.random.default_rng(0).integers(0, 3000, (700, 3000))
    low, high = np.percentile(x[draws].mean(axis=1), [2.5, 97.5])
    found = interval(x.tolist(), 700)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-12)


def predictions(
    values: dict[tuple[str, str], list[float]], texts: dict[str, list[str]] | None = None
) -> list[Prediction]:
    return [
        Prediction(policy, condition, f"r{i}", (texts or {}).get(condition, ["same"] * len(v))[i], {"m": x}, 0.5)
        for (policy, condition), v in values.items()
        for i, x in enumerate(v)
    ]


def test_gains_and_reliance_are_paired_by_record() -> None:
    """adapter − base, record by record: 1, 0, 1, 0 → .5. base: real − shuffled = 0, 1, 0, 1 → .5. Unpaired intervals would be wider:
    with adapter = base + 1 for all the difference is 1 for all, an interval of width 0."""
    base, adapter = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]
    summary = summarize(
        predictions({("base", "real"): base, ("base", "shuffled"): [0.0] * 4, ("adapter", "real"): adapter}), CONFIG
    )
    assert summary["scores"]["base"]["real"]["m"]["mean"] == 0.5
    assert summary["gain"]["real"]["m"]["mean"] == 0.5
    assert summary["reliance"]["base"]["m"]["mean"] == 0.5
    shifted = summarize(predictions({("base", "real"): base, ("adapter", "real"): [x + 1 for x in base]}), CONFIG)
    gain = shifted["gain"]["real"]["m"]
    assert (gain["mean"], gain["low"], gain["high"]) == (1.0, 1.0, 1.0)


def test_pairing_goes_by_id_not_by_place() -> None:
    rows = predictions({("base", "real"): [0.0, 1.0]})
    rows += [Prediction("adapter", "real", f"r{i}", "", {"m": float(i)}) for i in (1, 0)]
    gain = summarize(rows, CONFIG)["gain"]["real"]["m"]
    assert (gain["low"], gain["high"]) == (0.0, 0.0)


def test_sensitivity_is_the_share_of_answers_that_another_image_changes() -> None:
    """Of 4 answers one changes in words; case and punctuation are no change: 1/4."""
    texts = {"real": ["a", "Left.", "b", "b"], "shuffled": ["a", "left", "c", "b"]}
    summary = summarize(predictions({("base", "real"): [0.0] * 4, ("base", "shuffled"): [0.0] * 4}, texts), CONFIG)
    assert summary["sensitivity"]["base"]["mean"] == 0.25
    assert summary["grounding"]["base"]["mean"] == 0.5


def test_image_invariance_counts_open_answers_only() -> None:
    """Open: one of two answers stays word for word the same under another image. The closed one, unchanged, is no visual claim: 1/2."""
    rows = [
        Prediction("base", condition, f"r{i}", text, {f"{kind}/strict": 1.0})
        for condition, texts in (("real", ("a left one", "b", "yes")), ("shuffled", ("A left one.", "c", "yes")))
        for i, (kind, text) in enumerate(zip(("open", "open", "closed"), texts, strict=True))
    ]
    found = summarize(rows, CONFIG)["image_invariant"]["base"]
    assert (found["mean"], found["n"]) == (0.5, 2)


def test_the_blank_images_interval_resamples_questions() -> None:
    """Forty records of two questions; one blank image, so all answers to a question are right together. Over records the mean .5 would
    have an interval of ±.15; over two questions it is [0, 1]. The real image keeps the interval over records."""
    rows = [
        Prediction("base", condition, f"r{i}", "x", {"m": float(i % 2)}, question=f"q{i % 2}")
        for condition in ("real", "blank")
        for i in range(40)
    ]
    summary = summarize(rows, CONFIG)
    blank, real = (summary["scores"]["base"][c]["m"] for c in ("blank", "real"))
    assert (blank["mean"], blank["low"], blank["high"]) == (0.5, 0.0, 1.0)
    assert real["high"] - real["low"] < 0.4
    assert "resample distinct questions" in summary["note"]


def graded(n: int, seed: int = 0) -> list[Prediction]:
    """Open answers whose score is 2 lower where they are wrong, closed ones whose score says nothing; groups of two records."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        kind, right = ("open", "closed")[i % 4 == 0], bool(random.integers(0, 2))
        score = float(random.normal(2.0 if right and kind == "open" else 0.0, 0.5))
        rows.append(
            Prediction("base", "real", f"r{i}", "x", {f"{kind}/strict": float(right)}, score, group=f"g{i // 2}")
        )
    return rows


def test_separation_is_told_by_kind_and_the_flag_comes_from_the_calibration_part_alone() -> None:
    rows = graded(400)
    summary = summarize(rows, CONFIG)
    areas = {k: v["auroc"]["mean"] for k, v in summary["separation"]["base"].items()}
    assert areas["open"] > 0.99
    assert 0.35 < areas["closed"] < 0.65
    assert areas["closed"] < areas["all"] < areas["open"]
    flag = summary["flag"]["base"]
    assert flag["threshold"] is not None
    measured = flag["measured"]
    assert flag["calibration"]["n"] + measured["flagged"]["n"] == 400
    assert 60 < flag["calibration"]["n"] < 180
    assert measured["accuracy_kept"]["mean"] > measured["accuracy"]["mean"] > measured["accuracy_flagged"]["mean"]
    # Wrong scores in the other part move what is measured, never the threshold; and a group is never on both sides.
    kept = [p for p in rows if in_calibration_part(p.group or p.id, CONFIG.calibration_share)]
    assert len(kept) == flag["calibration"]["n"]
    assert {p.group for p in kept}.isdisjoint({p.group for p in rows if p not in kept})
    turned = [p if p in kept else dataclasses.replace(p, grounding=-(p.grounding or 0.0)) for p in rows]
    assert summarize(turned, CONFIG)["flag"]["base"]["threshold"] == flag["threshold"]
    assert summarize(kept, CONFIG)["flag"]["base"]["measured"] is None


def test_captions_and_answers_without_a_score_are_not_judged() -> None:
    rows = [
        Prediction("base", "real", "a", "x", {"caption/bleu": 0.5, "caption/rouge_l": 0.5}, 1.0),
        Prediction("base", "real", "b", "", {"open/strict": 0.0}, None),
        Prediction("base", "real", "c", "", {"open/strict": 0.0}, float("nan")),
    ]
    summary = summarize(rows, CONFIG)
    assert summary["separation"]["base"] == {}
    assert summary["flag"]["base"]["threshold"] is None
    assert summary["scores"]["base"]["real"]["caption/bleu"]["n"] == 1


def test_a_line_that_is_no_prediction_is_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(to_json(Prediction("base", "real", "a", "x", {"m": 1.0}))) + "\n{}\n")
    with pytest.raises(ValueError, match=r"predictions.jsonl: line 2 is no prediction"):
        read_predictions(path)


def span(low: float, high: float) -> dict[str, float]:
    return {"mean": (low + high) / 2, "low": low, "high": high, "n": 9}


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.01, 0.1, "better"), (-0.1, -0.01, "worse"), (-0.01, 0.1, "tie"), (0.0, 0.1, "tie"), (-0.1, 0.0, "tie")],
)
def test_verdict_words_follow_the_interval(low: float, high: float, word: str) -> None:
    assert verdict({"gain": {"real": {"m": span(low, high)}}})["m"]["result"] == word


def test_verdict_says_whether_the_gain_is_gone_without_the_image() -> None:
    gain = {"real": {"m": span(0.1, 0.2)}, "blank": {"m": span(-0.1, 0.1)}}
    assert verdict({"gain": gain})["m"]["gone_when_blank"] is True
    gain["blank"]["m"] = span(0.05, 0.1)
    assert verdict({"gain": gain})["m"]["gone_when_blank"] is False
    assert "gone_when_blank" not in verdict({"gain": {"real": {"m": span(0.1, 0.2)}}})["m"]
    assert verdict({"gain": {}}) == {}


def test_tables_from_the_stored_predictions_equal_those_from_memory(vlm: VLM, data_folder: Path) -> None:
    records = read_records(data_folder)[0]
    made = [
        p
        for batch in evaluate(
            Answerer(vlm),
            records,
            lambda r: decode_image(data_folder / r.image),
            {"base": None, "adapter": None},
            CONFIG,
        )
        for p in batch
    ]
    lines = [json.dumps(to_json(p)) for p in made]
    stored = [Prediction(**json.loads(line)) for line in lines]
    assert stored == made
    summary = summarize(stored, CONFIG)
    assert summary == summarize(made, CONFIG)
    assert summary["sensitivity"]["base"]["mean"] > 0
    assert {m["mean"] for m in summary["gain"]["real"].values()} == {0.0}  # the same policy twice
    assert json.loads(json.dumps(summary)) == summary
