"""MLPO and its baselines against arithmetic done by hand. Paper §3.3."""

import math

import pytest
import torch

from hscr.config import OptimizationConfig
from hscr.losses import (
    OBJECTIVES,
    RecordLogProbs,
    explicit_loss,
    implicit_loss,
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


@pytest.mark.parametrize("objective", ["hscr", "explicit", "dpo", "listwise"])
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
