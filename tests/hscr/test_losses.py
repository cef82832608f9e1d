"""MLPO and its baselines against arithmetic done by hand. Paper §3.3."""

import math

import pytest
import torch

from hscr.config import OBJECTIVES, OptimizationConfig
from hscr.losses import (
    RecordLogProbs,
    explicit_loss,
    guarded,
    implicit_loss,
    lipo_loss,
    listwise_loss,
    preference_terms,
    record_loss,
)

LN2 = math.log(2)


def softplus(x: float) -> float:
    """−log σ(−x) = log(1 + eˣ)."""
    return math.log1p(math.exp(x))


def log_probs(
    policy: list[float], reference: list[float], n_tokens: list[int] | None = None, *, grad: bool = False
) -> RecordLogProbs:
    return RecordLogProbs(
        torch.tensor(policy, requires_grad=grad),
        torch.tensor(reference),
        torch.tensor(n_tokens or [1] * len(policy), dtype=torch.float32),
    )


def test_explicit_loss_compares_the_right_answer_with_every_level() -> None:
    """h = (1, 0, −1, −3): h(y_w) − h(y_lj) = 1, 2, 4; −log σ(d) = log(1 + e^−d) = 0.313262, 0.126928, 0.018150."""
    terms = explicit_loss(torch.tensor([1.0, 0.0, -1.0, -3.0]))
    assert terms.tolist() == pytest.approx([0.313262, 0.126928, 0.018150], abs=1e-6)


def test_implicit_loss_compares_every_level_with_all_below_it() -> None:
    """h_l = (0, −1, −3): pairs (1,2), (1,3), (2,3) differ by 1, 3, 2: 0.313262, 0.048587, 0.126928. h(y_w) plays no part."""
    expected = [0.313262, 0.048587, 0.126928]
    assert implicit_loss(torch.tensor([1.0, 0.0, -1.0, -3.0])).tolist() == pytest.approx(expected, abs=1e-6)
    assert implicit_loss(torch.tensor([9.0, 0.0, -1.0, -3.0])).tolist() == pytest.approx(expected, abs=1e-6)


def test_three_levels_give_three_explicit_and_three_implicit_pairs() -> None:
    """L_HSCR = L_E + L_I: 0.313262 + 0.126928 + 0.018150 + 0.313262 + 0.048587 + 0.126928 = 0.947117."""
    terms = preference_terms(torch.tensor([1.0, 0.0, -1.0, -3.0]), "hscr")
    assert len(terms) == 6
    assert float(terms.sum()) == pytest.approx(0.947117, abs=1e-5)


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_policy_equal_to_reference_costs_ln_2_a_pair(levels: int) -> None:
    """h = 0 everywhere, −log σ(0) = ln 2; j explicit and j(j−1)/2 implicit pairs."""
    values = [-3.0 - i for i in range(1 + levels)]
    loss, metrics = record_loss(log_probs(values, values), OptimizationConfig())
    assert float(loss) == pytest.approx((levels + levels * (levels - 1) / 2) * LN2, rel=1e-6)
    assert metrics["rewards/margins"] == 0


def test_one_level_under_hscr_is_exactly_dpo() -> None:
    """γ = 0.1, policy (−4, −6), reference (−5, −5): h = (0.1, −0.1), loss = log(1 + e^−0.2) = 0.598139."""
    record = log_probs([-4.0, -6.0], [-5.0, -5.0])
    hscr, dpo = (record_loss(record, OptimizationConfig(objective=o))[0] for o in ("hscr", "dpo"))
    assert float(hscr) == float(dpo) == pytest.approx(0.598139, abs=1e-6)


def test_dpo_takes_only_the_level_nearest_to_right() -> None:
    h = torch.tensor([1.0, 0.5, -50.0])
    assert preference_terms(h, "dpo").tolist() == pytest.approx([softplus(-0.5)])


def test_listwise_loss_is_plackett_luce() -> None:
    """P(order) = e²/(e² + e¹ + e⁰) · e¹/(e¹ + e⁰) · 1 for h = (2, 1, 0) = 0.665241 · 0.731059; −log = 0.407606 + 0.313262."""
    assert listwise_loss(torch.tensor([2.0, 1.0, 0.0])).tolist() == pytest.approx([0.720868], abs=1e-6)


def test_listwise_loss_of_equal_scores_counts_all_orders_as_equally_likely() -> None:
    """Four answers: 1/4! → −log = log 24."""
    assert float(listwise_loss(torch.zeros(4))) == pytest.approx(math.log(24), rel=1e-6)


