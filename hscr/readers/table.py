"""A folder with CSV or JSONL and images: columns image, question, answer and, if there, id, answer_type, options, group, language.

`image` is a path or a data URL. Options of a CSV are separated by `|`. Our own records.jsonl is such a table too. Without an id a row is
named by its file and line, without an answer type yes/no is closed.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.data_url import is_data_url
from hscr.readers.rows import (
    INLINE_ROW_BYTES,
    Found,
    Part,
    each,
    find_image,
    first_object,
    image_target,
    inline_image,
    json_items,
    label_files,
    make,
    row_id,
    split_of,
    text,
)
from hscr.records import RejectedRow

COLUMNS = {"image", "question", "answer"}
_OPTIONAL = ("answer_type", "options", "group", "grounded", "meta")


def parts(source: Path) -> list[Part]:
    """Every CSV and JSONL whose header (first row) has the columns."""
    return [
        Part(f, split_of(f.name), f.parent) for f in label_files(source, ".csv", ".jsonl") if _columns(f) >= COLUMNS
    ]


def _columns(path: Path) -> set[str]:
    if path.suffix.lower() == ".jsonl":
        return set(first_object(path, INLINE_ROW_BYTES))
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return {name.strip() for name in next(csv.reader([file.readline(100_000)]), [])}


def rows(part: Part) -> Iterator[Found | RejectedRow]:
    return each(_csv(part.file) if part.file.suffix.lower() == ".csv" else json_items(part.file), part, _found)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a CSV, with the line that each begins on (a quoted field may span lines); bad rows are their ValueError."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names):
            raise ValueError(f"{path.name}: its header names a column twice")
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, ValueError(f"not CSV: {error}")
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                yield line, ValueError(f"has {len(cells)} fields, the header has {len(names)}")
            elif any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
                yield line, ValueError("not UTF-8")
            else:
                row: dict[str, Any] = {k: v for k, v in zip(names, cells, strict=True) if v.strip()}
                if "options" in row:
                    row["options"] = [o.strip() for o in row["options"].split("|") if o.strip()]
                yield line, row


def _found(line: int, row: dict[str, Any], part: Part) -> Found:
    named: Any = row.get("image")
    own_name = row_id(part, line)
    inline = is_data_url(named)
    image = inline_image(named) if inline else find_image(part.root, named, (".", "images"))
    number, meta = text(row.get("id")), row.get("meta") or {}
    if not isinstance(meta, dict):
        raise ValueError("meta: must be an object")
    fields = {name: row.get(name) for name in _OPTIONAL} | {
        "id": own_name if number in (None, "") else number,
        "image": image_target(own_name if inline else named),
        "question": row.get("question"),
        "answer": row.get("answer"),
        "answer_type": row.get("answer_type"),
        "group": row.get("group"),
        "meta": {"split": part.split, "language": text(row.get("language")), **meta},
    }
    return make(line, fields, image)
