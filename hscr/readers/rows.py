"""What every reader of a foreign layout shares: the parts of a source, one found row, and how JSON and plain records become records.

A reader is two functions: `parts(source)` finds the label files of its layout (none: another layout), `rows(part)` yields each row as Found
or RejectedRow. Nothing here decodes an image or writes a file; hscr/importing.py does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hscr import record_fields
from hscr.data_url import data_of
from hscr.records import RejectedRow, VQARecord, parsed, vqa_record

MAX_LABEL_BYTES = 512 * 2**20  # a file of labels is read whole; the largest public set has 120 MB
INLINE_ROW_BYTES = 64 * 2**20  # the first row of a file is found in so many bytes, where rows hold their images
YES_NO = ("yes", "no")
_SPLITS = {
    "train": "train",
    "valid": "valid",
    "validate": "valid",
    "validation": "valid",
    "val": "valid",
    "test": "test",
}


@dataclass(frozen=True)
class Part:
    """A file of labels, the split it holds (train, valid, test; None where it does not say), and the folder that images are sought in."""

    file: Path
    split: str | None
    root: Path


@dataclass(frozen=True)
class Found:
    """A row that is a record. `line` counts from 1: the line of a text file, the item of a JSON list or pickle, the row of a table.

    `image` is the file, or the bytes that lie in the row; `record.image` is where a file shall lie in the data set. `further` are the bytes
    of a row's other images. A preference set's row has the dispreferred answer in `rejected`.
    """

    line: int
    record: VQARecord
    image: Path | bytes
    rejected: str | None = None
    further: tuple[bytes, ...] = ()


def label_files(source: Path, *suffixes: str) -> list[Path]:
    """SOURCE itself where it is a file of one of these suffixes, else such files right in it, suffix by suffix; no folder, no pipe."""
    there = [source] if source.is_file() else sorted(p for p in source.glob("*") if p.is_file())
    return [file for suffix in suffixes for file in there if file.suffix.lower() == suffix]


def split_of(name: str) -> str | None:
    """The split that a file's name begins with or is ("validate.json" → valid, "test-00000-of-00001" → test), or None."""
    word = name.lower().replace("_", "-").split(".")[0].split("-")[0]
    return _SPLITS.get(word)


def row_id(part: Part, line: int) -> str:
    """The id of a row whose layout gives none: its file and line ("train-00000-7")."""
    return f"{part.file.stem.split('-of-')[0]}-{line}"


def read_limited(path: Path) -> bytes:
    """The file's bytes; ValueError above MAX_LABEL_BYTES."""
    if path.stat().st_size > MAX_LABEL_BYTES:
        raise ValueError(f"{path.name}: has more than {MAX_LABEL_BYTES} bytes; split it, or import parquet")
    return path.read_bytes()


def json_items(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of a JSON list's items, or of a JSONL file's lines that are not empty; a line that is no JSON has its ValueError.

    Raises ValueError where the file is neither.
    """
    data = read_limited(path)
    if path.suffix.lower() == ".jsonl":
        yield from ((n, parsed(line)) for n, line in enumerate(data.splitlines(), 1) if line.strip())
        return
    try:
        items = json.loads(data)
    except RecursionError:
        raise ValueError(f"{path.name}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: is not JSON: {error}") from None
    if not isinstance(items, list):
        raise ValueError(f"{path.name}: must hold a JSON list")
    yield from enumerate(items, 1)


def each(
    items: Iterable[tuple[int, Any]], part: Part, found: Callable[[int, dict[str, Any], Part], Found]
) -> Iterator[Found | RejectedRow]:
    """`found(line, row, part)` of every item; what it refuses, and items that are no object, become rejected rows."""
    for line, item in items:
        try:
            if isinstance(item, ValueError):
                raise item
            if not isinstance(item, dict):
                raise ValueError("must be an object with the layout's fields")
            yield found(line, item, part)
        except ValueError as error:
            yield RejectedRow(line, str(error))


def first_object(path: Path, limit: int = 2**20) -> dict[str, Any]:
    """The first object of a JSON list or JSONL file, read from its first `limit` bytes only; empty where there is none. For detection."""
    with path.open("rb") as file:
        head = file.read(limit).decode("utf-8", "replace").lstrip("\ufeff \t\r\n[")
    for start in head.split("\n")[:20] if path.suffix.lower() == ".jsonl" else [head]:
        try:
            value, _ = json.JSONDecoder().raw_decode(start)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def text(value: Any) -> Any:
    """A label's text without the spaces around it; numbers as text (2.0 stays "2.0"), anything else as it is (and rejected later)."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, (int, float)):
        return str(value)
    return value.strip() if isinstance(value, str) else value


def is_yes_no(answer: Any) -> bool:
    """Where a layout has no answer types, a closed question is one that is answered by yes or no."""
    return isinstance(answer, str) and answer.strip().rstrip(".").lower() in YES_NO


def find_image(root: Path, name: Any, folders: Sequence[str]) -> Path:
    """ROOT/<one of folders>/NAME, or the first of these paths where none exists (the import says that it is missing).

    Raises ValueError where the row names no image, or a path that leaves the folder.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("image: the row names none")
    path = PurePosixPath(name.strip())
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise ValueError("image: must be a path inside the source's folder")
    if any(len(part.encode("utf-8", "replace")) > 255 for part in path.parts) or len(name) > 1000:
        raise ValueError("image: the path is longer than a file system allows")
    places = [root / folder / path for folder in folders]
    return next((p for p in places if p.is_file()), places[0])


def inline_image(url: str, name: str = "image") -> bytes:
    """The bytes of a data URL (hscr/data_url.py). Raises ValueError naming the field."""
    try:
        return data_of(url)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def image_target(name: str) -> str:
    """Where an image of that name lies in the data set: below images/."""
    path = PurePosixPath(name.strip()).as_posix()
    return path if path.startswith("images/") else f"images/{path}"


def make(
    line: int,
    fields: dict[str, Any],
    image: Path | bytes,
    rejected: str | None = None,
    further: tuple[bytes, ...] = (),
) -> Found:
    """A found row from a record's fields as a layout has them; without `answer_type` yes/no answers are closed.

    Raises ValueError naming the field that is wrong.
    """
    row = {k: v for k, v in fields.items() if v is not None}
    row |= {name: text(fields.get(name)) for name in ("id", "question", "answer", "group") if name in fields}
    row["meta"] = {k: v for k, v in fields.get("meta", {}).items() if v is not None}
    kind = text(row.get("answer_type"))
    row["answer_type"] = kind.lower() if isinstance(kind, str) else kind
    if not kind:
        row["answer_type"] = "closed" if is_yes_no(row["answer"]) else "open"
    if row["answer_type"] == "closed" and is_yes_no(row["answer"]) and not row.get("options"):
        row["options"] = list(YES_NO)
    other = None if rejected is None else record_fields.text(rejected, "rejected")
    return Found(line, vqa_record(row), image, other, further)
