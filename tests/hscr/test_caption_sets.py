"""BLEU of sets of captions: sacrebleu's number, with intervals, in every table where captions are evaluated."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from sacrebleu.metrics import BLEU

from hscr import figures
from hscr.caption_sets import METRIC, bleu_interval, caption_counts
from hscr.config import EvaluationConfig
from hscr.predictions import Prediction
from hscr.progress import evaluation_table
from hscr.report import render
from hscr.scoring import caption_scores
from hscr.tables import summarize

CONFIG = EvaluationConfig(n_bootstrap=200)
REFERENCES = [
    "a large bright lesion in the left frontal lobe",
    "small dark spot lies right",
    "no lesion is seen here",
    "",
]
SAID = ["a large bright lesion in the left frontal lobe", "the spot is dark and small", "no lesion", "nothing at all"]


def corpus_bleu(said: list[str], references: list[str]) -> float:
    """The oracle: sacrebleu itself, on the whole set."""
    return BLEU().corpus_score(said, [references]).score / 100


def test_a_captions_counts_are_its_n_grams_and_lengths() -> None:
    """ "the cat sat on mat" against "the cat sat on the mat": 5 of 5 words, 3 of 4 pairs ("on mat" is not there), 2 of 3, 1 of 2."""
    found = caption_counts("the cat sat on mat", "the cat sat on the mat")
    assert found.tolist() == [5, 3, 2, 1, 5, 4, 3, 2, 5, 6]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_sets_bleu_is_sacrebleus(n: int) -> None:
    found = bleu_interval(list(map(caption_counts, SAID[:n], REFERENCES[:n])), 100)
    assert found["mean"] == pytest.approx(corpus_bleu(SAID[:n], REFERENCES[:n]), abs=1e-12)
    assert found["n"] == n
    assert found["low"] <= found["high"]


def test_a_sets_bleu_adds_counts_before_dividing() -> None:
    """Eight words of one caption right, none of the other's five; shorter or equal lengths, so no brevity penalty.

    n-gram hits and totals over both: 8/13, 7/11, 6/9, 5/7; the fourth root of their product, 0.657…, is not the mean of 1 and 0.
    """
    right, wrong = "a large lesion in the left frontal lobe", "nothing at all is seen"
    sides = [caption_counts(right, right), caption_counts(wrong, "small dark spot lies right")]
    assert bleu_interval(sides, 100)["mean"] == pytest.approx((8 / 13 * 7 / 11 * 6 / 9 * 5 / 7) ** 0.25)


def test_intervals_resample_captions_and_whole_clusters() -> None:
    """One whole caption and one that shares nothing with its reference (BLEU 0 by 1-grams alone): a resample of two has only the first,
    only the second, or both. In one cluster both are always drawn, and the interval is a point."""
    sides = [caption_counts("a b c d e", "a b c d e"), caption_counts("f g h i j", "k l m n o")]
    found = bleu_interval(sides, 400)
    assert (found["low"], found["high"]) == (0.0, 1.0)
    assert 0 < found["mean"] < 1
    point = bleu_interval(sides, 400, clusters=["q", "q"])
    assert point["low"] == point["high"] == point["mean"]


def test_gains_are_paired_by_caption() -> None:
    sides = list(map(caption_counts, SAID, REFERENCES))
    same = bleu_interval(sides, 200, minus=sides)
    assert (same["mean"], same["low"], same["high"]) == (0.0, 0.0, 0.0)
    perfect = list(map(caption_counts, REFERENCES, REFERENCES))
    gain = bleu_interval(perfect, 200, minus=sides)
    assert gain["mean"] == pytest.approx(corpus_bleu(REFERENCES, REFERENCES) - corpus_bleu(SAID, REFERENCES))


WORSE = ["a small dark area in the left frontal lobe", *SAID[1:3]]  # no caption is its reference


def captions() -> list[Prediction]:
    """The adapter says the references, the base something else; another image changes everything. One open question beside them."""
    rows = []
    for policy, condition, texts in (
        ("base", "real", WORSE),
        ("base", "shuffled", ["x"] * 3),
        ("adapter", "real", REFERENCES[:3]),
        ("adapter", "shuffled", ["x"] * 3),
    ):
        for i, text in enumerate(texts):
            scores = caption_scores(text, REFERENCES[i])
            rows.append(
                Prediction(policy, condition, f"r{i}", text, scores, question="Describe.", reference=REFERENCES[i])
            )
        rows.append(Prediction(policy, condition, "open", "left", {"open/strict": 1.0}, reference="left"))
    return rows


def test_every_table_of_an_evaluation_has_the_sets_bleu() -> None:
    summary = summarize(captions(), CONFIG)
    base, adapter = (summary["scores"][p]["real"][METRIC] for p in ("base", "adapter"))
    assert base["mean"] == pytest.approx(corpus_bleu(WORSE, REFERENCES[:3]))
    assert (adapter["mean"], adapter["n"]) == (pytest.approx(1.0), 3)
    assert summary["gain"]["real"][METRIC]["mean"] == pytest.approx(1 - base["mean"])
    assert summary["gain"]["shuffled"][METRIC]["mean"] == 0
    assert summary["reliance"]["adapter"][METRIC]["mean"] == pytest.approx(1.0)
    assert summary["verdict"][METRIC]["result"] == "better"
    assert summary["verdict"][METRIC]["gone_when_shuffled"] is True
    assert base["mean"] != pytest.approx(summary["scores"]["base"]["real"]["caption/bleu"]["mean"], abs=0.01)
    assert len(figures.score_panels(summary["scores"])) == 4
    printed = io.StringIO()
    Console(file=printed, width=200).print(evaluation_table(summary))
    assert f"{METRIC} " in printed.getvalue()
    lineage, training = {"model_name": "m", "hscr": "0"}, {"steps": 0, "displaced": False}
    parts = {"records": 0, "with_levels": 0, "levels": {}, "dropped": {}}
    page = render(
        "report.html",
        lineage=lineage,
        config={"optimization": {"objective": "hscr"}},
        preferences=parts,
        training=training,
        evaluation=summary,
        figures={"scores": [], "coverage": []},
        examples=[],
        answers=[],
        data={},
    )
    assert page.count(METRIC) == 3  # a tile, a row of the scores, a row of the reliance


def test_predictions_from_before_references_were_stored_have_no_bleu_of_the_set() -> None:
    rows = [Prediction("base", "real", "a", "x", {"caption/bleu": 0.5, "caption/rouge_l": 0.5})]
    assert summarize(rows, CONFIG)["scores"]["base"]["real"].keys() == {"caption/bleu", "caption/rouge_l"}


def test_counts_fit_any_order_of_captions() -> None:
    sides = list(map(caption_counts, SAID, REFERENCES))
    turned = bleu_interval(sides[::-1], 100)
    assert turned["mean"] == bleu_interval(sides, 100)["mean"]
    assert np.array(sides).shape == (4, 10)
