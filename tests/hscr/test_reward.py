"""The self-contrastive reward against arithmetic done by hand. Paper §3.1."""

import math

import pytest
import torch

from hscr.model import VLM, encode_answer, encode_prompts
from hscr.reward import (
    Branches,
    Word,
    alignment_reward,
    branches,
    contrastive_logprobs,
    coupled_words,
    grounding_score,
    jensen_shannon,
    random_words,
    token_rewards,
    word_rewards,
    words_of,
)
from tests.hscr.tiny import picture

FULL = torch.tensor([[0.5, 0.3, 0.2]]).log()
DROPPED = torch.tensor([[0.2, 0.5, 0.3]]).log()


def test_alignment_reward_by_hand() -> None:
    """A vocabulary of three: y = 0: ln(.5/.2) = .916291; y = 1: ln(.3/.5) = −.510826; y = 2: ln(.2/.3) = −.405465."""
    rewards = [float(alignment_reward(FULL, DROPPED, [y])) for y in range(3)]
    assert rewards == pytest.approx([0.916291, -0.510826, -0.405465], abs=1e-6)


def test_absolute_reward_forgets_the_sign() -> None:
    """The rewards above without their sign: .916291, .510826, .405465."""
    both = Branches(FULL.expand(3, 3), DROPPED.expand(3, 3))
    assert token_rewards(both, [0, 1, 2], "abs").tolist() == pytest.approx([0.916291, 0.510826, 0.405465], abs=1e-6)
    assert token_rewards(both, [0, 1, 2]).tolist() == pytest.approx([0.916291, -0.510826, -0.405465], abs=1e-6)


def test_jensen_shannon_by_hand() -> None:
    """m = (.35, .4, .25). KL(p|m) = .5 ln(.5/.35) + .3 ln(.3/.4) + .2 ln(.2/.25) = .178337 − .086305 − .044629 = .047404;
    KL(q|m) = .2 ln(.2/.35) + .5 ln(.5/.4) + .3 ln(.3/.25) = −.111923 + .111572 + .054696 = .054345; half the sum: .050875."""
    assert jensen_shannon(FULL, DROPPED).tolist() == pytest.approx([0.050875], abs=1e-6)
    assert jensen_shannon(DROPPED, FULL).tolist() == pytest.approx([0.050875], abs=1e-6)


def test_jensen_shannon_lies_between_0_for_equal_and_ln_2_for_disjoint_distributions() -> None:
    """p = (1, 0), q = (0, 1): m = (½, ½), both divergences ln 2."""
    one, other = torch.tensor([0.0, -80.0]), torch.tensor([-80.0, 0.0])
    assert float(jensen_shannon(one, other)) == pytest.approx(math.log(2), abs=1e-6)
    torch.manual_seed(0)
    p, q = torch.randn(50, 300).mul(4).log_softmax(-1), torch.randn(50, 300).mul(4).log_softmax(-1)
    assert (jensen_shannon(p, p) == 0).all()
    assert (jensen_shannon(p, q) > 0).all()
    assert (jensen_shannon(p, q) < math.log(2)).all()


def test_js_reward_reads_the_whole_distribution_and_not_the_answers_token() -> None:
    branch = Branches(FULL, DROPPED)
    assert [float(token_rewards(branch, [y], "js")) for y in range(3)] == pytest.approx([0.050875] * 3, abs=1e-6)


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="reward: must be one of signed, abs, js"):
        token_rewards(Branches(FULL, DROPPED), [0], "kl")


def test_random_words_are_as_many_as_coupled_ones_and_drawn_from_their_seed() -> None:
    drawn = {tuple(random_words(8, 10, seed)) for seed in range(40)}
    assert all(len(words) == 4 and set(words) <= set(range(8)) for words in drawn)
    assert len(drawn) > 30
    assert {w for words in drawn for w in words} == set(range(8))
    assert random_words(8, 10, 5) == random_words(8, 10, 5)


def test_contrastive_distribution_by_hand() -> None:
    """β = .9: p ∝ full^1.9 / dropped^.9 = e^.131514, e^−1.663717, e^−1.974356 = 1.140553, .189433, .138850; sum 1.468836."""
    p = contrastive_logprobs(FULL, DROPPED, 0.9).exp()[0]
    assert p.tolist() == pytest.approx([0.776502, 0.128968, 0.094531], abs=2e-6)


def test_contrastive_distribution_forgets_the_gauge() -> None:
    """softmax[(1+β)(logit + a) − β(logit' + b)] is the same for all a and b, so log-softmax inputs serve for logits."""
    shifted = contrastive_logprobs(FULL + 7, DROPPED - 3, 0.9)
    torch.testing.assert_close(shifted, contrastive_logprobs(FULL, DROPPED, 0.9))


def test_beta_0_gives_the_full_distribution() -> None:
    torch.testing.assert_close(contrastive_logprobs(FULL, DROPPED, 0.0), FULL)


def test_words_group_the_tokens_that_spell_them(vlm: VLM) -> None:
    """ "Ztemporalq" is no word of the tokenizer's: several tokens, one word. Stops and the end of sequence belong to none."""
    ids = encode_answer(vlm, "Where?", "There is a Ztemporalq lesion.")
    text, words = words_of(vlm, ids)
    assert [w.text for w in words] == ["There", "is", "a", "Ztemporalq", "lesion"]
    assert [text[w.start : w.end] for w in words] == [w.text for w in words]
    assert len(words[3].tokens) > 1
    used = [t for w in words for t in w.tokens]
    assert len(set(used)) == len(used)
    assert len(ids) - 1 not in used
    for w in words:
        assert vlm.tokenizer.decode([ids[t] for t in w.tokens]).strip() == w.text


