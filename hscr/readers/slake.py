"""SLAKE: train.json, validate.json and test.json with images in `imgs/<img_name>`. English and Chinese rows stand mixed.

Quirks: `q_lang` says the language (the import keeps the wanted ones and lists the others); CLOSED is not only yes/no ("MRI or CT?"): such a
row stays closed and has no options, for the layout names none. The group is the image, of which SLAKE has one a study.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.readers.rows import (
    Found,
    Part,
    each,
    find_image,
    first_object,
    image_target,
    json_items,
    label_files,
    make,
    split_of,
    text,
)
from hscr.records import RejectedRow

FIELDS = {"img_name", "q_lang", "question"}


def parts(source: Path) -> list[Part]:
    """One part a split file; none where the source holds no such file."""
    found = [f for f in label_files(source, ".json") if first_object(f).keys() >= FIELDS]
    return [Part(file, split_of(file.name), file.parent) for file in found]


def rows(part: Part) -> Iterator[Found | RejectedRow]:
    return each(json_items(part.file), part, _found)


def _found(line: int, row: dict[str, Any], part: Part) -> Found:
    image = find_image(part.root, row.get("img_name"), ("imgs", "images", "."))
    group, number = row.get("img_id"), text(row.get("qid"))
    names = ("location", "modality", "base_type", "content_type", "triple")
    meta = {name: row[name] for name in names if row.get(name)}
    fields = {
        "id": f"{part.split}-{number}" if part.split and number else number,
        "image": image_target(row["img_name"]),
        "question": row.get("question"),
        "answer": row.get("answer"),
        "answer_type": row.get("answer_type"),
        "group": str(group) if group is not None else None,
        "meta": {"split": part.split, "language": text(row.get("q_lang")), **meta},
    }
    return make(line, fields, image)
