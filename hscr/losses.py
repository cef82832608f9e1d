"""MLPO and its baselines: log-probabilities in, one loss and the usual metrics out. Pure functions. Paper §3.3.

h(y) = γ·[log π_θ(y|i,x) − log π_sft(y|i,x)]  ("reward" in the metrics), summed over answer tokens (D: mean, `length_normalized`).
Departures from the paper:
1. `anchor` adds anchor · (−mean log π_θ(y_w) per token), RPO's supervised term (Pang et al. 2024, eq. 1): MLPO itself does not hold
   log π(y_w) up (likelihood displacement).
2. `guard` is DPOP's other remedy (Pal et al. 2024, eq. 3), inside the sigmoid as published: see `guarded`. It acts wherever y_w is
   compared, so not under `implicit` and `sft`; the metrics report h(y_w) without it.
3. `pair_reduction` = mean divides by the number of pairs; the paper sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hscr.config import OBJECTIVES, OptimizationConfig


@dataclass(frozen=True)
class RecordLogProbs:
    """Summed log-probabilities of one record's answers, [1 + J]: y_w first, then levels from nearly right to very wrong."""

    policy: Tensor
    reference: Tensor
    n_tokens: Tensor


def explicit_loss(h: Tensor) -> Tensor:
    """L_E terms [J]: −log σ(h(y_w) − h(y_lj)) for h [1 + J]. HSCR, Jiang et al. 2025, §3.3."""
    return -F.logsigmoid(h[0] - h[1:])


def implicit_loss(h: Tensor) -> Tensor:
    """L_I terms [J(J−1)/2]: −log σ(h(y_lj) − h(y_lm)) for all j < m. HSCR, Jiang et al. 2025, §3.3."""
    j, m = torch.triu_indices(len(h) - 1, len(h) - 1, offset=1, device=h.device)
    return -F.logsigmoid(h[1 + j] - h[1 + m])


def listwise_loss(h: Tensor) -> Tensor:
    """Plackett–Luce negative log-likelihood [1] of the order y_w ≻ y_l1 ≻ … (ListMLE): Xia et al. 2008, eq. 6; Liu et al. 2025, eq. 7."""
    tail = torch.logcumsumexp(h.flip(0), dim=0).flip(0)
    return (tail[:-1] - h[:-1]).sum()[None]


def lipo_loss(h: Tensor) -> Tensor:
    """LiPO-λ terms [K(K−1)/2] over all pairs of the K = 1 + J answers, y_w included. Liu et al., NAACL 2025 (arXiv 2402.01878), eq. 8.

    Δ_ij·log(1 + e^−(s_i − s_j)) for ψ_i > ψ_j with Δ_ij = |G_i − G_j|·|1/D(τ(i)) − 1/D(τ(j))|, G = 2^ψ − 1, D = ln(1 + τ), τ the rank by
    s = h (equal scores rank in the answers' order). The labels are the share of answers that one is better than, ψ_k = (K − 1 − k)/K,
    which is the paper's labelling of ranked data without a reward model (its §5): a level's similarity is no strength of preference.
    """
    k = len(h)
    rank = torch.empty(k, dtype=h.dtype, device=h.device)
    rank[h.detach().argsort(descending=True, stable=True)] = torch.arange(1, k + 1, dtype=h.dtype, device=h.device)
    gain = 2 ** ((k - 1 - torch.arange(k, dtype=h.dtype, device=h.device)) / k) - 1
    discount = 1 / torch.log1p(rank)
    i, j = torch.triu_indices(k, k, offset=1, device=h.device)
    weight = (gain[i] - gain[j]).abs() * (discount[i] - discount[j]).abs()
    return -weight * F.logsigmoid(h[i] - h[j])  # eq. 8


def guarded(h: Tensor, guard: float) -> Tensor:
    """h [1 + J] with h(y_w) − λ·max(0, −h(y_w)) in its first place. DPOP, Pal et al. 2024 (Smaug, arXiv 2402.13228 v2), eq. 3.

    DPOP subtracts γ·λ·max(0, log π_ref(y_w) − log π_θ(y_w)) from the margin inside the sigmoid, and that is λ·max(0, −h(y_w)): as long as
    y_w is less likely than under the reference, raising it pays 1 + λ times as much as lowering a level.
    """
    return torch.cat([h[:1] - guard * F.relu(-h[:1]), h[1:]])  # eq. 3


def preference_terms(h: Tensor, objective: str) -> Tensor:
    """The loss terms of one record, [pairs]; empty where the record has no levels. One level under `hscr` is exactly DPO."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: must be one of {', '.join(OBJECTIVES)}")
    if objective == "sft" or len(h) == 1:
        return h.new_zeros(0)
    if objective == "hscr":  # Jiang et al. 2025, §3.3: L_HSCR = L_E + L_I
        return torch.cat([explicit_loss(h), implicit_loss(h)])
    if objective == "explicit":
        return explicit_loss(h)
    if objective == "implicit":
        return implicit_loss(h)
    if objective == "dpo":  # Rafailov et al. 2023, eq. 7, with the hardest level: the one nearest to right
        return explicit_loss(h[:2])
    return listwise_loss(h) if objective == "listwise" else lipo_loss(h)


def record_loss(lp: RecordLogProbs, config: OptimizationConfig) -> tuple[Tensor, dict[str, float]]:
    """Loss (scalar) and metrics of one record. Metrics that a record cannot have (no level) are absent."""
    scale = lp.n_tokens if config.length_normalized else torch.ones_like(lp.policy)
    h = config.gamma * (lp.policy - lp.reference) / scale
    terms = preference_terms(guarded(h, config.guard), config.objective)
    loss = terms.sum() / (max(len(terms), 1) if config.pair_reduction == "mean" else 1)
    nll = -lp.policy[0] / lp.n_tokens[0]
    weight = 1.0 if config.objective == "sft" else config.anchor
    if weight:
        loss = loss + weight * nll  # Pang et al. 2024, eq. 1; under `sft` all there is
    metrics = {
        "loss": float(loss.detach()),
        "nll": float(nll.detach()),
        "rewards/chosen": float(h[0].detach()),
        "logps/chosen": float(lp.policy[0].detach()),
    }
    if len(h) > 1:
        metrics |= {
            "rewards/rejected": float(h[1:].mean().detach()),
            "rewards/margins": float((h[0] - h[1:].mean()).detach()),
            "rewards/accuracies": float((h[0] > h[1:]).float().mean()),
            "logps/rejected": float(lp.policy[1:].mean().detach()),
        }
    return loss, metrics
