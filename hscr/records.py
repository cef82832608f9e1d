"""VQA records and preference records, and their JSONL form.

A data set is a folder: one JSONL file (a record a line) and the images it names, relative to that file. Bad rows are never dropped
silently: reading returns them with their line and reason. Nothing here loads torch or opens an image.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ANSWER_TYPES = ("open", "closed", "caption")
MAX_TEXT_CHARS = 20_000
MAX_IMAGES = 16


@dataclass(frozen=True)
class GroundedWord:
    """A word of the answer that only the image can give, and the words of its category (itself among them)."""

    word: str
    among: tuple[str, ...]


@dataclass(frozen=True)
class VQARecord:
    """One question on one image or several, one reference answer. `image` and `further_images` are paths relative to the folder."""

    id: str
    image: str
    question: str
    answer: str
    answer_type: str = "open"
    options: tuple[str, ...] = ()
    grounded: tuple[GroundedWord, ...] = ()
    group: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    further_images: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """All images, in the order in which the question sees them."""
        return (self.image, *self.further_images)


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


def _row(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dataclass as a dict in the form that it had before it could hold more, for digests depend on that."""
    row = {k: v for k, v in fields if (k, v) != ("source", "replacement")}
    further = row.pop("further_images", ())
    return (
        {"images" if k == "image" else k: (v, *further) if k == "image" else v for k, v in row.items()}
        if further
        else row
    )


def vqa_record(row: Any) -> VQARecord:
    """Parse one JSON object; ValueError says which field is wrong and how."""
    if not isinstance(row, dict):
        raise ValueError("a line must be a JSON object")
    text: dict[str, str] = {}
    images: list[str] = []
    for name in ("id", "image", "question", "answer"):
        value = row.get(name)
        if name == "image":
            images = _images(row)
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name in ("id", "answer"):
            value = str(value)  # VQA-RAD has numeric answers
        text[name] = checked_text(value, name)
    kind = row.get("answer_type") or "open"
    if not isinstance(kind, str) or kind.lower() not in ANSWER_TYPES:
        raise ValueError(f"answer_type: must be {', '.join(ANSWER_TYPES[:-1])} or {ANSWER_TYPES[-1]}")
    options = row.get("options") or []
    if not (isinstance(options, list) and all(isinstance(o, str) and o for o in options)):
        raise ValueError("options: must be a list of texts")
    grounded = row.get("grounded") or []
    if not isinstance(grounded, list):
        raise ValueError("grounded: must be a list")
    group, meta = row.get("group"), row.get("meta") or {}
    if group is not None and not isinstance(group, str):
        raise ValueError("group: must be a text")
    if not isinstance(meta, dict):
        raise ValueError("meta: must be an object")
    return VQARecord(
        **text,
        image=images[0],
        further_images=tuple(images[1:]),
        answer_type=kind.lower(),
        options=tuple(options),
        grounded=tuple(_grounded(g) for g in grounded),
        group=group,
        meta=meta,
    )


def checked_text(value: Any, name: str) -> str:
    """The text, stripped; ValueError, with `name` in it, where it is none that can be stored and trained on."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: must be a text that is not empty")
    if len(value) > MAX_TEXT_CHARS:
        raise ValueError(f"{name}: longer than {MAX_TEXT_CHARS} characters")
    if "\x00" in value:
        raise ValueError(f"{name}: holds a NUL character")
    if not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name}: holds half of a surrogate pair, which is no text")
    return value.strip()


def _images(row: dict[str, Any]) -> list[str]:
    """The paths under `image` (one) or `images` (a list)."""
    several = row.get("images")
    if several is None:
        return [_image_path(row.get("image"), "image")]
    if "image" in row:
        raise ValueError("image: give image or images, not both")
    if not isinstance(several, list) or not 0 < len(several) <= MAX_IMAGES:
        raise ValueError(f"images: must be a list of 1 to {MAX_IMAGES} paths")
    return [_image_path(path, "images") for path in several]


def _image_path(value: Any, name: str) -> str:
    text = checked_text(value, name)
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text:
        raise ValueError(f"{name}: must be a path inside the data set's folder")
    if len(text) > 1000 or any(len(part.encode()) > 255 for part in path.parts):
        raise ValueError(f"{name}: the path is longer than a file system allows")
    return text


def _grounded(row: Any) -> GroundedWord:
    if not (isinstance(row, dict) and isinstance(row.get("word"), str) and isinstance(row.get("among"), list)):
        raise ValueError('grounded: must be a list of {"word": text, "among": [texts]}')
    return GroundedWord(row["word"], tuple(str(w) for w in row["among"]))


def records_file(data: Path) -> Path:
    """The JSONL file of a data set given as folder or file; ValueError says what is missing."""
    if data.is_file():
        return data
    if (data / "records.jsonl").is_file():
        return data / "records.jsonl"
    found = sorted(data.glob("*.jsonl")) if data.is_dir() else []
    if len(found) != 1:
        what = (
            "no such file or folder"
            if not data.exists()
            else f"{len(found)} .jsonl files there, expected records.jsonl"
        )
        raise ValueError(f"data set {data.name!r}: {what}")
    return found[0]


def read_records(data: Path) -> tuple[list[VQARecord], list[RejectedRow]]:
    """All good records of a data set and all rejected rows (bad JSON, bad field, repeated id), in file order."""
    records: list[VQARecord] = []
    rejected: list[RejectedRow] = []
    seen: set[str] = set()
    with records_file(data).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = vqa_record(json.loads(line))
                if record.id in seen:
                    raise ValueError("id: used by an earlier line")
            except RecursionError:
                rejected.append(RejectedRow(number, "nested too deeply"))
            except UnicodeDecodeError:
                rejected.append(RejectedRow(number, "not UTF-8"))
            except json.JSONDecodeError as error:
                rejected.append(RejectedRow(number, f"not JSON: {error.msg}"))
            except ValueError as error:
                rejected.append(RejectedRow(number, str(error)))
            else:
                seen.add(record.id)
                records.append(record)
    return records, rejected


def preference_record(row: dict[str, Any]) -> PreferenceRecord:
    """The inverse of to_json for a preference record."""
    return PreferenceRecord(
        record=vqa_record(row["record"]),
        levels=tuple(
            Level(
                r["text"],
                r["similarity"],
                tuple((a, b) for a, b in r.get("replaced", ())),
                r.get("source", "replacement"),
            )
            for r in row.get("levels", ())
        ),
        words=tuple(WordReward(**w) for w in row.get("words", ())),
        dropped=row.get("dropped", {}),
    )


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
