"""A person's review of generated preferences: records and levels rejected, levels corrected, applied before the optimisation.

A review is a JSON file beside the run: {"records": {"3": {"line": digest, "rejected": true}, "5": {"line": …, "levels": {"1": {"rejected":
true}, "2": {"text": "…"}}}}}; numbers count from 1. `line` is the digest of the very line that was looked at, so that a review never lands
on other preferences. A corrected level gets its similarity anew and its place among the levels by it, as a generated one does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hscr.artifacts import bytes_digest
from hscr.record_fields import text as checked_text
from hscr.records import Level, PreferenceRecord, preference_record
from hscr.similarity import Similarity
from hscr.words import wording


@dataclass(frozen=True)
class LevelReview:
    """What becomes of one level: gone, or another text in its place."""

    rejected: bool = False
    text: str | None = None


@dataclass(frozen=True)
class RecordReview:
    """What becomes of one record; `levels` by their number, from 1."""

    line: str
    rejected: bool = False
    levels: dict[int, LevelReview] = field(default_factory=dict)


def read_review(path: Path) -> dict[int, RecordReview]:
    """Reviews by record number. ValueError where the file is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["records"]
        return {int(number): _record_review(row) for number, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--review: {path.name} is no review of preference records ({type(error).__name__})"
        ) from error


def _record_review(row: dict[str, Any]) -> RecordReview:
    levels = {int(n): LevelReview(**level) for n, level in row.get("levels", {}).items()}
    return RecordReview(row["line"], row.get("rejected", False), levels)


def corrected_levels(preference: PreferenceRecord, levels: dict[int, LevelReview]) -> list[Level]:
    """The levels that stand, with their corrections, in their old places. ValueError names the level that cannot be."""
    unknown = [n for n in levels if not 0 < n <= len(preference.levels)]
    if unknown:
        raise ValueError(f"level {unknown[0]}: the record has {len(preference.levels)} levels, counted from 1")
    standing: list[Level] = []
    seen = {wording(preference.record.answer): "the right answer"}
    for number, level in enumerate(preference.levels, 1):
        given = levels.get(number, LevelReview())
        if given.rejected:
            continue
        if given.text is not None:
            text = checked_text(given.text, f"level {number}")
            same = seen.get(wording(text))
            if same is not None:
                raise ValueError(f"level {number}: says the same as {same}; reject the level instead")
            level = Level(text, level.similarity, source="corrected")
        elif seen.get(wording(level.text), "").startswith("corrected"):
            raise ValueError(f"level {number}: an earlier level was corrected to the same; reject one of them")
        seen.setdefault(wording(level.text), f"{'corrected ' if given.text is not None else ''}level {number}")
        standing.append(level)
    return standing


def reviewed(
    lines: Iterable[bytes], review: dict[int, RecordReview], similarity: Callable[[], Similarity]
) -> Iterator[PreferenceRecord]:
    """The preferences that stand. `similarity` is loaded only for corrections. ValueError where the review is of other preferences."""
    left = dict(review)
    for number, line in enumerate(lines, 1):
        preference, given = preference_record(json.loads(line)), left.pop(number, None)
        if given is None:
            yield preference
            continue
        if bytes_digest(line) != given.line:
            raise ValueError(
                f"--review: record {number} is not the one that was looked at; review what this run generated"
            )
        if not given.rejected:
            yield _standing(preference, given, similarity)
    if left:
        raise ValueError(f"--review: record {min(left)} is not among the preferences")


def _standing(
    preference: PreferenceRecord, given: RecordReview, similarity: Callable[[], Similarity]
) -> PreferenceRecord:
    levels = corrected_levels(preference, given.levels)
    if any(level.source == "corrected" for level in levels):
        found = similarity()(preference.record.answer, [level.text for level in levels])
        levels = [
            replace(lv, similarity=s) if lv.source == "corrected" else lv for lv, s in zip(levels, found, strict=True)
        ]
        levels.sort(key=lambda level: -level.similarity)  # nearest to right first, as everywhere; stable
    gone = len(preference.levels) - len(levels)
    dropped = {**preference.dropped, "rejected_in_review": gone} if gone else preference.dropped
    return replace(preference, levels=tuple(levels), dropped=dropped)
