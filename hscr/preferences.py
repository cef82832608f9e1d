"""Preference generation: VQA records in, graded wrong answers out. Paper §3.1 (replacement, graded answers) and §3.2 (re-ranking).

Departures from the paper:
1. Candidates for a hallucinated word must stay plausible without the image, p(v|i') ≥ α·max p(·|i') (VCD's constraint; `candidates_from`
   chooses the branch): the lowest P_diff of a whole vocabulary is junk. Where the set is empty the position is skipped and counted.
2. The replacement grows to a whole word by decoding the dropped branch, so no half words appear.
3. A closed question's level is the other option that the dropped branch finds most likely (`closed`): a one-word answer has no words
   left to grade.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hscr.config import PreferenceConfig
from hscr.decode import decode
from hscr.images import Images
from hscr.model import VLM, decode_text, encode_answer, encode_prompts
from hscr.packing import packed_logits, token_logprobs
from hscr.records import Level, PreferenceRecord, VQARecord, WordReward
from hscr.reward import (
    Branches,
    Word,
    alignment_reward,
    branches,
    contrastive_logprobs,
    coupled_words,
    word_rewards,
    words_of,
)
from hscr.similarity import Similarity, normalized, rerank
from hscr.visual_tokens import Prompt, dropped

WORD_TOKENS = 8  # tokens decoded to complete a replacement word; one that is still growing then is dropped
_REPLACEMENT = re.compile(r"\w+(?:[-']\w+)*")


@dataclass
class _Draft:
    """One record on its way: its prompts, answer tokens, words, and what replaces which word."""

    record: VQARecord
    prompt: Prompt
    cut: Prompt
    ids: list[int]
    text: str
    words: list[Word]
    rewards: list[float]
    coupled: list[int]  # indices of words, most coupled first
    first_token: dict[int, int]  # word index -> the hallucinated token
    replacement: dict[int, str]  # word index -> the whole word it grew to
    dropped: Counter[str]


def generate(
    vlm: VLM,
    records: Sequence[VQARecord],
    open_image: Callable[[VQARecord], Images],
    config: PreferenceConfig,
    similarity: Similarity,
    seed: int = 0,
) -> Iterator[PreferenceRecord]:
    """Yield one preference record a VQA record, in order. A record without a usable level comes out with `levels` empty and reasons."""
    for start in range(0, len(records), config.batch_size):
        batch = records[start : start + config.batch_size]
        prompts = encode_prompts(vlm, [open_image(r) for r in batch], [r.question for r in batch])
        drafts = _drafts(vlm, batch, prompts, config, seed)
        _replace_words(vlm, drafts, config)
        for draft, texts in zip(drafts, _graded_answers(vlm, drafts, config), strict=True):
            yield _rank(draft, texts, config, similarity)


def _drafts(
    vlm: VLM, batch: Sequence[VQARecord], prompts: Sequence[Prompt], config: PreferenceConfig, seed: int
) -> list[_Draft]:
    """Score y_w in both branches and choose the coupled words with what replaces their first token."""
    answers = [encode_answer(vlm, r.question, r.answer) for r in batch]
    names = [f"{seed}/{r.id}" for r in batch]
    scored = branches(vlm, prompts, answers, names, dropout_ratio=config.dropout_ratio, n_masks=config.n_masks)
    drafts = []
    for record, prompt, ids, name, branch in zip(batch, prompts, answers, names, scored, strict=True):
        text, words = words_of(vlm, ids)
        rewards = word_rewards(alignment_reward(branch.full, branch.dropped, ids), words)
        cut = dropped(prompt, config.dropout_ratio, name, 0)
        draft = _Draft(record, prompt, cut, ids, text, words, rewards, [], {}, {}, Counter())
        for index in coupled_words(rewards, config.n_coupled):
            token = hallucinated_token(vlm, branch, ids, words[index], config)
            if token is None:
                draft.dropped["no_plausible_replacement"] += 1
            else:
                draft.coupled.append(index)
                draft.first_token[index] = token
        drafts.append(draft)
    return drafts


def hallucinated_token(
    vlm: VLM, branch: Branches, ids: Sequence[int], word: Word, config: PreferenceConfig
) -> int | None:
    """The plausible token with the lowest P_diff at the word's first position, or None where only the word itself is plausible."""
    at = word.tokens[0]
    plausible = branch.dropped[at] if config.candidates_from == "dropped" else branch.full[at]
    allowed = plausible >= plausible.max() + torch.log(torch.tensor(config.alpha))
    diff = contrastive_logprobs(branch.full[at], branch.dropped[at], config.beta)
    for token in _ascending(diff, allowed):
        if token not in vlm.eos_ids and _starts_another_word(vlm, token, ids[at], word.text):
            return token
    return None


def _ascending(values: Tensor, allowed: Tensor) -> list[int]:
    index = allowed.nonzero().squeeze(-1)
    return [int(i) for i in index[values[index].argsort()]]


def _starts_another_word(vlm: VLM, token: int, original: int, word: str) -> bool:
    """A token that begins a word like the original's does (with its space) and is no variant of it in case, space or stem."""
    piece, old = vlm.tokenizer.convert_ids_to_tokens([token, original])
    if (piece[:1] in "Ġ▁") != (old[:1] in "Ġ▁"):
        return False
    text = vlm.tokenizer.decode([token]).strip()
    return bool(re.fullmatch(r"\w+", text)) and not same_word(text, word)


def same_word(a: str, b: str) -> bool:
    """Equal up to case and a plain English ending, or one the beginning of the other: "left"/"Left", "lobe"/"lobes", "tempo"/"temporal"."""
    # Three letters stay: "red" is no "r…" and no variant of "right".
    a, b = (re.sub(r"(?<=\w{3})(ies|es|s|ed|ing|ly)$", "", w.lower()) for w in (a, b))
    return a == b or a.startswith(b) or b.startswith(a)


