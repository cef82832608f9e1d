"""Preference records for other trainers: TRL's vision preference columns and our own JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hscr.records import PreferenceRecord, to_json

FORMATS = ("trl", "hscr")


def trl_rows(preferences: Iterable[PreferenceRecord]) -> Iterator[dict[str, Any]]:
    """One row a pair (y_w, level) in TRL's conversational columns `images, prompt, chosen, rejected`; images are paths."""
    for p in preferences:
        for level in p.levels:
            yield {
                "images": list(p.record.images),
                "prompt": [
                    {
                        "role": "user",
                        "content": [
                            *[{"type": "image"}] * len(p.record.images),
                            {"type": "text", "text": p.record.question},
                        ],
                    }
                ],
                "chosen": _assistant(p.record.answer),
                "rejected": _assistant(level.text),
            }


def _assistant(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def write_export(preferences: Iterable[PreferenceRecord], form: str, path: Path) -> int:
    """Write JSONL in `form` (trl or hscr); the number of rows. ValueError for an unknown form."""
    if form not in FORMATS:
        raise ValueError(f"format: must be one of {', '.join(FORMATS)}")
    rows = trl_rows(preferences) if form == "trl" else map(to_json, preferences)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
