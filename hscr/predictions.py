"""What was answered in an evaluation: one typed record an answer, as stored in predictions.jsonl. Every table is computed from these."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONDITIONS = ("real", "blank", "shuffled")


@dataclass(frozen=True)
class Prediction:
    """One answer under one policy and condition. `grounding` (nats) is measured with the real image only.

    `question`, `group` and `reference` are what the tables need besides: which answers share their chance, which records belong together,
    and what a set of captions is compared with.
    """

    policy: str
    condition: str
    id: str
    text: str
    scores: dict[str, float]
    grounding: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    question: str = ""
    group: str | None = None
    reference: str = ""


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a JSONL file; ValueError names the line that is none."""
    out = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                out.append(Prediction(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path.name}: line {number} is no prediction of `hscr evaluate`: {error}") from error
    return out


def kind(prediction: Prediction) -> str:
    """open, closed or caption: the first part of its metrics' names."""
    return next(iter(prediction.scores), "open").partition("/")[0]