def test_lipo_of_one_level_is_dpo_with_a_constant_weight() -> None:
    """K = 2: ψ = (1/2, 0), G = √2 − 1 = .414214 and 0; ranks 1 and 2: 1/ln 2 − 1/ln 3 = 1.442695 − .910239 = .532456; weight .220551.
    h = (1, 0): .220551 · .313262 = .069090; h = (0, 1), ranks the other way round, the same weight: .220551 · 1.313262 = .289641."""
    assert lipo_loss(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.069090], abs=1e-6)
    assert lipo_loss(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.289641], abs=1e-6)


def test_lipo_weighs_each_pair_by_gain_and_by_the_policys_own_ranks() -> None:
    """K = 3: ψ = (2/3, 1/3, 0), G = .587401, .259921, 0. h = (1, 3, 0): ranks 2, 1, 3; 1/ln(1 + τ) = .910239, 1.442695, .721348.
    (w, l1): .327480 · .532456 = .174369, times log(1 + e²) = 2.126928: .370870. (w, l2): .587401 · .188892 = .110955, times .313262:
    .034758. (l1, l2): .259921 · .721348 = .187493, times .048587: .009110."""
    terms = lipo_loss(torch.tensor([1.0, 3.0, 0.0]))
    assert terms.tolist() == pytest.approx([0.370870, 0.034758, 0.009110], abs=2e-6)


def test_lipo_of_equal_scores_ranks_in_the_answers_order_and_costs_ln_2_times_each_weight() -> None:
    """K = 3, ranks 1, 2, 3: (w, l1): .327480 · .532456 = .174369; (w, l2): .587401 · .721348 = .423721; (l1, l2): .259921 · .188892 =
    .049097; each times ln 2."""
    weights = (lipo_loss(torch.zeros(3)) / LN2).tolist()
    assert weights == pytest.approx([0.174369, 0.423721, 0.049097], abs=2e-6)


def test_the_guard_lowers_the_right_answers_reward_where_it_fell_below_the_reference() -> None:
    """λ = 5: h(y_w) = −.2 → −.2 − 5 · .2 = −1.2; h(y_w) = .2 stays, and so does every level."""
    assert guarded(torch.tensor([-0.2, -0.5, 0.3]), 5.0).tolist() == pytest.approx([-1.2, -0.5, 0.3])
    assert guarded(torch.tensor([0.2, -0.5, 0.3]), 5.0).tolist() == pytest.approx([0.2, -0.5, 0.3])


