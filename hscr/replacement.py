"""Token replacement: the coupled words of an answer replaced by hallucinated ones, in sets of rising size. Paper §3.1.

Departures from the paper:
1. Candidates for a hallucinated word must stay plausible without the image, p(v|i') ≥ α·max p(·|i') (VCD's constraint; `candidates_from`
   chooses the branch, `top_candidates` the K most plausible tokens in α's place): the lowest P_diff of a whole vocabulary is junk. Where
   the set is empty the position is skipped and counted.
2. The replacement grows to a whole word by decoding the dropped branch, so no half words appear.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hscr.config import PreferenceConfig
from hscr.decode import decode
from hscr.model import VLM, decode_text, encode_answer
from hscr.records import VQARecord
from hscr.reward import Branches, contrastive_logprobs
from hscr.trees import Prefixes
from hscr.visual_tokens import Prompt
from hscr.words import Word

WORD_TOKENS = 8  # tokens decoded to complete a replacement word; one that is still growing then is dropped
_REPLACEMENT = re.compile(r"\w+(?:[-']\w+)*")


@dataclass
class Draft:
    """One record on its way: its name for seeds, prompts (i and i'), answer tokens, words, and what replaces which word."""

    record: VQARecord
    name: str
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


@dataclass(frozen=True)
class Candidate:
    """A wrong answer before ranking; the fields of a Level but its similarity."""

    text: str
    replaced: tuple[tuple[str, str], ...] = ()
    source: str = "replacement"


def hallucinated_token(
    vlm: VLM, branch: Branches, ids: Sequence[int], word: Word, config: PreferenceConfig
) -> int | None:
    """The candidate that `replacement_choice` puts first at the word's first position, or None where only the word itself is plausible."""
    at = word.tokens[0]
    plausible = branch.dropped[at] if config.candidates_from == "dropped" else branch.full[at]
    if config.top_candidates:
        allowed = _most_plausible(vlm, plausible, ids[at], word.text, config.top_candidates)
    else:
        allowed = (plausible >= plausible.max() + torch.log(torch.tensor(config.alpha))).nonzero().squeeze(-1)
    if config.replacement_choice == "most_plausible":
        order = -branch.dropped[at]
    else:
        order = contrastive_logprobs(branch.full[at], branch.dropped[at], config.beta)
    for token in allowed[order[allowed].argsort()].tolist():
        if _is_candidate(vlm, token, ids[at], word.text):
            return token
    return None


def _most_plausible(vlm: VLM, plausible: Tensor, original: int, word: str, k: int) -> Tensor:
    """Ids [≤ k] of the most plausible tokens that could replace the word: what starts no other word takes no place."""
    found: list[int] = []
    for token in plausible.argsort(descending=True).tolist():
        if _is_candidate(vlm, token, original, word):
            found.append(token)
            if len(found) == k:
                break
    return torch.tensor(found, dtype=torch.long, device=plausible.device)


def _is_candidate(vlm: VLM, token: int, original: int, word: str) -> bool:
    """A token that begins a word like the original's does (with its space) and is no variant of it in case, space or stem."""
    if token in vlm.eos_ids:
        return False
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


def replace_words(vlm: VLM, drafts: Sequence[Draft], config: PreferenceConfig, known: Prefixes | None = None) -> None:
    """Complete every chosen token to a whole word by greedy decoding in the dropped branch; drop what turns into the word itself."""
    rows = [(d, w) for d in drafts for w in d.coupled]
    prefixes = [[*d.ids[: d.words[w].tokens[0]], d.first_token[w]] for d, w in rows]
    cuts = [d.cut for d, _ in rows]

    def grown(row: int, tail: Sequence[int]) -> tuple[str | None, str]:
        """The replacement word so far, and what stands behind it."""
        draft, w = rows[row]
        text = vlm.tokenizer.decode([*prefixes[row], *tail], skip_special_tokens=True)
        match = _REPLACEMENT.match(text, draft.words[w].start)
        return (match.group(), text[match.end() :]) if match else (None, "")

    def whole(row: int, tail: Sequence[int]) -> bool:
        """What follows begins with no hyphen, apostrophe or unfinished character, with which the word could go on."""
        return grown(row, tail)[1][:1] not in ("", "-", "'", "\ufffd")

    tails = decode(
        vlm,
        cuts,
        prefixes,
        max_tokens=WORD_TOKENS,
        token_budget=config.token_budget,
        known=known,
        ended=whole,
    )
    for row, ((draft, w), tail) in enumerate(zip(rows, tails, strict=True)):
        word, rest = grown(row, tail)
        is_whole = word is not None and (rest or tail[-1] in vlm.eos_ids)
        if word is not None and is_whole and not same_word(word, draft.words[w].text):
            draft.replacement[w] = word
        else:
            draft.coupled.remove(w)
            draft.dropped["replacement_is_the_word" if is_whole else "replacement_is_no_word"] += 1


def _splice(draft: Draft, chosen: Sequence[int]) -> tuple[str, int]:
    """The answer with the chosen words replaced, and where the last replacement ends."""
    text, at, last = "", 0, 0
    for w in sorted(chosen):
        word = draft.words[w]
        text += draft.text[at : word.start] + draft.replacement[w]
        at, last = word.end, len(text)
    return text + draft.text[at:], last


def graded_answers(
    vlm: VLM,
    drafts: Sequence[Draft],
    config: PreferenceConfig,
    source: str = "replacement",
    known: Prefixes | None = None,
) -> list[list[Candidate]]:
    """k candidates of rising error a draft: nested sets of replaced words, most coupled first, sizes spread over 1…n_eff."""
    rows: list[tuple[int, str, tuple[int, ...]]] = []
    for number, draft in enumerate(drafts):
        n = len(draft.coupled)
        k = min(config.n_candidates, n)
        for size in dict.fromkeys(round(1 + i * (n - 1) / max(k - 1, 1)) for i in range(k)):
            chosen = tuple(draft.coupled[:size])
            text, last = _splice(draft, chosen)
            rows.append((number, text if config.continuation == "splice" else text[:last], chosen))
    texts = [text.strip() for _, text, _ in rows]
    if config.continuation == "redecode":
        # Stripped: the template puts its own space before an answer, and a second one would be another token.
        texts = _continued(vlm, [drafts[n] for n, _, _ in rows], texts, config, known)
    out: list[list[Candidate]] = [[] for _ in drafts]
    for (number, _, chosen), text in zip(rows, texts, strict=True):
        words, new = drafts[number].words, drafts[number].replacement
        out[number].append(Candidate(text, tuple((words[w].text, new[w]) for w in sorted(chosen)), source))
    return out


def _continued(
    vlm: VLM, drafts: Sequence[Draft], texts: Sequence[str], config: PreferenceConfig, known: Prefixes | None
) -> list[str]:
    """Each text, one a draft, continued after its end by greedy decoding with the full image."""
    prefixes = [encode_answer(vlm, d.record.question, text)[:-1] for d, text in zip(drafts, texts, strict=True)]
    prompts = [d.prompt for d in drafts]
    tails = decode(
        vlm, prompts, prefixes, max_tokens=config.max_new_tokens, token_budget=config.token_budget, known=known
    )
    return [decode_text(vlm, [*prefix, *tail]) for prefix, tail in zip(prefixes, tails, strict=True)]
