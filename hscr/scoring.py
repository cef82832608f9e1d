"""Two scorers of answers, the score of grounded words, and captions. Pure text in, numbers out.

`llava_med` is faithful to the published protocol (LLaVA-Med's run_eval.py, normalisation of the VQA evaluation) with its quirks, so that
its numbers compare with the literature's: open recall counts true positives by the prediction's counts, and closed answers are judged
by substrings. `strict` is what those quirks should have been. One quirk is not repeated: the published script leaves a wrong answer that
holds "yes" or "no" out of its denominator altogether; here it counts as 0, or the share of such answers would raise the score.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from hscr.records import GroundedWord, VQARecord

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"(\d)(,)(\d)")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_MOST_PERIODS = 32  # the protocol passes re.UNICODE, whose value is 32, in the place of the count
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(n) for n, word in enumerate("one two three four five six seven eight nine ten".split(), 1)
}
_ARTICLES = ("a", "an", "the")
# The VQA evaluation's contractions, whose keys are the forms with one apostrophe left out; one entry is the wrong way round there.
_CONTRACTIONS = {
    form[:at] + form[at + 1 :]: form
    for form in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
        "how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock "
        "oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
        "someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's "
        "they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
        "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all "
        "y'all'll y'all'd've you'd you'd've you'll you're you've"
    ).split()
    for at, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def llava_med_normalize(text: str) -> str:
    """The protocol's normalisation: "The Chest X-Ray." → "chest x ray", "1,000 mm" → "1000 mm"."""
    out = text = text.lower()
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text)
        out = out.replace(mark, "" if touches else " ")
    out = _PERIOD.sub("", out, count=_MOST_PERIODS)
    words = [_NUMBERS.get(w, w) for w in out.split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def llava_med_recall(prediction: str, reference: str) -> float:
    """Open questions: true positives counted in the prediction over themselves plus the reference's missing words."""
    said, ref = Counter(llava_med_normalize(prediction).split()), Counter(llava_med_normalize(reference).split())
    hits = sum(n for word, n in said.items() if word in ref)
    missing = sum(n for word, n in ref.items() if word not in said)
    return hits / (hits + missing) if hits + missing else 0.0


def llava_med_closed(prediction: str, reference: str) -> float:
    """Closed questions: only predictions with "yes" or "no" somewhere in them count; right iff the reference is a substring."""
    said, ref = llava_med_normalize(prediction), llava_med_normalize(reference)
    return float(("yes" in said or "no" in said) and ref in said)


def strict_words(text: str) -> list[str]:
    """Lower-case words and numbers, hyphens split."""
    return re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text.lower())


def strict_recall(prediction: str, reference: str) -> float:
    """Share of the reference's words, with their counts, that the prediction holds."""
    said, ref = Counter(strict_words(prediction)), Counter(strict_words(reference))
    return sum((said & ref).values()) / sum(ref.values()) if ref else 0.0


def named(text: str, phrases: Iterable[str]) -> set[tuple[str, ...]]:
    """Which phrases the text names, as tuples of words.

    A phrase said only inside a longer one of them is not named: "no pneumonia" is not "pneumonia".
    """
    said = strict_words(text)
    wanted = {tuple(strict_words(p)) for p in phrases} - {()}
    spans = {
        (i, i + len(phrase)): phrase
        for phrase in wanted
        for i in range(len(said) - len(phrase) + 1)
        if tuple(said[i : i + len(phrase)]) == phrase
    }
    return {
        phrase
        for (start, end), phrase in spans.items()
        if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in spans)
    }


def strict_closed(prediction: str, reference: str, options: Sequence[str] = ()) -> float:
    """Closed questions: 1 iff the prediction names exactly one of the options, the right one. Options default to yes and no."""
    return float(named(prediction, (*(options or ("yes", "no")), reference)) == {tuple(strict_words(reference))})


def grounded_words(prediction: str, grounded: Sequence[GroundedWord]) -> list[bool]:
    """Per grounded word (or hyphenated words): it is said, and no other of its category is."""
    return [named(prediction, (*g.among, g.word)) == {tuple(strict_words(g.word))} for g in grounded]


def caption_scores(prediction: str, reference: str) -> dict[str, float]:
    """BLEU-4 (sacrebleu's sentence BLEU, effective order) and ROUGE-L (F1, stemmed), both in [0, 1].

    One caption's: their mean is not the set's BLEU, which hscr/caption_sets.py brings into the tables. There is no METEOR: nltk's needs
    WordNet, which is a download. Raises ValueError where the extra is missing.
    """
    bleu, rouge = _caption_libraries()
    return {
        "caption/bleu": bleu.sentence_score(prediction, [reference]).score / 100,
        "caption/rouge_l": rouge.score(reference, prediction)["rougeL"].fmeasure,
    }


@functools.cache
def _caption_libraries() -> tuple[Any, Any]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ValueError(
            "captions are scored by sacrebleu and rouge-score, which are not installed: pip install 'hscr[caption]'"
        ) from error
    return BLEU(effective_order=True), RougeScorer(["rougeL"], use_stemmer=True)


def check_scorable(records: Iterable[VQARecord]) -> None:
    """ValueError where a record needs a scorer that is not installed: said before hours of work, not after."""
    if any(r.answer_type == "caption" for r in records):
        require_caption_libraries()


def require_caption_libraries() -> None:
    """ValueError where the extra that captions need is not installed, with the command that installs it."""
    _caption_libraries()


def score(record: VQARecord, prediction: str) -> dict[str, float]:
    """All scores that the record allows, by metric name."""
    if record.answer_type == "caption":
        return caption_scores(prediction, record.answer)
    if record.answer_type == "closed":
        return {
            "closed/llava_med": llava_med_closed(prediction, record.answer),
            "closed/strict": strict_closed(prediction, record.answer, record.options),
        }
    scores = {
        "open/llava_med": llava_med_recall(prediction, record.answer),
        "open/strict": strict_recall(prediction, record.answer),
    }
    if record.grounded:
        hits = grounded_words(prediction, record.grounded)
        scores["open/grounded_words"] = sum(hits) / len(hits)
    return scores


def is_right(scores: dict[str, float]) -> bool | None:
    """Whether an answer with these scores counts as right; None where that is no yes-or-no matter (captions).

    Closed: the strict scorer's. Open: every grounded word where the record names them, else at least half of the reference's words.
    """
    if "closed/strict" in scores:
        return scores["closed/strict"] == 1
    if "open/grounded_words" in scores:
        return scores["open/grounded_words"] == 1
    return scores["open/strict"] >= 0.5 if "open/strict" in scores else None
