"""The two scorers: the published protocol with its quirks (vectors of the design notes) and the strict one."""

import sys

import pytest

from hscr import scoring
from hscr.records import GroundedWord, VQARecord
from hscr.scoring import (
    check_scorable,
    grounded_words,
    is_right,
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
        ("shouldnt've", "shouldn't've"),  # a contraction of two is mended where one apostrophe is missing …
        ("shouldntve", "shouldntve"),  # … not where both are
        ("mustntve", "mustntve"),
        ("somebody'd", "somebodyd"),  # the wrong way round in the published table
        ("im ive", "im ive"),  # its capital I is never met: the text is lower case by then
        ("none, at 1,5", "0 at 15"),
        ("a/b", "b"),
        ("left -right", "left right"),
        ("x-ray ct - mri", "xray ct mri"),  # one hyphen touches a space, so every hyphen is deleted
        (".5 .b 5.", ".5 b 5"),
        ("." * 40, "." * 8),  # the protocol's count is 32: re.UNICODE stands in the place of the count
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
        ("The left lung.", "left lung", 1.0),
        (
            "left left right",
            "left lung lung",
            0.5,
        ),  # 2 hits said, 2 missing: the reference's counts hold for what is missing
        ("two", "2", 1.0),
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
        ("There is none.", "no", 0),  # "none" has become "0"
        ("not sure", "no", 1),
        ("no lesion", "axial", 0),
        ("nothing axial", "axial", 1),
        ("NO!", "no", 1),
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
        ("no pneumonia", "no pneumonia", ("pneumonia", "no pneumonia"), 1),  # the longer option holds the shorter
        ("pneumonia", "no pneumonia", ("pneumonia", "no pneumonia"), 0),
        ("pneumonia, no pneumonia", "no pneumonia", ("pneumonia", "no pneumonia"), 0),
        (
            "left lung base",
            "left lung",
            ("left lung", "lung base"),
            0,
        ),  # they overlap, neither holds the other: both are named
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


@pytest.mark.parametrize("said", ["A well-defined mass.", "a well defined mass", "WELL-DEFINED"])
def test_hyphenated_grounded_words_are_scored(said: str) -> None:
    margin = GroundedWord("well-defined", ("well-defined", "ill-defined"))
    assert grounded_words(said, [margin]) == [True]
    assert grounded_words("ill-defined", [margin]) == [False]
    assert grounded_words("well-defined or ill-defined", [margin]) == [False]
    assert grounded_words("defined well", [margin]) == [False]


def test_a_word_within_a_longer_one_of_its_category_is_not_said() -> None:
    """ "fronto-parietal" names one region, not also "parietal"; said beside it, both are."""
    region = GroundedWord("fronto-parietal", ("parietal", "frontal", "fronto-parietal"))
    assert grounded_words("a fronto-parietal lesion", [region]) == [True]
    assert grounded_words("a fronto-parietal and parietal lesion", [region]) == [False]
    assert grounded_words("a fronto-parietal lesion", [GroundedWord("parietal", region.among)]) == [False]


def test_score_names_say_type_and_scorer() -> None:
    is_open = VQARecord("a", "i", "q", "left frontal", grounded=(GroundedWord("left", ("left", "right")),))
    assert score(is_open, "left") == {"open/llava_med": 0.5, "open/strict": 0.5, "open/grounded_words": 1.0}
    closed = VQARecord("a", "i", "q", "no", answer_type="closed", options=("yes", "no"))
    assert score(closed, "It is normal") == {"closed/llava_med": 1.0, "closed/strict": 0.0}
    assert "open/grounded_words" not in score(VQARecord("a", "i", "q", "left"), "left")


CAPTION = VQARecord("a", "i", "Describe.", "the cat sat on the mat", answer_type="caption")


def test_captions_are_scored_by_bleu_and_rouge() -> None:
    """ "the cat sat on mat" against "the cat sat on the mat": 5 words, 6 in the reference.

    BLEU-4: n-gram precisions 5/5, 3/4 ("on mat" is not there), 2/3, 1/2; brevity exp(1 − 6/5):
    (1 · 3/4 · 2/3 · 1/2)^(1/4) · e^−0.2 = 0.25^0.25 · 0.8187 = 0.7071 · 0.8187 = 0.5789.
    ROUGE-L: the longest common subsequence is all 5 words: P = 1, R = 5/6, F1 = 10/11.
    """
    found = score(CAPTION, "the cat sat on mat")
    assert found == {"caption/bleu": pytest.approx(0.5789, abs=1e-4), "caption/rouge_l": pytest.approx(10 / 11)}
    assert score(CAPTION, CAPTION.answer) == {"caption/bleu": pytest.approx(1.0), "caption/rouge_l": 1.0}
    assert score(CAPTION, "") == {"caption/bleu": 0.0, "caption/rouge_l": 0.0}


def test_a_missing_caption_library_is_named_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)  # as if it were not installed
    scoring._caption_libraries.cache_clear()
    check_scorable([VQARecord("a", "i", "q", "left")])
    with pytest.raises(ValueError, match=r"pip install 'hscr\[caption\]'"):
        check_scorable([CAPTION])


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ({"closed/llava_med": 0.0, "closed/strict": 1.0}, True),
        ({"closed/llava_med": 1.0, "closed/strict": 0.0}, False),
        ({"open/strict": 0.1, "open/grounded_words": 1.0}, True),
        ({"open/strict": 1.0, "open/grounded_words": 0.5}, False),
        ({"open/strict": 0.5}, True),
        ({"open/strict": 0.49}, False),
        ({"caption/bleu": 1.0}, None),
    ],
)
def test_right_means_the_strict_score_or_every_grounded_word(scores: dict[str, float], right: bool | None) -> None:
    assert is_right(scores) is right
