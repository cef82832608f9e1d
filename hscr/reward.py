"""The token-level self-contrastive reward: what of an answer rests on the image. Paper §3.1.

Preference generation, evaluation and the online grounding score all call this. The pure functions take log-probabilities; `branches`
runs the two teacher-forced forwards a record needs.

Departures from the paper:
1. Positions are grouped by word and a word's reward is the sum over its tokens: log π(word|i) − log π(word|i'). No half words.
2. Only words are eligible: no special token, end of sequence or bare punctuation.
3. n_eff = min(n, half of the eligible words, at least 1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hscr.model import VLM
from hscr.packing import packed_logits
from hscr.visual_tokens import Prompt, dropped

_WORD = re.compile(r"\w+(?:[-'./]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word of an answer: its text, character span [start, end) in the answer, and the indices of its tokens."""

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Branches:
    """Log-softmax [A, V] of an answer's positions with the image (full) and with visual tokens dropped (averaged over masks)."""

    full: Tensor
    dropped: Tensor


def alignment_reward(full: Tensor, dropped: Tensor, ids: Sequence[int]) -> Tensor:
    """r_t = log π(y_t | i, x, y_<t) − log π(y_t | i', x, y_<t), [A], from log-softmax [A, V] of both branches."""
    index = torch.tensor(ids, dtype=torch.long, device=full.device)[:, None]
    return (full.gather(-1, index) - dropped.gather(-1, index)).squeeze(-1)


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
    words = []
    for match in _WORD.finditer(text):
        tokens = tuple(t for t in range(len(ids)) if starts[t] < match.end() and ends[t] > match.start())
        if tokens:
            words.append(Word(match.group(), match.start(), match.end(), tokens))
    return text, words


def word_rewards(rewards: Tensor, words: Sequence[Word]) -> list[float]:
    """Sum of the alignment rewards [A] over each word's tokens."""
    return [float(rewards[list(w.tokens)].sum()) for w in words]


def coupled_words(rewards: Sequence[float], n: int) -> list[int]:
    """Indices of the modality-coupled words, most coupled first: the n_eff largest rewards."""
    n_eff = min(n, max(len(rewards) // 2, 1), len(rewards))
    return sorted(range(len(rewards)), key=lambda w: (-rewards[w], w))[:n_eff]


@torch.no_grad()
def branches(
    vlm: VLM,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    seeds: Sequence[object],
    *,
    dropout_ratio: float,
    n_masks: int = 1,
) -> list[Branches]:
    """Score one answer a prompt with and without its visual tokens: 1 + n_masks batched forwards. `seeds` name the masks."""
    grouped = [[list(a)] for a in answers]
    full = [g[0].float().log_softmax(-1) for g in packed_logits(vlm, prompts, grouped)]
    total: list[Tensor] = []
    for mask in range(n_masks):
        cut = [dropped(p, dropout_ratio, s, mask) for p, s in zip(prompts, seeds, strict=True)]
        part = [g[0].float().log_softmax(-1) for g in packed_logits(vlm, cut, grouped)]
        total = part if not total else [t + p for t, p in zip(total, part, strict=True)]
    return [Branches(f, d / n_masks) for f, d in zip(full, total, strict=True)]


def grounding_score(rewards: Tensor, words: Sequence[Word]) -> float:
    """How far an answer rests on the image: mean alignment reward (nats) of the tokens of its words; 0 where it has none."""
    tokens = sorted({t for w in words for t in w.tokens})
    return float(rewards[tokens].mean()) if tokens else 0.0
