"""VQA-RAD as published (osf.io/89kps): one JSON list with `VQA_RAD Image Folder/` beside it. The Hugging Face form is hf_parquet.py.

Quirks: answers may be numbers, answer types carry trailing spaces ("CLOSED "), the split is in `phrase_type` (test_freeform 300 and
test_para 151 are the test part), a question may exist twice in other words. Published train and test share images, so `hscr align --eval`
refuses the pair unless told otherwise: `hscr split` makes parts that do not. The group is the MedPix case.
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
    text,
)
from hscr.records import RejectedRow

FIELDS = {"qid", "phrase_type", "image_name"}
_PHRASES = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
_FOLDERS = ("VQA_RAD Image Folder", "images", ".")


def parts(source: Path) -> list[Part]:
    """The JSON file twice, once a split; none where the source holds no such file."""
    found = [f for f in label_files(source, ".json") if first_object(f).keys() >= FIELDS]
    return [Part(file, split, file.parent) for file in found for split in ("train", "test")]


def rows(part: Part) -> Iterator[Found | RejectedRow]:
    """The rows of the part's split; rows of no known split are told with the training part."""
    items = [(line, row, _split(row)) for line, row in json_items(part.file)]
    mine = ((line, row) for line, row, split in items if (split or "train") == part.split)
    return each(mine, part, _found)


def _split(row: Any) -> str | None:
    phrase = text(row.get("phrase_type")) if isinstance(row, dict) else None
    return _PHRASES.get(phrase) if isinstance(phrase, str) else None


def _found(line: int, row: dict[str, Any], part: Part) -> Found:
    if _split(row) is None:
        raise ValueError(f"phrase_type: must be one of {', '.join(_PHRASES)}")
    case = row.get("image_case_url")
    meta = {name: text(row[name]) for name in ("phrase_type", "image_organ", "question_type") if row.get(name)}
    image = find_image(part.root, row.get("image_name"), _FOLDERS)
    fields = {
        "id": row.get("qid"),
        "image": image_target(row["image_name"]),
        "question": row.get("question"),
        "answer": row.get("answer"),
        "answer_type": row.get("answer_type"),
        "group": case.rpartition("=")[2] if isinstance(case, str) and case else None,
        "meta": {"split": part.split, **meta},
    }
    return make(line, fields, image)