def test_a_character_of_several_tokens_stays_with_its_word(vlm: VLM) -> None:
    """Byte-level BPE spells é with two tokens: the second adds no character, and belongs to the word all the same."""
    ids = encode_answer(vlm, "Where?", "a café naïve 中 lobe")
    _, words = words_of(vlm, ids)
    assert [w.text for w in words] == ["a", "café", "naïve", "中", "lobe"]
    for w in words:
        assert vlm.tokenizer.decode([ids[t] for t in w.tokens]).strip() == w.text


def test_hyphens_decimals_and_apostrophes_stay_inside_a_word(vlm: VLM) -> None:
    _, words = words_of(vlm, encode_answer(vlm, "?", "T2-weighted, 2.5 cm and/or it's (left)!"))
    assert [w.text for w in words] == ["T2-weighted", "2.5", "cm", "and/or", "it's", "left"]


def test_bare_punctuation_and_special_tokens_are_no_words(vlm: VLM) -> None:
    assert words_of(vlm, [vlm.eos_id])[1] == []
    assert words_of(vlm, encode_answer(vlm, "?", "... !"))[1] == []
    assert words_of(vlm, []) == ("", [])


def test_word_rewards_sum_over_the_tokens_of_a_word() -> None:
    """log π(word|i) − log π(word|i') is the sum of its tokens' rewards: 1 + .5; −2."""
    words = [Word("ab", 0, 2, (0, 2)), Word("c", 3, 4, (1,))]
    assert word_rewards(torch.tensor([1.0, -2.0, 0.5]), words) == [1.5, -2.0]


@pytest.mark.parametrize(
    ("n_words", "n", "n_eff"),
    [(20, 10, 10), (20, 3, 3), (8, 10, 4), (5, 10, 2), (3, 10, 1), (2, 10, 1), (1, 10, 1), (0, 10, 0)],
)
def test_at_most_half_of_the_words_are_coupled_and_at_least_one(n_words: int, n: int, n_eff: int) -> None:
    assert len(coupled_words([0.1 * i for i in range(n_words)], n)) == n_eff


def test_coupled_words_come_most_coupled_first_and_ties_in_order() -> None:
    assert coupled_words([0.1, 3.0, -1.0, 3.0, 2.0, 0.0], 10) == [1, 3, 4]


def test_grounding_score_is_the_least_words_reward() -> None:
    """Rewards 1 + 2 (one word), −9 (a stop), 2, −1 (a word each): the last word rests least on the image. Without a word: 0."""
    words = [Word("ab", 0, 2, (0, 1)), Word("c", 4, 5, (3,)), Word("d", 6, 7, (4,))]
    assert grounding_score(torch.tensor([1.0, 2.0, -9.0, 2.0, -1.0]), words) == pytest.approx(-1.0)
    assert grounding_score(torch.tensor([-2.5, 2.0, -9.0, 2.0, -0.25]), words) == pytest.approx(-0.5)
    assert grounding_score(torch.tensor([1.0]), []) == 0.0


def test_branches_average_log_probabilities_over_masks(vlm: VLM) -> None:
    prompt = encode_prompts(vlm, [picture(0)], ["Where?"])
    ids = encode_answer(vlm, "Where?", "left lobe")
    one = branches(vlm, prompt, [ids], ["s"], dropout_ratio=0.7)[0]
    two = branches(vlm, prompt, [ids], ["s"], dropout_ratio=0.7, n_masks=2)[0]
    assert torch.equal(one.full, two.full)
    assert (one.dropped - two.dropped).abs().max() > 1e-3
    assert torch.equal(one.dropped, branches(vlm, prompt, [ids], ["s"], dropout_ratio=0.7)[0].dropped)
    assert not torch.equal(one.dropped, branches(vlm, prompt, [ids], ["t"], dropout_ratio=0.7)[0].dropped)


def test_reward_is_the_difference_of_two_plain_teacher_forced_runs(vlm: VLM) -> None:
    """The sum over all positions is log π(y|i) − log π(y|i'), here from `branches` and, for the full one, by stock `model(**inputs)`."""
    batch = vlm.processor(
        images=[picture(0)], text="USER: <image>\nWhere? ASSISTANT: left lobe</s>", return_tensors="pt"
    )
    prompt = encode_prompts(vlm, [picture(0)], ["Where?"])
    ids = encode_answer(vlm, "Where?", "left lobe")
    assert batch["input_ids"][0, -len(ids) :].tolist() == ids
    with torch.no_grad():
        stock = vlm.model(**batch).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    expected = sum(float(stock[t, token]) for t, token in enumerate(ids))
    branch = branches(vlm, prompt, [ids], ["s"], dropout_ratio=0.5)[0]
    assert sum(float(branch.full[t, token]) for t, token in enumerate(ids)) == pytest.approx(expected, abs=1e-4)
    assert math.isfinite(float(alignment_reward(branch.full, branch.dropped, ids).sum()))
