"""Preference generation: VQA records in, graded wrong answers out. Paper §3.1 (reward, graded answers) and §3.2 (re-ranking).

Scores y_w with and without the image, lets hscr/replacement.py and hscr/candidates.py make wrong answers, and keeps the levels that the
similarity-aware re-ranking accepts. Candidates of all sources are ranked in one pool. Departures from the paper stand in those files.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from hscr.candidates import Contexts, corrupt_randomly, other_option, sampled_answers, word_contexts
from hscr.config import PreferenceConfig
from hscr.images import Images
from hscr.model import VLM, encode_answer, encode_prompts
from hscr.perturb import perturbed
from hscr.records import Level, PreferenceRecord, VQARecord, WordReward
from hscr.replacement import Candidate, Draft, graded_answers, hallucinated_token, replace_words
from hscr.reward import contrast, coupled_words, random_words, token_rewards, word_rewards, words_of
from hscr.similarity import Similarity, rerank
from hscr.token_budget import TokenBudget, budget_batches
from hscr.trees import Prefixes
from hscr.visual_tokens import Prompt, derived_seed
from hscr.words import normalized

_Made = list[tuple[Draft, list[Candidate]]]


def generate(
    vlm: VLM,
    records: Sequence[VQARecord],
    open_image: Callable[[VQARecord], Images],
    config: PreferenceConfig,
    similarity: Similarity,
    seed: int = 0,
    *,
    start: int = 0,
    stop: int | None = None,
    budget: TokenBudget | None = None,
) -> Iterator[PreferenceRecord]:
    """Yield one preference record a VQA record, in order. A record without a usable level comes out with `levels` empty and reasons.

    A resumed run gives all records again and `start`, the number already made; a shard (hscr/parts.py) gives `start` and `stop`: random
    words come from the whole data set's answers.
    `budget` (default: the configuration's) shrinks where the device runs out of memory; its owner sees it.
    """
    budget = budget or TokenBudget(config.token_budget)
    contexts = word_contexts(r.answer for r in records) if config.candidates == "random" else {}
    end = len(records) if stop is None else stop
    for at in range(start, end, config.batch_size):
        batch = records[at : min(at + config.batch_size, end)]
        images = [open_image(r) for r in batch]

        def made(tokens: int, batch: Sequence[VQARecord] = batch, images: Sequence[Images] = images) -> _Made:
            within = dataclasses.replace(config, token_budget=tokens)
            return _batch_made(vlm, batch, images, within, seed, contexts)

        for draft, candidates in budget.within(made):
            yield _rank(draft, candidates, config, similarity)


def _batch_made(
    vlm: VLM,
    records: Sequence[VQARecord],
    images: Sequence[Images],
    config: PreferenceConfig,
    seed: int,
    contexts: Contexts,
) -> _Made:
    """Drafts and their candidates, in order; records of like length together, as many as `config.token_budget` allows."""
    prompts = encode_prompts(vlm, images, [r.question for r in records])
    answers = [encode_answer(vlm, r.question, r.answer) for r in records]
    out: dict[int, tuple[Draft, list[Candidate]]] = {}
    lengths = [len(p.input_ids) + len(a) for p, a in zip(prompts, answers, strict=True)]
    for part in budget_batches(lengths, config.token_budget):
        known = Prefixes()  # both branches' caches: what scored y_w goes on to replace its words and to decode answers
        drafts = _drafts(
            vlm,
            [records[i] for i in part],
            [images[i] for i in part],
            [prompts[i] for i in part],
            [answers[i] for i in part],
            config,
            seed,
            known,
        )
        replace_words(vlm, drafts, config, known)
        candidates = _candidates(vlm, drafts, config, contexts, known)
        out |= dict(zip(part, zip(drafts, candidates, strict=True), strict=True))
    return [out[i] for i in range(len(records))]


def _drafts(
    vlm: VLM,
    batch: Sequence[VQARecord],
    images: Sequence[Images],
    prompts: Sequence[Prompt],
    answers: Sequence[list[int]],
    config: PreferenceConfig,
    seed: int,
    known: Prefixes,
) -> list[Draft]:
    """Score y_w in both branches and choose the coupled words with what replaces their first token."""
    questions = [r.question for r in batch]
    names = [f"{seed}/{r.id}" for r in batch]

    def hide(mask: int) -> list[Prompt]:
        return perturbed(
            vlm,
            prompts,
            images,
            questions,
            names,
            kind=config.perturbation,
            ratio=config.dropout_ratio,
            mask=mask,
        )

    cuts = hide(0)
    scored = contrast(vlm, prompts, itertools.chain([cuts], map(hide, range(1, config.n_masks))), answers, known)
    drafts = []
    for record, name, prompt, cut, ids, branch in zip(batch, names, prompts, cuts, answers, scored, strict=True):
        text, words = words_of(vlm, ids)
        rewards = word_rewards(token_rewards(branch, ids, config.reward), words)
        draft = Draft(record, name, prompt, cut, ids, text, words, rewards, [], {}, {}, Counter())
        for index in [] if config.candidates == "sampled" else _chosen_words(rewards, config, name):
            token = hallucinated_token(vlm, branch, ids, words[index], config)
            if token is None:
                draft.dropped["no_plausible_replacement"] += 1
            else:
                draft.coupled.append(index)
                draft.first_token[index] = token
        drafts.append(draft)
    return drafts


def _chosen_words(rewards: Sequence[float], config: PreferenceConfig, name: str) -> list[int]:
    """Which words to replace, first to last."""
    if config.coupling == "random":
        return random_words(len(rewards), config.n_coupled, derived_seed("coupling", name))
    return coupled_words(rewards, config.n_coupled)


def _candidates(
    vlm: VLM, drafts: Sequence[Draft], config: PreferenceConfig, contexts: Contexts, known: Prefixes
) -> list[list[Candidate]]:
    """The wrong answers of each draft, from the sources that `candidates` and `closed` name."""
    out: list[list[Candidate]] = [[] for _ in drafts]
    open_: list[int] = []
    for number, draft in enumerate(drafts):
        if draft.record.answer_type != "closed" or config.closed == "replace":
            open_.append(number)
        elif config.closed == "opposite" and (other := other_option(vlm, draft)):
            out[number] = [Candidate(other)]
    asked = [drafts[n] for n in open_]
    sources = []
    if config.candidates == "random":
        for draft in asked:
            corrupt_randomly(draft, contexts)
        sources.append(graded_answers(vlm, asked, config, "random", known))
    if config.candidates in ("replacement", "both"):
        sources.append(graded_answers(vlm, asked, config, known=known))
    if config.candidates in ("sampled", "both"):
        sources.append(sampled_answers(vlm, asked, config, known))
    for made in sources:
        for number, candidates in zip(open_, made, strict=True):
            out[number] += candidates
    return out


def _rank(
    draft: Draft, candidates: Sequence[Candidate], config: PreferenceConfig, similarity: Similarity
) -> PreferenceRecord:
    """Drop duplicates and right answers, measure similarity, keep the levels."""
    record, reasons = draft.record, draft.dropped
    if record.answer_type == "closed" and config.closed == "skip":
        reasons["closed_question"] += 1
    seen = {normalized(record.answer)}
    unique: list[Candidate] = []
    for candidate in candidates:
        text = normalized(candidate.text)
        if not text:
            reasons["empty_answer"] += 1
        elif text in seen:
            reasons["duplicate_or_right"] += 1
        else:
            seen.add(text)
            unique.append(candidate)
    scores = similarity(record.answer, [c.text for c in unique])
    opposite = record.answer_type == "closed" and config.closed == "opposite"
    # The opposite option is wrong by construction however similar its wording: no similarity limit for it.
    kept, dropped_ = rerank(scores, config.n_levels, config.similarity_gap, 1.0 if opposite else config.max_similarity)
    reasons.update(dropped_)
    if not kept:
        reasons["no_level"] += 1
    levels = tuple(Level(unique[i].text, round(scores[i], 6), unique[i].replaced, unique[i].source) for i in kept)
    coupled = set(draft.coupled)
    words = tuple(
        WordReward(w.text, round(r, 6), n in coupled)
        for n, (w, r) in enumerate(zip(draft.words, draft.rewards, strict=True))
    )
    return PreferenceRecord(record, levels, words, dict(reasons))
