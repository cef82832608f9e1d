"""MLPO and its baselines: log-probabilities in, one loss and the usual metrics out. Pure functions. Paper §3.3.

h(y) = γ·[log π_θ(y|i,x) − log π_sft(y|i,x)]  ("reward" in the metrics), summed over answer tokens (D: mean, `length_normalized`).
Departures from the paper:
1. `anchor` adds anchor · (−mean log π_θ(y_w) per token), RPO's supervised term (Pang et al. 2024, eq. 1): MLPO itself does not hold
   log π(y_w) up (likelihood displacement).
2. `pair_reduction` = mean divides by the number of pairs; the paper sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hscr.config import OptimizationConfig

OBJECTIVES = ("hscr", "explicit", "implicit", "dpo", "listwise", "sft")


@dataclass(frozen=True)
class RecordLogProbs:
    """Summed log-probabilities of one record's answers, [1 + J]: y_w first, then levels from nearly right to very wrong."""

    policy: Tensor
    reference: Tensor
    n_tokens: Tensor


def explicit_loss(h: Tensor) -> Tensor:
    """L_E terms [J]: −log σ(h(y_w) − h(y_lj)) for h [1 + J]."""
    return -F.logsigmoid(h[0] - h[1:])


def implicit_loss(h: Tensor) -> Tensor:
    """L_I terms [J(J−1)/2]: −log σ(h(y_lj) − h(y_lm)) for all j < m."""
    j, m = torch.triu_indices(len(h) - 1, len(h) - 1, offset=1, device=h.device)
    return -F.logsigmoid(h[1 + j] - h[1 + m])


def listwise_loss(h: Tensor) -> Tensor:
    """Plackett–Luce negative log-likelihood [1] of the order y_w ≻ y_l1 ≻ … (ListMLE; Xia et al. 2008, eq. 6; LiPO, Liu et al. 2024)."""
    tail = torch.logcumsumexp(h.flip(0), dim=0).flip(0)
    return (tail[:-1] - h[:-1]).sum()[None]


def preference_terms(h: Tensor, objective: str) -> Tensor:
    """The loss terms of one record, [pairs]; empty where the record has no levels. One level under `hscr` is exactly DPO."""
    if objective == "sft" or len(h) == 1:
        return h.new_zeros(0)
    if objective == "hscr":
        return torch.cat([explicit_loss(h), implicit_loss(h)])
    if objective == "explicit":
        return explicit_loss(h)
    if objective == "implicit":
        return implicit_loss(h)
    if objective == "dpo":  # Rafailov et al. 2023, eq. 7, with the hardest level: the one nearest to right
        return explicit_loss(h[:2])
    if objective == "listwise":
        return listwise_loss(h)
    raise ValueError(f"objective: must be one of {', '.join(OBJECTIVES)}")


def record_loss(lp: RecordLogProbs, config: OptimizationConfig) -> tuple[Tensor, dict[str, float]]:
    """Loss (scalar) and metrics of one record. Metrics that a record cannot have (no level) are absent."""
    scale = lp.n_tokens if config.length_normalized else torch.ones_like(lp.policy)
    h = config.gamma * (lp.policy - lp.reference) / scale
    terms = preference_terms(h, config.objective)
    loss = terms.sum() / (max(len(terms), 1) if config.pair_reduction == "mean" else 1)
    nll = -lp.policy[0] / lp.n_tokens[0]
    weight = 1.0 if config.objective == "sft" else config.anchor
    if weight:
        loss = loss + weight * nll
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
