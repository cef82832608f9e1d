"""Preference records for other trainers: TRL, ms-swift and LLaMA-Factory, a row a pair (y_w, level), and our own JSONL, a row a record.

Images are paths as the records have them, relative to the data set's folder: run the trainer there, or make them absolute.
Sources: TRL's vision preference columns (conversational), ms-swift's RLHF format (`messages`, `rejected_response`, `images`), and
LLaMA-Factory's ShareGPT preferences (`conversations`, `chosen`, `rejected`, `images`; dataset_info: formatting sharegpt, ranking true).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hscr.artifacts import appearing
from hscr.records import PreferenceRecord, to_json

_IMAGE = "<image>"  # both trainers want one mark an image in the text


def trl_rows(preferences: Iterable[PreferenceRecord]) -> Iterator[dict[str, Any]]:
    """TRL's conversational columns `images, prompt, chosen, rejected`."""
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


def ms_swift_rows(preferences: Iterable[PreferenceRecord]) -> Iterator[dict[str, Any]]:
    """ms-swift's `messages` (with the right answer last), `rejected_response`, `images`."""
    for p in preferences:
        for level in p.levels:
            yield {
                "messages": [
                    {"role": "user", "content": _IMAGE * len(p.record.images) + p.record.question},
                    {"role": "assistant", "content": p.record.answer},
                ],
                "rejected_response": level.text,
                "images": list(p.record.images),
            }


def llama_factory_rows(preferences: Iterable[PreferenceRecord]) -> Iterator[dict[str, Any]]:
    """LLaMA-Factory's `conversations` (the question), `chosen`, `rejected`, `images`."""
    for p in preferences:
        for level in p.levels:
            yield {
                "conversations": [{"from": "human", "value": _IMAGE * len(p.record.images) + p.record.question}],
                "chosen": {"from": "gpt", "value": p.record.answer},
                "rejected": {"from": "gpt", "value": level.text},
                "images": list(p.record.images),
            }


def hscr_rows(preferences: Iterable[PreferenceRecord]) -> Iterator[dict[str, Any]]:
    """Whole records: all levels, rewards, what was dropped. Beside its images such a file is a data set (hscr/data_set.py)."""
    return map(to_json, preferences)


WRITERS: dict[str, Callable[[Iterable[PreferenceRecord]], Iterator[dict[str, Any]]]] = {
    "trl": trl_rows,
    "hscr": hscr_rows,
    "ms-swift": ms_swift_rows,
    "llama-factory": llama_factory_rows,
}
FORMATS = tuple(WRITERS)


def export_lines(preferences: Iterable[PreferenceRecord], form: str) -> Iterator[str]:
    """JSON lines in `form`, one by one. ValueError for an unknown form, at once."""
    if form not in WRITERS:
        raise ValueError(f"--format: must be one of {', '.join(FORMATS)}")
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in WRITERS[form](preferences))


def write_export(preferences: Iterable[PreferenceRecord], form: str, path: Path) -> int:
    """Write JSONL in `form`, whole or not at all, even over the file that the records are read from; the number of rows.

    ValueError for an unknown form.
    """
    lines, rows = export_lines(preferences, form), 0
    with appearing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            rows += 1
    return rows
