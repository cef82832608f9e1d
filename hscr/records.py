"""VQA records and preference records, and their JSONL form.

A data set is a folder: one JSONL file (a record a line) and the images it names, relative to that file. Bad rows are never dropped
silently: reading returns them with their line and reason. Nothing here loads torch or opens an image.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from hscr import record_fields as fields
from hscr.image_view import View
from hscr.words import wording

ANSWER_TYPES = ("open", "closed", "caption")
MAX_LINE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class GroundedWord:
    """A word of the answer that only the image can give, and the words of its category (itself among them)."""

    word: str
    among: tuple[str, ...]


@dataclass(frozen=True)
class VQARecord:
    """One question on one image or several, one reference answer. `image` and `further_images` are paths relative to the folder.

    `group` is the patient or study that records share, None where none is known: parts of a data set never share one.
    `views` says for each image which frame, slice or window of its file is meant; empty where no file needs that.
    """

    id: str
    image: str
    question: str
    answer: str
    _: KW_ONLY  # by name from here on: a value in another's place would be a wrong record, silently
    answer_type: str = "open"
    options: tuple[str, ...] = ()
    grounded: tuple[GroundedWord, ...] = ()
    group: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    further_images: tuple[str, ...] = ()
    views: tuple[View, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """All images, in the order in which the question sees them."""
        return (self.image, *self.further_images)

    @property
    def shown(self) -> tuple[tuple[str, View], ...]:
        """Each image with its view, in order."""
        return tuple(zip(self.images, self.views or [View()] * len(self.images), strict=True))


@dataclass(frozen=True)
class RejectedRow:
    """A line that is no record, and why. `line` counts from 1."""

    line: int
    reason: str


@dataclass(frozen=True)
class Level:
    """One dispreferred answer: its text, similarity to y_w, which words were replaced by what, and where it came from.

    `source`: replacement (also of a closed question's other option), sampled from the model, random, or a person's correction.
    """

    text: str
    similarity: float
    replaced: tuple[tuple[str, str], ...] = ()
    source: str = "replacement"


@dataclass(frozen=True)
class WordReward:
    """A word of the reference answer with its alignment reward (nats); `coupled` where it was chosen for replacement."""

    text: str
    reward: float
    coupled: bool


@dataclass(frozen=True)
class PreferenceRecord:
    """A record with its graded wrong answers, nearest to right first, and where they came from. `dropped` counts reasons."""

    record: VQARecord
    levels: tuple[Level, ...]
    words: tuple[WordReward, ...]
    dropped: dict[str, int]


def to_json(value: Any) -> dict[str, Any]:
    """The JSON object of a record, without fields at their defaults' emptiness and without the usual source of a level.

    One image is `image`, several are `images`.
    """
    return {k: v for k, v in dataclasses.asdict(value, dict_factory=_row).items() if v not in (None, (), {}, [])}


_VIEW = {field.name for field in dataclasses.fields(View)}


def _row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dataclass as a dict in the form that it had before it could hold more, for digests depend on that."""
    row = {k: v for k, v in pairs if (k, v) != ("source", "replacement")}
    if row.keys() == _VIEW:
        return {k: v for k, v in row.items() if v is not None}
    further, views = row.pop("further_images", ()), row.pop("views", ())
    if any(views):
        row |= {"views": views} if further else {"view": views[0]}
    return (
        {"images" if k == "image" else k: (v, *further) if k == "image" else v for k, v in row.items()}
        if further
        else row
    )


def vqa_record(row: Any) -> VQARecord:
    """Parse one JSON object; ValueError says which field is wrong and how."""
    if not isinstance(row, dict):
        raise ValueError("a line must be a JSON object")
    identity = fields.text_or_number(row.get("id"), "id")
    images = fields.image_paths(row)
    question, answer = fields.text(row.get("question"), "question"), fields.text_or_number(row.get("answer"), "answer")
    kind = row.get("answer_type") or "open"
    if not isinstance(kind, str) or kind.lower() not in ANSWER_TYPES:
        raise ValueError(f"answer_type: must be {', '.join(ANSWER_TYPES[:-1])} or {ANSWER_TYPES[-1]}")
    group, options = row.get("group"), fields.options(row.get("options") or [])
    if kind.lower() == "closed" and options and wording(answer) not in map(wording, options):
        raise ValueError("answer: is none of the options of this closed question")
    return VQARecord(
        identity,
        images[0],
        question,
        answer,
        answer_type=kind.lower(),
        options=options,
        grounded=tuple(GroundedWord(*g) for g in fields.grounded(row.get("grounded") or [])),
        group=None if group is None else fields.storable(group, "group"),
        meta=fields.meta(row.get("meta") or {}),
        further_images=tuple(images[1:]),
        views=fields.views(row, len(images)),
    )


def records_file(data: Path) -> Path:
    """The JSONL file of a data set given as folder or file; ValueError says what is missing."""
    if data.is_file():
        return data
    if (data / "records.jsonl").is_file():
        return data / "records.jsonl"
    found = sorted(p for p in data.glob("*.jsonl") if p.is_file()) if data.is_dir() else []
    if len(found) != 1:
        what = (
            "no such file or folder"
            if not data.exists()
            else f"{len(found)} .jsonl files there, expected records.jsonl"
        )
        raise ValueError(f"data set {data.name!r}: {what}")
    return found[0]


def parsed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of a JSONL file's lines that are not empty; a line that is no JSON is its ValueError."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                    pass  # never whole in memory: a line of gigabytes is no record
                yield number, ValueError(f"longer than {MAX_LINE_BYTES} bytes")
            elif line.strip():
                yield number, parsed(line)


def parsed(line: bytes) -> Any:
    """The value of a line of JSON, or the ValueError that says why it is none."""
    try:
        return json.loads(line)
    except RecursionError:
        return ValueError("nested too deeply")
    except UnicodeDecodeError:
        return ValueError("not UTF-8")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg}")
    except ValueError as error:  # an integer of thousands of digits
        return error


