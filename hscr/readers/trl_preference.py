"""TRL's vision preference columns: images, prompt, chosen, rejected (parquet or JSONL), conversational or plain texts.

Rows of one image, prompt and chosen answer become one record; their rejected answers become its levels, in the order of the rows: put the
answer that is nearest to right first. So the set comes in with its levels given, and `hscr align` generates none (see hscr/importing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.readers.hf_parquet import embedded, parquet_parts, parquet_rows
from hscr.readers.rows import Found, Part, each, first_object, json_items, label_files, make, row_id, split_of
from hscr.records import RejectedRow

FIELDS = {"prompt", "chosen", "rejected"}


def parts(source: Path) -> list[Part]:
    texts = [f for f in label_files(source, ".json", ".jsonl") if first_object(f).keys() >= FIELDS]
    return [Part(f, split_of(f.name), f.parent) for f in texts] or parquet_parts(source, FIELDS)


def rows(part: Part) -> Iterator[Found | RejectedRow]:
    parquet = part.file.suffix.lower() == ".parquet"
    return each(enumerate(parquet_rows(part.file), 1) if parquet else json_items(part.file), part, _found)


def _found(line: int, row: dict[str, Any], part: Part) -> Found:
    images = row["images"] if row.get("images") is not None else row.get("image")
    if isinstance(images, list):
        if len(images) != 1:
            raise ValueError(f"images: this layout is read with one image a row, the row has {len(images)}")
        images = images[0]
    image, target = embedded(images, part.root)
    rejected = _words(row.get("rejected"), "rejected", "assistant")
    fields = {
        "id": row_id(part, line),
        "image": target,
        "question": _words(row.get("prompt"), "prompt", "user"),
        "answer": _words(row.get("chosen"), "chosen", "assistant"),
        "meta": {"split": part.split},
    }
    return make(line, fields, image, rejected)


def _words(value: Any, field: str, role: str) -> str:
    """The text of a plain or conversational column: one turn of `role`, its text parts joined; system turns are left out."""
    if isinstance(value, list):
        turns = [t for t in value if isinstance(t, dict) and t.get("role") != "system"]
        if len(turns) != 1 or turns[0].get("role") != role:
            raise ValueError(f"{field}: must be one turn of {role}")
        value = turns[0].get("content")
    if isinstance(value, list):
        value = " ".join(p["text"] for p in value if isinstance(p, dict) and isinstance(p.get("text"), str))
    words = value.replace("<image>", "").strip() if isinstance(value, str) else ""
    if not words:
        raise ValueError(f"{field}: must be a text that is not empty")
    return words
