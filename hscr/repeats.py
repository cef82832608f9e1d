"""Repeats: records that ask the same of the same pictures and are answered the same (duplicates) or in different ways (contradictions).

Both are told and kept, for a reference set may hold what two readers said. Questions and answers are the same where their words are
(hscr/words.py). What makes pictures the same, and where a record stands, is the caller's to say. No torch here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hscr.words import wording

TOLD = 20  # groups of records of each kind, and places of a group, that a summary names

P = TypeVar("P")


@dataclass(frozen=True)
class Asked(Generic[P]):
    """A record as far as repeats go: equal `pictures` are the same ones; `place` says where it stands."""

    pictures: Hashable
    question: str
    answer: str
    place: P


@dataclass(frozen=True)
class Repeat(Generic[P]):
    """A question's words and the places of the records that repeat it, in their order."""

    question: str
    places: tuple[P, ...]


@dataclass(frozen=True)
class Repeats(Generic[P]):
    """Of each question on the same pictures: all its records where they differ, and those that say what another one says."""

    contradictions: list[Repeat[P]]
    duplicates: list[Repeat[P]]


def find_repeats(asked: Iterable[Asked[P]]) -> Repeats[P]:
    """All repeats, in the order of their first record. A question may be in both lists."""
    groups: dict[tuple[Hashable, str], list[Asked[P]]] = defaultdict(list)
    for one in asked:
        groups[one.pictures, wording(one.question)].append(one)
    contradictions, duplicates = [], []
    for (_, question), group in groups.items():
        by_answer: dict[str, list[P]] = defaultdict(list)
        for one in group if len(group) > 1 else ():
            by_answer[wording(one.answer)].append(one.place)
        if len(by_answer) > 1:
            contradictions.append(Repeat(question, tuple(one.place for one in group)))
        if same := tuple(place for places in by_answer.values() if len(places) > 1 for place in places):
            duplicates.append(Repeat(question, same))
    return Repeats(contradictions, duplicates)


def summary(contradictions: Sequence[Sequence[Any]], duplicates: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What is told of repeats, bounded and without their texts: of each kind how many questions and records, and the first places."""
    return {
        kind: {
            "questions": len(groups),
            "records": sum(map(len, groups)),
            "first": [list(places[:TOLD]) for places in groups[:TOLD]],
        }
        for kind, groups in (("contradictions", contradictions), ("duplicates", duplicates))
    }


def sentences(told: dict[str, Any]) -> dict[str, str]:
    """A sentence for each kind of a summary that there is; places are {"line": number}."""
    ways = {"contradictions": "in different ways", "duplicates": "more than once in the same words"}
    out = {}
    for kind, way in ways.items():
        found = told[kind]
        if found["questions"]:
            lines = "; ".join(", ".join(str(p["line"]) for p in places[:3]) for places in found["first"][:3])
            out[kind] = (
                f"{found['records']} records answer {found['questions']} of the questions {way}, on the same pictures; "
                f"all are kept, the first are on lines {lines}"
            )
    return out
