"""Readers of foreign layouts, one small file each, and the registry that tells them apart.

To add one: a module with `parts(source)` and `rows(part)` (see rows.py), a line in LAYOUTS, a fixture in tests/hscr/test_readers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hscr.readers import (
    hf_parquet,
    llava_conversations,
    openai_chat,
    pathvqa,
    slake,
    table,
    trl_preference,
    vqa_rad,
)
from hscr.readers.rows import Found, Part
from hscr.records import RejectedRow


class UnknownLayout(ValueError):
    """The source has none of the known layouts, or not the named one."""


@dataclass(frozen=True)
class Layout:
    """How one kind of source is found and read; `looks_like` is told to who gave a source that is none of them."""

    name: str
    looks_like: str
    parts: Callable[[Path], list[Part]]
    rows: Callable[[Part], Iterator[Found | RejectedRow]]


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("vqa-rad", "a .json with qid, phrase_type, image_name", vqa_rad.parts, vqa_rad.rows),
        Layout("slake", "train.json, validate.json, test.json with imgs/", slake.parts, slake.rows),
        Layout("pathvqa", "qas/<split>/<split>_qa.pkl with images/", pathvqa.parts, pathvqa.rows),
        Layout("llava", "a .json or .jsonl with conversations", llava_conversations.parts, llava_conversations.rows),
        Layout("openai", "a .jsonl with messages, images as data URLs", openai_chat.parts, openai_chat.rows),
        Layout("trl", "prompt, chosen, rejected as .jsonl or .parquet", trl_preference.parts, trl_preference.rows),
        Layout("hf-parquet", "<split>-*.parquet with image, question, answer", hf_parquet.parts, hf_parquet.rows),
        Layout("table", ".csv or .jsonl with image, question, answer", table.parts, table.rows),
    )
}


def detect(source: Path, name: str = "auto") -> tuple[Layout, list[Part]]:
    """The layout of a file or folder and its parts. UnknownLayout where it is none, or not the named one."""
    if not source.exists():
        raise ValueError(f"{source.name}: no such file or folder")
    if name != "auto" and name not in LAYOUTS:
        raise ValueError(f"--format: must be auto or one of {', '.join(LAYOUTS)}")
    for layout in LAYOUTS.values() if name == "auto" else (LAYOUTS[name],):
        if found := layout.parts(source):
            return layout, found
    wanted = LAYOUTS.values() if name == "auto" else (LAYOUTS[name],)
    known = "; ".join(f"{layout.name}: {layout.looks_like}" for layout in wanted)
    raise UnknownLayout(f"{source.name or 'source'}: its layout is not recognised. Known here: {known}")
