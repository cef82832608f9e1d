"""The grounding score against wrong answers: AUROC with ties, the accuracy–coverage curve, and the calibrated threshold, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hscr.selective import (
    COVERAGES,
    Judged,
    auroc,
    flagging,
    in_calibration_part,
    interval,
    separation,
    youden_threshold,
)


def judged(wrong: list[float], right: list[float]) -> list[Judged]:
    return [Judged(s, True) for s in wrong] + [Judged(s, False) for s in right]


@pytest.mark.parametrize(
    ("wrong", "right", "area"),
    [
        ([1, 2], [3, 4], 1.0),
        ([3, 4], [1, 2], 0.0),
        ([1, 3], [2, 4], 0.75),  # pairs 1<2, 1<4, 3<4 of 4
        ([1, 2], [2, 3], 0.875),  # 1<2, 1<3, 2<3 and a tie counted half: 3.5 of 4
        ([5, 5], [5], 0.5),
    ],
)
def test_auroc_counts_pairs_and_halves_ties(wrong: list[float], right: list[float], area: float) -> None:
    assert auroc(judged(wrong, right)) == pytest.approx(area)


def test_auroc_of_one_class_is_no_number() -> None:
    assert np.isnan(auroc(judged([1, 2], [])))
    assert separation(judged([], [1.0, 2.0]), 100)["auroc"] is None


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_equals_the_count_over_all_pairs(rows: list[tuple[int, bool]]) -> None:
    wrong, right = [s for s, w in rows if w], [s for s, w in rows if not w]
    if not wrong or not right:
        return
    pairs = [(r > w) + 0.5 * (r == w) for w in wrong for r in right]
    assert auroc([Judged(s, w) for s, w in rows]) == pytest.approx(sum(pairs) / len(pairs))


def test_the_lowest_scores_are_withheld_first() -> None:
    """Scores 1…4, the two lowest wrong: accuracy 1 up to a coverage of 1/2, (2 of 3 kept) at 3/4, 2/4 at 1."""
    curve = separation(judged([1, 2], [3, 4]), 100)["coverage"]
    at = {point["coverage"]: point["accuracy"] for point in curve}
    assert tuple(at) == COVERAGES
    assert (at[0.25], at[0.5], at[0.75], at[1.0]) == pytest.approx((1.0, 1.0, 2 / 3, 0.5))


def test_within_a_tie_the_kept_answers_are_a_fair_draw() -> None:
    """Four answers of one score, one right: whatever the coverage, a kept one is right with probability 1/4."""
    curve = separation(judged([1, 1, 1], [1]), 100)["coverage"]
    assert [p["accuracy"] for p in curve] == pytest.approx([0.25] * len(COVERAGES))


def test_a_grouped_resample_equals_the_resampled_answers() -> None:
    """The interval's ends are those of AUROCs computed answer by answer on the same draws."""
    random = np.random.default_rng(4)
    answers = [Judged(float(random.integers(0, 6)), bool(random.integers(0, 2))) for _ in range(30)]
    draws = np.random.default_rng(0).integers(0, 30, (150, 30))
    areas = [auroc([answers[i] for i in row]) for row in draws]
    found = separation(answers, 150)["auroc"]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(areas, [2.5, 97.5])))
    assert found["mean"] == pytest.approx(auroc(answers))


def test_auroc_interval_matches_its_known_width() -> None:
    """100 wrong and 100 right of independent normals 1 apart: AUROC .76; Hanley–McNeil's standard error is .034, 95 % = ±.067."""
    random = np.random.default_rng(0)
    found = separation(judged(list(random.normal(0, 1, 100)), list(random.normal(1, 1, 100))), 1000)["auroc"]
    assert found["high"] - found["low"] == pytest.approx(0.133, abs=0.02)


def test_threshold_is_where_most_wrong_answers_go_for_the_fewest_right_ones() -> None:
    """Wrong 1, 2, 5; right 4, 6, 7. Below 3: 2/3 − 0 = .67; below 4.5: 2/3 − 1/3; below 5.5: 1 − 1/3 = .67, which flags more; so 3."""
    assert youden_threshold(judged([1, 2, 5], [4, 6, 7])) == 3.0
    with pytest.raises(ValueError, match="two different scores"):
        youden_threshold(judged([1, 1], [1]))


def test_flag_is_measured_on_answers_that_the_threshold_never_saw() -> None:
    """Calibration: wrong below 0, right above; threshold 0. Rest: −5 (wrong) and −4 (right) flagged, 3, 4 (right), 5 (wrong) kept."""
    calibration = judged([-float(i) for i in range(1, 21)], [float(i) for i in range(1, 21)])
    rest = judged([-5.0, 5.0], [-4.0, 3.0, 4.0])
    found = flagging(calibration, rest, 200)
    assert found["threshold"] == 0.0
    assert found["calibration"] == {"n": 40, "n_wrong": 20, "auroc": {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 40}}
    measured = found["measured"]
    assert measured["flagged"]["mean"] == pytest.approx(2 / 5)
    assert measured["accuracy"]["mean"] == pytest.approx(3 / 5)
    assert (measured["accuracy_kept"]["mean"], measured["accuracy_kept"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (measured["accuracy_flagged"]["mean"], measured["accuracy_flagged"]["n"]) == (0.5, 2)
    assert json.loads(json.dumps(found)) == found


def test_no_threshold_where_the_score_says_nothing() -> None:
    random = np.random.default_rng(1)
    noise = judged(list(random.normal(0, 1, 40)), list(random.normal(0, 1, 40)))
    found = flagging(noise, noise, 200)
    assert found["threshold"] is None
    assert "does not tell wrong answers from right ones" in found["reason"]
    reversed_ = judged([float(i) for i in range(20)], [-1.0 - i for i in range(20)])
    assert flagging(reversed_, [], 200)["threshold"] is None


def test_no_threshold_from_a_handful_of_answers() -> None:
    found = flagging(judged([1.0] * 19, [2.0] * 50), [], 200)
    assert found["threshold"] is None
    assert "19 wrong and 50 right answers; 20 of each are needed" in found["reason"]
    assert flagging(judged([1.0] * 20, [2.0] * 50), [], 200)["threshold"] == 1.5
    assert flagging([], [], 200)["threshold"] is None


def test_parts_follow_the_key_and_the_share() -> None:
    keys = [f"r{i}" for i in range(2000)]
    part = [in_calibration_part(k, 0.3) for k in keys]
    assert part == [in_calibration_part(k, 0.3) for k in keys]
    assert sum(part) / 2000 == pytest.approx(0.3, abs=0.03)
    assert not any(in_calibration_part(k, 0.0) for k in keys)
    assert all(b for k, a in zip(keys, part, strict=True) if a for b in [in_calibration_part(k, 0.6)])


def test_an_interval_over_clusters_knows_that_their_items_share_their_chance() -> None:
    """Ten clusters of forty equal items: ten draws, not four hundred. Standard error .5/√10 = .158 instead of .025."""
    values = [float(c % 2) for c in range(10) for _ in range(40)]
    clusters = [c for c in range(10) for _ in range(40)]
    found, single = interval(values, 2000, clusters=clusters), interval(values, 2000)
    assert found["high"] - found["low"] == pytest.approx(4 * 0.158, abs=0.06)
    assert single["high"] - single["low"] == pytest.approx(4 * 0.025, abs=0.02)
    assert found["mean"] == single["mean"] == 0.5
    assert interval(values, 500, clusters=[f"{i:03}" for i in range(400)]) == interval(values, 500)
