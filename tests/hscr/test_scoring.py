"""The two scorers: the published protocol with its quirks (vectors of the design notes) and the strict one."""

import pytest

from hscr.records import GroundedWord, VQARecord
from hscr.scoring import (
    grounded_words,
    llava_med_closed,
    llava_med_normalize,
    llava_med_recall,
    score,
    strict_closed,
    strict_recall,
    strict_words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Chest X-Ray.", "chest x ray"),
        ("2.5 cm, left", "2.5 cm left"),
        ("1,000 mm", "1000 mm"),
        ("T2-weighted", "t2 weighted"),
        ("a.b.c", "abc"),
        ("None", "0"),
        ("two or ten lesions", "2 or 10 lesions"),
        ("an apple and the pear", "apple and pear"),
        ("it isnt there", "it isn't there"),
        ("", ""),
    ],
)
def test_llava_med_normalisation(text: str, expected: str) -> None:
    assert llava_med_normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("left left left", "left lung", 0.75),  # 3 hits by the prediction's count, 1 missing word: 3/4
        ("left lung", "left lung", 1.0),
        ("right", "left lung", 0.0),
        ("", "left", 0.0),
        ("left", "", 0.0),
    ],
)
def test_llava_med_recall_counts_by_the_prediction(prediction: str, reference: str, recall: float) -> None:
    assert llava_med_recall(prediction, reference) == pytest.approx(recall)


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("It is normal", "no", 1),  # "no" is within "normal"
        ("left", "left", 0),  # neither yes nor no
        ("Yes, there is.", "yes", 1),
        ("No.", "yes", 0),
        ("yes and no", "no", 1),
    ],
)
def test_llava_med_closed_keeps_the_protocols_quirks(prediction: str, reference: str, right: int) -> None:
    assert llava_med_closed(prediction, reference) == right


def test_strict_recall_uses_true_counts() -> None:
    """Reference "left lung": of its 2 words the prediction "left left left" holds one."""
    assert strict_recall("left left left", "left lung") == 0.5
    assert strict_recall("lung, left", "left lung") == 1.0
    assert strict_recall("x", "") == 0.0


def test_strict_words_split_hyphens_and_keep_decimals() -> None:
    assert strict_words("T2-weighted, 2.5 cm (Left)") == ["t", "2", "weighted", "2.5", "cm", "left"]


@pytest.mark.parametrize(
    ("prediction", "reference", "options", "right"),
    [
        ("It is normal", "no", (), 0),
        ("no", "no", (), 1),
        ("No, there is none", "no", ("yes", "no"), 1),
        ("yes and no", "no", (), 0),
        ("maybe", "no", (), 0),
        ("the left", "left", ("left", "right"), 1),
        ("left or right", "left", ("left", "right"), 0),
        ("in the left lung", "left lung", ("left lung", "right lung"), 1),
        ("lung", "left lung", ("left lung", "right lung"), 0),
        ("axial", "axial", (), 1),  # the reference is an option even where none is given
    ],
)
def test_strict_closed_wants_exactly_one_option(
    prediction: str, reference: str, options: tuple[str, ...], right: int
) -> None:
    assert strict_closed(prediction, reference, options) == right


def test_grounded_word_counts_only_without_its_rivals() -> None:
    side = GroundedWord("left", ("left", "right"))
    region = GroundedWord("frontal", ("frontal", "temporal"))
    assert grounded_words("A lesion in the LEFT frontal lobe.", [side, region]) == [True, True]
    assert grounded_words("left or right, temporal", [side, region]) == [False, False]
    assert grounded_words("leftover", [side]) == [False]


def test_grounded_word_missing_from_its_own_category_still_counts() -> None:
    assert grounded_words("left", [GroundedWord("left", ("right",))]) == [True]


def test_score_names_say_type_and_scorer() -> None:
    is_open = VQARecord("a", "i", "q", "left frontal", grounded=(GroundedWord("left", ("left", "right")),))
    assert score(is_open, "left") == {"open/llava_med": 0.5, "open/strict": 0.5, "open/grounded_words": 1.0}
    closed = VQARecord("a", "i", "q", "no", "closed", ("yes", "no"))
    assert score(closed, "It is normal") == {"closed/llava_med": 1.0, "closed/strict": 0.0}
    assert "open/grounded_words" not in score(VQARecord("a", "i", "q", "left"), "left")
