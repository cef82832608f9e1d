"""Wrong answers that are no token replacement: the model's own samples, random words (a control), a closed question's other option.

Departures from the paper:
1. Sampled answers: the paper's candidates are replacements only. A sample may be right; similarity to y_w decides in the ranking.
2. A closed question's level is the other option that the dropped branch finds most likely: a one-word answer has no words left to grade.

Random corruption is what HSCR's selection has to beat: as many words replaced as token replacement would, at positions drawn by chance, by
words that stand in the same context in other answers, so that the text stays plausible while nothing was asked of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hscr.config import PreferenceConfig
from hscr.decode import decode
from hscr.model import VLM, decode_text, encode_answer
from hscr.packing import packed_logits, token_logprobs
from hscr.replacement import Candidate, Draft, same_word
from hscr.trees import Prefixes
from hscr.visual_tokens import derived_seed
from hscr.words import WORD, normalized

Contexts = dict[tuple[str | None, str | None], list[str]]


def sampled_answers(
    vlm: VLM, drafts: Sequence[Draft], config: PreferenceConfig, known: Prefixes | None = None
) -> list[list[Candidate]]:
    """n_candidates answers a draft, sampled from the model with the full image; one random stream a record and sample."""
    rows = [(number, sample) for number in range(len(drafts)) for sample in range(config.n_candidates)]
    out: list[list[Candidate]] = [[] for _ in drafts]
    answers = decode(
        vlm,
        [drafts[n].prompt for n, _ in rows],
        max_tokens=config.max_new_tokens,
        temperature=config.sample_temperature,
        seeds=[derived_seed("sample", drafts[n].name, sample) for n, sample in rows],
        token_budget=config.token_budget,
        known=known,
    )
    for (number, _), ids in zip(rows, answers, strict=True):
        out[number].append(Candidate(decode_text(vlm, ids), source="sampled"))
    return out


def word_contexts(answers: Iterable[str]) -> Contexts:
    """The distinct words of answers by what stands before and after them: (before, after), (before, any) and (any, after); "" is an end."""
    found: defaultdict[tuple[str | None, str | None], set[str]] = defaultdict(set)
    for answer in answers:
        words = WORD.findall(answer)
        for at, word in enumerate(words):
            for context in _contexts(words, at):
                found[context].add(word)
    return {context: sorted(words) for context, words in found.items()}


def _contexts(words: Sequence[str], at: int) -> list[tuple[str | None, str | None]]:
    """The contexts of a word, narrowest first."""
    before = words[at - 1].lower() if at else ""
    after = words[at + 1].lower() if at + 1 < len(words) else ""
    return [(before, after), (before, None), (None, after)]


def words_of_its_kind(contexts: Contexts, words: Sequence[str], at: int) -> list[str]:
    """Other words that stand in the narrowest context of words[at] which has any; variants of the word itself are none."""
    for context in _contexts(words, at):
        others = [word for word in contexts.get(context, []) if not same_word(word, words[at])]
        if others:
            return others
    return []


def corrupt_randomly(draft: Draft, contexts: Contexts) -> None:
    """Put random words at random positions in the place of the draft's replacements, as many; fewer where no word of a kind is known."""
    stream = np.random.default_rng(derived_seed("random", draft.name))
    words = [w.text for w in draft.words]
    replacement: dict[int, str] = {}
    for at in stream.permutation(len(words)).tolist():
        if len(replacement) == len(draft.coupled):
            break
        if others := words_of_its_kind(contexts, words, at):
            replacement[at] = others[stream.integers(len(others))]
        else:
            draft.dropped["no_word_of_its_kind"] += 1
    draft.coupled, draft.replacement = list(replacement), replacement


@torch.no_grad()
def other_option(vlm: VLM, draft: Draft) -> str | None:
    """The wrong option that the model finds most likely without the image: what it would say from habit."""
    right = normalized(draft.record.answer)
    options = list(draft.record.options) or (["yes", "no"] if right in ("yes", "no") else [])
    others = [o for o in options if normalized(o) != right]
    if len(others) < 2:
        return others[0] if others else None
    ids = [encode_answer(vlm, draft.record.question, o) for o in others]
    logits = packed_logits(vlm, [draft.cut], [ids])[0]
    scores = [float(token_logprobs(row, i).sum()) for row, i in zip(logits, ids, strict=True)]
    return others[max(range(len(others)), key=scores.__getitem__)]
