"""The words of an answer and the tokens that spell them. No torch, so that answers of other servers can be scored too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

WORD = re.compile(r"\w+(?:[-'./]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word of an answer: its text, character span [start, end) in the answer, and the indices of its tokens."""

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


def normalized(text: str) -> str:
    """Lower case, words only: the form in which duplicates and answers equal to y_w are recognised."""
    return " ".join(re.findall(r"\w+", text.lower()))


def wording(text: str) -> str:
    """What two texts have in common that say the same: their normalized form, or where that is empty ("+") the text."""
    return normalized(text) or text.strip()


def words_at(text: str, spans: Sequence[tuple[int, int]]) -> list[Word]:
    """The text's words, each with the tokens whose character span [start, end) touches it."""
    words = []
    for match in WORD.finditer(text):
        tokens = tuple(t for t, (start, end) in enumerate(spans) if start < match.end() and end > match.start())
        if tokens:
            words.append(Word(match.group(), match.start(), match.end(), tokens))
    return words


def spans_of(text: str, pieces: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where each token stands in the text that they spell together; None where they do not spell it.

    `pieces` are tokens decoded one by one: spaces at their edges may be lost, and a part of a character is U+FFFD.
    """
    spans, at = [], 0
    for piece in pieces:
        core = piece.replace("\ufffd", " ").strip()
        begin = text.find(core, at) if core else at
        if begin < 0 or any(c.isascii() and not c.isspace() for c in text[at:begin]):
            return None
        spans.append((begin, begin + len(core)) if core else (at, at + ("\ufffd" in piece)))
        at = begin + len(core)
    return None if any(c.isascii() and not c.isspace() for c in text[at:]) else spans
