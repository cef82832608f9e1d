"""The token-level self-contrastive reward: what of an answer rests on the image. Paper §3.1.

Preference generation, evaluation and the online grounding score all call this. The pure functions take log-probabilities; `contrast`
runs the two teacher-forced forwards a record needs, `branches` is the same with visual token dropout.

Departures from the paper:
1. Positions are grouped by word and a word's reward is the sum over its tokens: log π(word|i) − log π(word|i'). No half words.
2. Only words are eligible: no special token, end of sequence or bare punctuation.
3. n_eff = min(n, half of the eligible words, at least 1).
4. Besides the signed log-probability difference (`signed`) a token's reward may be its absolute value (`abs`), or what the image changes
   of the whole distribution (`js`); online grounding is always signed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hscr.config import REWARDS
from hscr.model import VLM
from hscr.packing import packed_logits, remembered_logits
from hscr.trees import Prefixes
from hscr.visual_tokens import Prompt, dropped
from hscr.words import Word, words_at


@dataclass(frozen=True)
class Branches:
    """Log-softmax [A, V] of an answer's positions with the image (full) and with a part of it hidden (dropped, averaged over masks)."""

    full: Tensor
    dropped: Tensor


def alignment_reward(full: Tensor, dropped: Tensor, ids: Sequence[int]) -> Tensor:
    """r_t = log π(y_t | i, x, y_<t) − log π(y_t | i', x, y_<t), [A], from log-softmax [A, V] of both branches."""
    index = torch.tensor(ids, dtype=torch.long, device=full.device)[:, None]
    return (full.gather(-1, index) - dropped.gather(-1, index)).squeeze(-1)


def jensen_shannon(full: Tensor, dropped: Tensor) -> Tensor:
    """Jensen–Shannon divergence [...] in nats, 0 to ln 2, of two distributions given as log-softmax [..., V]. Lin 1991, §4.

    ½·Σ p·ln(p/m) + ½·Σ q·ln(q/m) with m = ½(p + q); ln(p/m) = ln 2 − ln(1 + q/p), so that equal inputs give exactly 0.
    """
    d = dropped - full
    ln2 = F.softplus(torch.zeros_like(d))
    terms = full.exp() * (ln2 - F.softplus(d)) + dropped.exp() * (ln2 - F.softplus(-d))
    return (terms.sum(-1) / 2).clamp(min=0)  # rounding may go below


def token_rewards(branch: Branches, ids: Sequence[int], kind: str = "signed") -> Tensor:
    """The reward [A] (nats) of each answer token under `PreferenceConfig.reward`: signed | abs | js. ValueError for another kind."""
    if kind not in REWARDS:
        raise ValueError(f"reward: must be one of {', '.join(REWARDS)}")
    if kind == "js":
        return jensen_shannon(branch.full, branch.dropped)
    signed = alignment_reward(branch.full, branch.dropped, ids)
    return signed.abs() if kind == "abs" else signed


def contrastive_logprobs(full: Tensor, dropped: Tensor, beta: float) -> Tensor:
    """log P_diff [..., V] = log softmax[(1+β)·logit(·|i) − β·logit(·|i')]; softmax forgets the gauge, so log-softmax inputs serve."""
    return torch.log_softmax((1 + beta) * full - beta * dropped, dim=-1)


def words_of(vlm: VLM, ids: Sequence[int]) -> tuple[str, list[Word]]:
    """The answer's text and its eligible words, each with the tokens that spell it.

    Spans come from decoding growing prefixes, which holds for byte-level BPE and SentencePiece alike.
    """
    starts: list[int] = []
    ends: list[int] = []
    text = ""
    for n in range(1, len(ids) + 1):
        starts.append(len(text.rstrip("\ufffd")))  # a character begun by an earlier token belongs to this one too
        text = vlm.tokenizer.decode(list(ids[:n]), skip_special_tokens=True)
        ends.append(len(text))
    return text, words_at(text, list(zip(starts, ends, strict=True)))


def word_rewards(rewards: Tensor, words: Sequence[Word]) -> list[float]:
    """Sum of the alignment rewards [A] over each word's tokens."""
    return [float(rewards[list(w.tokens)].sum()) for w in words]


def coupled_words(rewards: Sequence[float], n: int) -> list[int]:
    """Indices of the modality-coupled words, most coupled first: the n_eff largest rewards."""
    n_eff = min(n, max(len(rewards) // 2, 1), len(rewards))
    return sorted(range(len(rewards)), key=lambda w: (-rewards[w], w))[:n_eff]


def random_words(n_words: int, n: int, seed: int) -> list[int]:
    """As many words as `coupled_words` takes, in an order drawn by chance: the control that the reward has to beat."""
    return coupled_words(torch.rand(n_words, generator=torch.Generator().manual_seed(seed)).tolist(), n)


@torch.no_grad()
def contrast(
    vlm: VLM,
    prompts: Sequence[Prompt],
    cuts: Iterable[Sequence[Prompt]],
    answers: Sequence[Sequence[int]],
    prefixes: Prefixes | None = None,
) -> list[Branches]:
    """Score one answer a prompt with the image and under each mask of `cuts` (a list of i' a mask): 1 + n_masks batched forwards.

    `prefixes` remembers the caches of the prompts and of the first mask's, for decoding that follows.
    """

    def scored(prompts: Sequence[Prompt], keep: bool) -> list[Tensor]:
        if keep and prefixes is not None:
            logits = remembered_logits(vlm, prompts, answers, prefixes)
        else:
            logits = [row for (row,) in packed_logits(vlm, prompts, [[a] for a in answers])]
        return [row.float().log_softmax(-1) for row in logits]

    full = scored(prompts, True)
    total: list[Tensor] = []
    n_masks = 0
    for cut in cuts:
        part = scored(cut, n_masks == 0)
        total = part if not total else [t + p for t, p in zip(total, part, strict=True)]
        n_masks += 1
    return [Branches(f, d / n_masks) for f, d in zip(full, total, strict=True)]


def branches(
    vlm: VLM,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    seeds: Sequence[object],
    *,
    dropout_ratio: float,
    n_masks: int = 1,
) -> list[Branches]:
    """`contrast` under visual token dropout. `seeds` name the masks."""
    cuts = (
        [dropped(p, dropout_ratio, s, mask) for p, s in zip(prompts, seeds, strict=True)] for mask in range(n_masks)
    )
    return contrast(vlm, prompts, cuts, answers)


def grounding_score(rewards: Tensor, words: Sequence[Word]) -> float:
    """How far an answer rests on the image: the alignment reward (nats) of its least grounded word; 0 where it has none.

    One word said from habit makes an answer wrong, and a mean hides it (docs/decisions/0019).
    """
    return min(word_rewards(rewards, words), default=0.0)
