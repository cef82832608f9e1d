"""OpenAI's fine-tuning files: a line is {messages: [...]} with images as data URLs, or a preference {input, preferred_output,
non_preferred_output}.

Every assistant message becomes a record: the user messages before it are its question, the images of the conversation so far its images.
As in LLaVA's conversations a later question is asked without the turns before it (`meta.turn`). System messages are left out, and so are
answers of `weight` 0, which are listed. A preference's answer that was not preferred becomes a level, as in TRL's pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hscr.readers.rows import (
    INLINE_ROW_BYTES,
    Found,
    Part,
    first_object,
    inline_image,
    json_items,
    label_files,
    make,
    row_id,
    split_of,
    text,
)
from hscr.record_fields import MAX_IMAGES
from hscr.records import RejectedRow


@dataclass(frozen=True)
class _Turn:
    """A question with its images, and the answer to it (None: the conversation ends with the question)."""

    question: str
    images: tuple[bytes, ...]
    answer: str | None
    weight: Any = 1


def parts(source: Path) -> list[Part]:
    files = label_files(source, ".jsonl", ".json")
    return [Part(f, split_of(f.name), f.parent) for f in files if _is_chat(first_object(f, INLINE_ROW_BYTES))]


def _is_chat(row: dict[str, Any]) -> bool:
    return isinstance(row.get("messages"), list) or (isinstance(row.get("input"), dict) and "preferred_output" in row)


def rows(part: Part) -> Iterator[Found | RejectedRow]:
    for line, row in json_items(part.file):
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError("must be an object with messages")
            if "input" in row:
                yield _preference(line, row, part)
                continue
            turns = _turns(row.get("messages"), "messages")
            if turns[-1].answer is None:
                raise ValueError("messages: the last one must be the assistant's")
        except ValueError as error:
            yield RejectedRow(line, str(error))
            continue
        for number, turn in enumerate(turns, 1):
            try:
                yield _found(line, row, number, turn, part)
            except ValueError as error:
                yield RejectedRow(line, str(error) if len(turns) == 1 else f"turn {number}: {error}")


def _found(line: int, row: dict[str, Any], number: int, turn: _Turn, part: Part, rejected: str | None = None) -> Found:
    if turn.weight == 0:
        raise ValueError("weight: is 0, so the answer is not to be learnt from")
    if not 0 < len(turn.images) <= MAX_IMAGES:
        raise ValueError(f"messages: must show 1 to {MAX_IMAGES} images, as image_url parts of the user's messages")
    given = text(row.get("id"))
    identity = given if isinstance(given, str) and given else row_id(part, line)
    fields = {
        "id": identity if number == 1 else f"{identity}-{number}",
        "image": "images/inline",
        "question": turn.question,
        "answer": turn.answer,
        "meta": {"split": part.split, "turn": number},
    }
    return make(line, fields, turn.images[0], rejected, turn.images[1:])


def _preference(line: int, row: dict[str, Any], part: Part) -> Found:
    given = row["input"].get("messages") if isinstance(row["input"], dict) else None
    turns = _turns(given, "input.messages")
    if turns[-1].answer is not None:
        raise ValueError("input.messages: the last one must be the user's")
    chosen, rejected = (_said(row.get(name), name) for name in ("preferred_output", "non_preferred_output"))
    asked = _Turn(turns[-1].question, turns[-1].images, chosen)
    return _found(line, row, len(turns), asked, part, rejected)


def _said(value: Any, name: str) -> str:
    """The one assistant message of a preference's output."""
    if not (isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)):
        raise ValueError(f"{name}: must be a list of one message of the assistant")
    return _content(value[0], name)[0]


def _turns(messages: Any, name: str) -> list[_Turn]:
    """The questions of a conversation with their answers. Raises ValueError."""
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise ValueError(f"{name}: must be a list of messages")
    turns: list[_Turn] = []
    images: list[bytes] = []
    asked: list[str] = []
    for message in messages:
        role = message.get("role")
        if role in ("system", "developer"):
            continue
        words, shown = _content(message, name)
        if role == "user":
            images += shown
            asked += [words] if words else []
        elif role == "assistant":
            if not asked:
                raise ValueError(f"{name}: an answer of the assistant must follow words of the user")
            turns.append(_Turn("\n".join(asked), tuple(images), words, message.get("weight", 1)))
            asked = []
        else:
            raise ValueError(f"{name}: only roles system, developer, user and assistant are read")
    if asked:
        turns.append(_Turn("\n".join(asked), tuple(images), None))
    if not turns:
        raise ValueError(f"{name}: nobody asks anything in words")
    return turns


def _content(message: dict[str, Any], name: str) -> tuple[str, list[bytes]]:
    """The words and the images of a message: a text, or a list of text and image_url parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content.strip(), []
    if not (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        raise ValueError(f"{name}: content must be a text or a list of parts")
    words, images = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            words.append(part["text"].strip())
        elif part.get("type") == "image_url":
            holder = part.get("image_url")
            url = holder.get("url") if isinstance(holder, dict) else holder
            images.append(inline_image(url if isinstance(url, str) else "", "image_url"))
        else:
            raise ValueError(f"{name}: parts must be of type text or image_url")
    return "\n".join(w for w in words if w), images
