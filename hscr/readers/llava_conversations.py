"""LLaVA(-Med) conversations: a JSON list or JSONL of {id, image, conversations: [{from: human|gpt, value}], answer_type?}.

Every human/gpt pair becomes a record (`id`, or `id-2`, `id-3` … for later turns); `<image>` is taken out of the text. A later question is
asked without the turns before it, which some questions need: `meta.turn` says which these are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.readers.rows import (
    Found,
    Part,
    find_image,
    first_object,
    image_target,
    json_items,
    label_files,
    make,
    row_id,
    split_of,
    text,
)
from hscr.records import RejectedRow

_IMAGE = "<image>"


def parts(source: Path) -> list[Part]:
    found = [f for f in label_files(source, ".json", ".jsonl") if "conversations" in first_object(f)]
    return [Part(file, split_of(file.name), file.parent) for file in found]


def rows(part: Part) -> Iterator[Found | RejectedRow]:
    for line, row in json_items(part.file):
        try:
            turns = _turns(row)
        except ValueError as error:
            yield RejectedRow(line, str(error))
            continue
        for number, (question, answer) in enumerate(turns, 1):
            try:
                yield _found(line, row, number, question, answer, part)
            except ValueError as error:
                yield RejectedRow(line, str(error) if len(turns) == 1 else f"turn {number}: {error}")


def _turns(row: Any) -> list[tuple[Any, Any]]:
    """The (human, gpt) pairs of a row; ValueError where it has none or the speakers do not take turns."""
    if isinstance(row, ValueError):
        raise row
    conversation = row.get("conversations") if isinstance(row, dict) else None
    if not (isinstance(conversation, list) and conversation and all(isinstance(t, dict) for t in conversation)):
        raise ValueError("conversations: must be a list of {from, value}")
    speakers = [t.get("from") for t in conversation]
    if len(speakers) % 2 or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError("conversations: human and gpt must take turns, human first and gpt last")
    values = [t.get("value") for t in conversation]
    return list(zip(values[::2], values[1::2], strict=True))


def _found(line: int, row: dict[str, Any], number: int, question: Any, answer: Any, part: Part) -> Found:
    name = row.get("image")
    if isinstance(name, list):
        if len(name) != 1:
            raise ValueError("image: this layout is read with one image a conversation")
        name = name[0]
    name = str(name or "")
    image = find_image(part.root, name, (".", "images"))
    identity = text(row.get("id"))
    if not isinstance(identity, str) or not identity:
        identity = row_id(part, line)
    fields = {
        "id": identity if number == 1 else f"{identity}-{number}",
        "image": image_target(name),
        "question": question.replace(_IMAGE, "").strip() if isinstance(question, str) else question,
        "answer": answer,
        "answer_type": row.get("answer_type"),
        "meta": {"split": part.split, "turn": number},
    }
    return make(line, fields, image)
