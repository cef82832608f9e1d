"""Two scorers of answers, and the score of grounded words. Pure text in, numbers out.

`llava_med` is faithful to the published protocol (LLaVA-Med's run_eval.py, normalisation of the VQA evaluation) with its quirks, so that
its numbers compare with the literature's: open recall counts true positives by the prediction's counts, and closed answers are judged
by substrings. `strict` is what those quirks should have been.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from hscr.records import GroundedWord, VQARecord

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"(\d)(,)(\d)")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(n) for n, word in enumerate("one two three four five six seven eight nine ten".split(), 1)
}
_ARTICLES = ("a", "an", "the")
# The VQA evaluation's contractions: the key is the form without its apostrophes.
_CONTRACTIONS = {
    form.replace("'", ""): form
    for form in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
        "how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've "
        "needn't not've o'clock oughtn't ow's'at 'ow's'at shan't she'd've she's should've shouldn't shouldn't've somebody'd "
        "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
        "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
        "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
        "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
    ).split()
}


def llava_med_normalize(text: str) -> str:
    """The protocol's normalisation: "The Chest X-Ray." → "chest x ray", "1,000 mm" → "1000 mm"."""
    out = text = text.lower()
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text)
        out = out.replace(mark, "" if touches else " ")
    out = _PERIOD.sub("", out)
    words = [_NUMBERS.get(w, w) for w in out.split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES).replace(",", " ")


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


def strict_closed(prediction: str, reference: str, options: Sequence[str] = ()) -> float:
    """Closed questions: 1 iff the prediction names exactly one of the options, the right one. Options default to yes and no."""
    choices = {tuple(strict_words(o)) for o in (*(options or ("yes", "no")), reference)}
    said = strict_words(prediction)
    named = {c for c in choices if c and any(tuple(said[i : i + len(c)]) == c for i in range(len(said)))}
    return float(named == {tuple(strict_words(reference))})


def grounded_words(prediction: str, grounded: Sequence[GroundedWord]) -> list[bool]:
    """Per grounded word: it is said, and no other word of its category is."""
    said = set(strict_words(prediction))
    return [{w.lower() for w in (*g.among, g.word)} & said == {g.word.lower()} for g in grounded]


def score(record: VQARecord, prediction: str) -> dict[str, float]:
    """All scores that the record allows, by metric name."""
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