def test_dpo_with_the_guard_is_dpop() -> None:
    """γ = .1, λ = 5; policy (−7, −9), reference (−5, −5): inside the sigmoid γ·[(−2 + 4) − 5 · max(0, 2)] = .1 · −8 = −.8:
    log(1 + e^.8) = 1.171101. Without guard log(1 + e^−.2) = .598139; outside the sigmoid it would be .598139 + .1 · 10 = 1.598139."""
    record = log_probs([-7.0, -9.0], [-5.0, -5.0])
    loss, metrics = record_loss(record, OptimizationConfig(objective="dpo", guard=5.0))
    assert float(loss) == pytest.approx(1.171101, abs=1e-6)
    assert float(record_loss(record, OptimizationConfig(objective="dpo"))[0]) == pytest.approx(0.598139, abs=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(-0.2)  # what is reported has no penalty in it


def test_the_guard_pulls_the_right_answer_up_one_plus_lambda_times_as_hard() -> None:
    """d/dh(y_w) of h(y_w) − λ·max(0, −h(y_w)) is 1 + λ = 6 below the reference and 1 above it; a level's is 1 in both."""
    for below, ratio in ((-7.0, 6.0), (-4.0, 1.0)):
        record = log_probs([below, -9.0], [-5.0, -5.0], grad=True)
        record_loss(record, OptimizationConfig(objective="dpo", guard=5.0))[0].backward()
        gradient = record.policy.grad
        assert gradient is not None
        assert float(-gradient[0] / gradient[1]) == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_guard_acts_wherever_the_right_answer_is_compared_and_nowhere_else(objective: str) -> None:
    record = log_probs([-7.0, -9.0, -8.0], [-5.0, -5.0, -5.0])
    plain, with_guard = (
        float(record_loss(record, OptimizationConfig(objective=objective, guard=g))[0]) for g in (0.0, 5.0)
    )
    assert (with_guard > plain) is (objective not in ("implicit", "sft"))
    if objective in ("implicit", "sft"):
        assert with_guard == plain


def test_policy_equal_to_reference_feels_no_guard() -> None:
    for objective in OBJECTIVES:
        record = log_probs([-5.0, -6.0, -7.0], [-5.0, -6.0, -7.0])
        plain, with_guard = (
            float(record_loss(record, OptimizationConfig(objective=objective, guard=g))[0]) for g in (0.0, 9.0)
        )
        assert plain == with_guard


def test_sft_is_the_mean_token_loss_of_the_right_answer_alone() -> None:
    """log π(y_w) = −6 over 3 tokens: 2 nats a token, whatever the levels are."""
    loss, _ = record_loss(
        log_probs([-6.0, -1.0], [-6.0, -9.0], [3, 5]), OptimizationConfig(objective="sft", anchor=7.0)
    )
    assert float(loss) == pytest.approx(2.0)


def test_anchor_adds_a_weighted_supervised_term() -> None:
    """One pair at h = 0: ln 2; anchor 0.5 · 6/3 = 1."""
    loss, metrics = record_loss(log_probs([-6.0, -8.0], [-6.0, -8.0], [3, 4]), OptimizationConfig(anchor=0.5))
    assert float(loss) == pytest.approx(LN2 + 1.0, rel=1e-6)
    assert metrics["nll"] == pytest.approx(2.0)


def test_a_record_without_levels_costs_only_its_anchor() -> None:
    assert float(record_loss(log_probs([-6.0], [-6.0], [3]), OptimizationConfig())[0]) == 0
    assert float(record_loss(log_probs([-6.0], [-6.0], [3]), OptimizationConfig(anchor=1.0))[0]) == pytest.approx(2.0)


def test_pair_reduction_mean_divides_by_the_number_of_pairs() -> None:
    record = log_probs([-4.0, -6.0, -5.0, -9.0], [-5.0, -5.0, -5.0, -5.0])
    total = float(record_loss(record, OptimizationConfig(pair_reduction="sum"))[0])
    mean = float(record_loss(record, OptimizationConfig(pair_reduction="mean"))[0])
    assert mean == pytest.approx(total / 6, rel=1e-6)


def test_length_normalized_rewards_are_per_token() -> None:
    """γ = 1; policy − reference = (2, −4) over (4, 2) tokens: h = (0.5, −2), loss = log(1 + e^−2.5) = 0.078889. Sums: e^−6 → 0.002476."""
    record = log_probs([-3.0, -9.0], [-5.0, -5.0], [4, 2])
    per_token, metrics = record_loss(record, OptimizationConfig(gamma=1.0, length_normalized=True))
    assert float(per_token) == pytest.approx(0.078889, abs=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(0.5)
    assert float(record_loss(record, OptimizationConfig(gamma=1.0))[0]) == pytest.approx(0.002476, abs=1e-6)


def test_metrics_carry_the_names_that_other_trainers_use() -> None:
    """γ = 0.1, policy − reference = (1, −1, 3): h = (0.1, −0.1, 0.3); rejected mean 0.1, margin 0, chosen beats one of two."""
    _, metrics = record_loss(log_probs([-4.0, -6.0, -2.0], [-5.0, -5.0, -5.0]), OptimizationConfig())
    assert metrics["rewards/chosen"] == pytest.approx(0.1)
    assert metrics["rewards/rejected"] == pytest.approx(0.1)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-7)
    assert metrics["rewards/accuracies"] == pytest.approx(0.5)
    assert metrics["logps/chosen"] == -4.0
    assert metrics["logps/rejected"] == -4.0
    assert {"loss", "nll"} < metrics.keys()


@pytest.mark.parametrize("objective", ["hscr", "explicit", "dpo", "listwise", "lipo"])
def test_descent_raises_the_right_answer_and_lowers_the_wrong_one(objective: str) -> None:
    record = log_probs([-5.0, -5.0, -5.0], [-5.0, -5.0, -5.0], grad=True)
    record_loss(record, OptimizationConfig(objective=objective))[0].backward()
    gradient = record.policy.grad
    assert gradient is not None
    assert gradient[0] < 0  # descent goes against the gradient: up
    assert gradient[-1] > 0 or objective == "dpo"
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-7)  # only differences matter


def test_implicit_part_leaves_the_right_answer_alone_and_orders_the_levels() -> None:
    record = log_probs([-5.0, -5.0, -5.0], [-5.0, -5.0, -5.0], grad=True)
    record_loss(record, OptimizationConfig(objective="implicit"))[0].backward()
    assert record.policy.grad is not None
    assert record.policy.grad.tolist() == pytest.approx([0.0, -0.05, 0.05])  # γ · σ(0) = 0.05


def test_huge_margins_stay_finite() -> None:
    for objective in OBJECTIVES:
        loss, _ = record_loss(log_probs([-5e4, 0.0, -1.0], [0.0, -5e4, 0.0]), OptimizationConfig(objective=objective))
        assert math.isfinite(float(loss))


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of hscr"):
        preference_terms(torch.zeros(2), "ppo")
