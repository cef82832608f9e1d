"""Similarity to the right answer and the re-ranking by it. Paper §3.2."""

import pytest

from hscr.similarity import Similarity, load_similarity, rerank, token_f1
from hscr.words import normalized


@pytest.fixture(scope="module")
def minilm() -> Similarity:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return load_similarity("minilm")


def test_token_f1_by_hand() -> None:
    """Reference 3 words. 2 of 3 shared: 2·2/(3+3) = 2/3. One word, shared: 2·1/(3+1) = 0.5. "left left": one counts, 2·1/(3+2) = 0.4."""
    scores = token_f1(
        "left frontal lobe", ["Left parietal lobe.", "left", "left left", "right", "", "Lobe frontal LEFT"]
    )
    assert scores == pytest.approx([2 / 3, 0.5, 0.4, 0.0, 0.0, 1.0])


def test_normalized_forgets_case_and_punctuation() -> None:
    assert normalized(" The left,  lobe. ") == "the left lobe"


def test_rerank_by_hand() -> None:
    """.95 is above .9. Keep .88; .85 is only .03 below; keep .70 (.18 below); .65 is .05 below; keep .3. Order in, indices out."""
    kept, dropped = rerank([0.3, 0.95, 0.65, 0.88, 0.70, 0.85], 3, 0.1, 0.9)
    assert kept == [3, 4, 0]
    assert dropped == {"too_similar": 1, "gap_too_small": 2}


def test_rerank_takes_no_more_than_n_levels_and_never_pads() -> None:
    assert rerank([0.8, 0.6, 0.4, 0.2], 2, 0.1, 0.9) == ([0, 1], {"enough_levels": 2})
    assert rerank([0.8], 3, 0.1, 0.9) == ([0], {})
    assert rerank([], 3, 0.1, 0.9) == ([], {})


def test_rerank_accepts_a_gap_that_floats_miss_by_a_hair() -> None:
    """0.8 − 0.7 is 0.10000000000000009 and 0.9 − 0.8 is 0.09999999999999998: both are a gap of 0.1."""
    assert rerank([0.9, 0.8, 0.7], 3, 0.1, 0.9)[0] == [0, 1, 2]


def test_equal_similarities_keep_their_order() -> None:
    assert rerank([0.5, 0.5], 2, 0.0, 0.9)[0] == [0, 1]


def test_minilm_works_offline_and_ranks_synonyms_above_unrelated(minilm: Similarity) -> None:
    synonym, opposite, unrelated = minilm(
        "The image is an x-ray of the chest.",
        ["The picture is a chest radiograph.", "There is no lesion.", "Bananas are cheap on Tuesday."],
    )
    assert synonym > opposite > unrelated
    assert minilm("left lobe", ["left lobe"])[0] == pytest.approx(1.0, abs=1e-5)
    assert minilm("left", []) == []


def test_minilm_gives_the_same_value_whatever_was_asked_before() -> None:
    """A resumed run has seen fewer answers; its similarities, and with them its levels, are the same bit for bit."""
    reference = "There is a large bright lesion in the left frontal lobe."
    candidates = [
        "left",
        "a small dark lesion there",
        "no",
        "axial",
        "It lies in the right temporal region of this slice.",
    ]
    first, second = load_similarity("minilm"), load_similarity("minilm")
    for seen in candidates:  # each in a batch with other padding than beside the reference
        first(seen, ["x"])
    assert first(reference, candidates) == second(reference, candidates)


def test_unknown_encoder_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="similarity '/no/such/encoder': cannot be loaded"):
        load_similarity("/no/such/encoder")