def _replace_words(vlm: VLM, drafts: Sequence[_Draft], config: PreferenceConfig) -> None:
    """Complete every chosen token to a whole word by greedy decoding in the dropped branch; drop what turns into the word itself."""
    rows = [(d, w) for d in drafts for w in d.coupled]
    prefixes = [[*d.ids[: d.words[w].tokens[0]], d.first_token[w]] for d, w in rows]
    for start in range(0, len(rows), config.batch_size):
        part = slice(start, start + config.batch_size)
        tails = decode(vlm, [d.cut for d, _ in rows[part]], prefixes[part], max_tokens=WORD_TOKENS)
        for (draft, w), prefix, tail in zip(rows[part], prefixes[part], tails, strict=True):
            text = vlm.tokenizer.decode([*prefix, *tail], skip_special_tokens=True)
            match = _REPLACEMENT.match(text, draft.words[w].start)
            whole = match and (match.end() < len(text) or tail[-1] in vlm.eos_ids)
            if match and whole and not same_word(match.group(), draft.words[w].text):
                draft.replacement[w] = match.group()
            else:
                draft.coupled.remove(w)
                draft.dropped["replacement_is_the_word" if whole else "replacement_is_no_word"] += 1


def _splice(draft: _Draft, chosen: Sequence[int]) -> tuple[str, int]:
    """The answer with the chosen words replaced, and where the last replacement ends."""
    text, at, last = "", 0, 0
    for w in sorted(chosen):
        word = draft.words[w]
        text += draft.text[at : word.start] + draft.replacement[w]
        at, last = word.end, len(text)
    return text + draft.text[at:], last


def _graded_answers(
    vlm: VLM, drafts: Sequence[_Draft], config: PreferenceConfig
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """k candidates of rising error a record: nested sets of replaced words, most coupled first, sizes spread over 1…n_eff."""
    rows: list[tuple[int, str, tuple[int, ...]]] = []
    for number, draft in enumerate(drafts):
        if draft.record.answer_type == "closed" and config.closed != "replace":
            continue
        n = len(draft.coupled)
        k = min(config.n_candidates, n)
        for size in dict.fromkeys(round(1 + i * (n - 1) / max(k - 1, 1)) for i in range(k)):
            chosen = tuple(draft.coupled[:size])
            text, last = _splice(draft, chosen)
            rows.append((number, text if config.continuation == "splice" else text[:last], chosen))
    if config.continuation == "redecode" and rows:
        rows = _redecode(vlm, drafts, rows, config)
    out: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in drafts]
    for number, text, chosen in rows:
        out[number].append((text.strip(), chosen))
    for number, draft in enumerate(drafts):
        if draft.record.answer_type == "closed" and config.closed == "opposite":
            other = _other_option(vlm, draft)
            out[number] = [(other, ())] if other else []
    return out


def _redecode(
    vlm: VLM, drafts: Sequence[_Draft], rows: list[tuple[int, str, tuple[int, ...]]], config: PreferenceConfig
) -> list[tuple[int, str, tuple[int, ...]]]:
    """Continue each text after its last replacement by greedy decoding with the full image."""
    done = []
    for start in range(0, len(rows), config.batch_size):
        part = rows[start : start + config.batch_size]
        # Stripped: the template puts its own space before an answer, and a second one would be another token.
        prefixes = [encode_answer(vlm, drafts[n].record.question, text.strip())[:-1] for n, text, _ in part]
        tails = decode(vlm, [drafts[n].prompt for n, _, _ in part], prefixes, max_tokens=config.max_new_tokens)
        for (n, _, chosen), prefix, tail in zip(part, prefixes, tails, strict=True):
            done.append((n, decode_text(vlm, [*prefix, *tail]), chosen))
    return done


@torch.no_grad()
def _other_option(vlm: VLM, draft: _Draft) -> str | None:
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


def _rank(
    draft: _Draft, candidates: Sequence[tuple[str, tuple[int, ...]]], config: PreferenceConfig, similarity: Similarity
) -> PreferenceRecord:
    """Drop duplicates and right answers, measure similarity, keep the levels."""
    record, reasons = draft.record, draft.dropped
    if record.answer_type == "closed" and config.closed == "skip":
        reasons["closed_question"] += 1
    seen = {normalized(record.answer)}
    unique: list[tuple[str, tuple[int, ...]]] = []
    for text, chosen in candidates:
        if normalized(text) in seen:
            reasons["duplicate_or_right"] += 1
        else:
            seen.add(normalized(text))
            unique.append((text, chosen))
    scores = similarity(record.answer, [text for text, _ in unique])
    opposite = record.answer_type == "closed" and config.closed == "opposite"
    # The opposite option is wrong by construction however similar its wording: no similarity limit for it.
    kept, dropped_ = rerank(scores, config.n_levels, config.similarity_gap, 1.0 if opposite else config.max_similarity)
    reasons.update(dropped_)
    if not kept:
        reasons["no_level"] += 1
    levels = tuple(
        Level(
            unique[i][0],
            round(scores[i], 6),
            tuple((draft.words[w].text, draft.replacement[w]) for w in sorted(unique[i][1])),
        )
        for i in kept
    )
    coupled = set(draft.coupled)
    words = tuple(
        WordReward(w.text, round(r, 6), n in coupled)
        for n, (w, r) in enumerate(zip(draft.words, draft.rewards, strict=True))
    )
    return PreferenceRecord(record, levels, words, dict(reasons))