def read_records(data: Path) -> tuple[list[VQARecord], list[RejectedRow]]:
    """All good records of a data set and all rejected rows (bad JSON, bad field, repeated id), in file order.

    A file of preference records is read too: each line's `record`.
    """
    numbered, rejected = numbered_records(data)
    return [record for _, record in numbered], rejected


def numbered_records(data: Path) -> tuple[list[tuple[int, VQARecord]], list[RejectedRow]]:
    """As read_records, each record with its line."""
    records: list[tuple[int, VQARecord]] = []
    rejected: list[RejectedRow] = []
    seen: set[str] = set()
    for number, row in parsed_lines(records_file(data)):
        try:
            if isinstance(row, ValueError):
                raise row
            record = vqa_record(row["record"] if is_preference(row) else row)
            if record.id in seen:
                raise ValueError("id: used by an earlier line")
        except ValueError as error:
            rejected.append(RejectedRow(number, str(error)))
        else:
            seen.add(record.id)
            records.append((number, record))
    return records, rejected


def is_preference(row: Any) -> bool:
    """Whether a line's value is a preference record's rather than a VQA record's."""
    return isinstance(row, dict) and isinstance(row.get("record"), dict) and "id" not in row


def holds_preferences(path: Path) -> bool:
    """Whether a JSONL file's first line is a preference record."""
    return is_preference(next((row for _, row in parsed_lines(path)), None))


def preference_record(row: Any) -> PreferenceRecord:
    """The inverse of to_json for a preference record; ValueError says which field is wrong and how."""
    if not is_preference(row):
        raise ValueError("record: must be an object")
    words, dropped = fields.objects(row, "words"), row.get("dropped", {})
    if not (isinstance(dropped, dict) and all(isinstance(n, int) for n in dropped.values())):
        raise ValueError("dropped: must be an object of counts")
    return PreferenceRecord(
        record=vqa_record(row["record"]),
        levels=tuple(map(_level, fields.objects(row, "levels"))),
        words=tuple(
            WordReward(str(w.get("text")), fields.number(w, "reward"), w.get("coupled") is True) for w in words
        ),
        dropped=dropped,
    )


def _level(row: dict[str, Any]) -> Level:
    said, replaced, source = row.get("text"), row.get("replaced", []), row.get("source", "replacement")
    if not (isinstance(said, str) and said.strip() and isinstance(source, str)):
        raise ValueError("levels: must have a text that is not empty, and no source or a word as source")
    if not (isinstance(replaced, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in replaced)):
        raise ValueError("levels: `replaced` must be a list of pairs of words")
    return Level(said, fields.number(row, "similarity"), tuple((str(a), str(b)) for a, b in replaced), source)


def read_preferences(path: Path) -> Iterator[PreferenceRecord]:
    """Preference records of a JSONL file; a torn last line (a writer that was killed) ends the reading."""
    with path.open("rb") as lines:
        yield from preference_records(lines)


def preference_records(lines: Iterable[bytes]) -> Iterator[PreferenceRecord]:
    """Preference records of a file that is already open, from where it stands; a torn last line ends the reading here too."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        yield preference_record(json.loads(line))


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write records (dataclasses) one a line."""
    with path.open("w", encoding="utf-8") as out:
        for value in values:
            out.write(json.dumps(to_json(value), ensure_ascii=False) + "\n")
