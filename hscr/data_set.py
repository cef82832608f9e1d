"""A data set on disk: a folder's good records, their images, the graded answers it may bring along, and the digest that names it all.

What a line must hold is hscr/records.py's part. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hscr.artifacts import file_digest, json_digest
from hscr.images import decode_image
from hscr.records import (
    PreferenceRecord,
    RejectedRow,
    VQARecord,
    holds_preferences,
    numbered_records,
    parsed_lines,
    preference_record,
    records_file,
    to_json,
)
from hscr.repeats import Asked, find_repeats, summary
from hscr.words import wording

PREFERENCES = "preferences.jsonl"


class DataSet:
    """The good records of a folder, their images, and the digest that names both."""

    def __init__(self, path: Path) -> None:
        numbered, self.rejected = numbered_records(path)
        self.lines, self.records = [line for line, _ in numbered], [record for _, record in numbered]
        file = records_file(path)
        self.folder = file.parent
        if not self.records:
            raise ValueError(f"data set {path.name!r} has no usable record{_reasons(self.rejected)}")
        images = sorted({i for r in self.records for i in r.images})
        missing = [i for i in images if not (self.folder / i).is_file()]
        if missing:
            raise ValueError(
                f"data set {path.name!r}: {len(missing)} of {len(images)} images are missing beside {file.name}, as {missing[0]}"
            )
        self._files = {i: file_digest(self.folder / i) for i in images}
        content: list[Any] = [[to_json(r) for r in self.records], [[i, digest] for i, digest in self._files.items()]]
        self.given = given_preferences(file)
        if self.given is not None:
            checked = list(checked_preferences(self.given, self.records))
            odd = [row for row in checked if isinstance(row, RejectedRow)]
            if odd or not checked:
                raise ValueError(
                    f"data set {path.name!r}: {self.given.name} has "
                    + (f"{len(odd)} lines that fit no record{_reasons(odd)}" if odd else "no line; remove it")
                )
        self.digest = json_digest(content if self.given is None else [*content, file_digest(self.given)])

    def repeats(self) -> dict[str, Any]:
        """Contradictions and duplicates among the records, by line (hscr/repeats.py's summary)."""
        return repeated(self.lines, self.records, self._files)

    def open_image(self, record: VQARecord) -> Image.Image:
        """The first image, for showing."""
        image, view = record.shown[0]
        return decode_image(self.folder / image, view=view)

    def open_images(self, record: VQARecord) -> tuple[Image.Image, ...]:
        """All images, for asking."""
        return tuple(decode_image(self.folder / image, view=view) for image, view in record.shown)


def _reasons(rejected: list[RejectedRow]) -> str:
    return f" ({'; '.join(f'line {r.line}: {r.reason}' for r in rejected[:3])})" if rejected else ""


def repeated(lines: Iterable[int], records: Iterable[VQARecord], files: Mapping[str, str]) -> dict[str, Any]:
    """The summary of records that ask the same of the same pictures, by line. `files`: the digest of every image's file."""
    found = find_repeats(
        Asked(tuple((files[image], view) for image, view in r.shown), r.question, r.answer, {"line": line})
        for line, r in zip(lines, records, strict=True)
    )
    return summary([r.places for r in found.contradictions], [r.places for r in found.duplicates])


def given_preferences(records: Path) -> Path | None:
    """The graded answers that a data set brings: its own file where that holds preference records, else preferences.jsonl beside it."""
    if holds_preferences(records):
        return records
    beside = records.with_name(PREFERENCES)
    return beside if beside.is_file() else None


def checked_preferences(path: Path, records: Iterable[VQARecord]) -> Iterator[PreferenceRecord | RejectedRow]:
    """Preference records in file order; a line that is none, or none of these records', is a RejectedRow."""
    known = {r.id: r for r in records}
    seen: set[str] = set()
    for number, row in parsed_lines(path):
        try:
            if isinstance(row, ValueError):
                raise row
            preference = preference_record(row)
            identity = preference.record.id
            if identity in seen:
                raise ValueError("id: used by an earlier line")
            if preference.record != known.get(identity):
                raise ValueError("record: is none of the data set's")
            said = {
                wording(preference.record.answer): 0
            }  # each level is worse than the one before, so none says the same
            for n, level in enumerate(preference.levels, 1):
                if (same := said.setdefault(wording(level.text), n)) != n:
                    raise ValueError(
                        f"levels: level {n} {f'says the same as level {same}' if same else 'is the right answer'}"
                    )
            numbers = [*(level.similarity for level in preference.levels), *(w.reward for w in preference.words)]
            if not all(map(math.isfinite, numbers)):
                raise ValueError("similarity, reward: must be finite")
            try:
                json.dumps(to_json(preference), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError("holds half of a surrogate pair, which is no text") from None
        except ValueError as error:
            yield RejectedRow(number, str(error))
        else:
            seen.add(identity)
            yield preference
