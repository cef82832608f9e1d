"""What can be guessed without reading the image: a no-image baseline and a position-only baseline.

They bound what a number on the demo data means. Neither sees a pixel: the first knows the question's text, the second
the kind of question and where the marker (or lesion) stands in the picture, which is more than a careless model knows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from hscr.demo.volumes import STRUCTURES
from hscr.records import VQARecord, read_records

Figures = dict[str, dict[str, float]]  # kind -> {"accuracy", "chance", "n"}
_LESION_WORDS = {"side": "left", "region": "insular"}
_MARKER_WORDS = {"side": "left", "structure": STRUCTURES[5]}


def baselines(test: Path, train: Path) -> dict[str, Figures]:
    """Accuracy of both baselines, fitted on `train` and scored on `test`, by kind of question and in all."""
    fitted, held_out = read_records(train)[0], read_records(test)[0]
    return {"no_image": _no_image(fitted, held_out), "position_only": _position_only(fitted, held_out)}


def _no_image(train: Sequence[VQARecord], test: Sequence[VQARecord]) -> Figures:
    """The commonest word of each category for this very question, else for its kind, else overall."""
    counts: dict[object, Counter[str]] = defaultdict(Counter)
    for record in train:
        for item in record.grounded:
            among = tuple(sorted(item.among))
            for key in ((record.question, among), (record.meta["kind"], among), among):
                counts[key][item.word] += 1
    hits: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in test:
        for item in record.grounded:
            among = tuple(sorted(item.among))
            keys: tuple[object, ...] = ((record.question, among), (record.meta["kind"], among), among)
            known = next((counts[key] for key in keys if counts[key]), Counter(among))
            hit = float(known.most_common(1)[0][0] == item.word)
            for name in (str(record.meta["kind"]), f"all {record.answer_type}"):
                hits[name].append((hit, 1 / len(among)))
    return _figures(hits)


def _position_only(train: Sequence[VQARecord], test: Sequence[VQARecord]) -> Figures:
    """Nearest neighbours on the pixel position alone: 25 neighbours vote on each word of marker and lesion answers."""
    out: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for thing, words in (("marker", _MARKER_WORDS), ("lesion", _LESION_WORDS)):
        for name, sign in words.items():
            x, y, _ = _positions(train, thing, sign)
            test_x, test_y, sizes = _positions(test, thing, sign)
            if len(x) and len(test_x):
                model = KNeighborsClassifier(min(25, len(x))).fit(x, y)
                hit = model.predict(test_x) == np.array(test_y)
                out[f"{thing} {name}"] = [(float(h), 1 / s) for h, s in zip(hit, sizes, strict=True)]
    return _figures(out)


def _positions(records: Sequence[VQARecord], thing: str, sign: str) -> tuple[list[list[float]], list[str], list[int]]:
    """Positions and words of the category that holds the word `sign`, for open questions about `thing`."""
    x: list[list[float]] = []
    y: list[str] = []
    sizes: list[int] = []
    for record in records:
        about = "marker" if str(record.meta["kind"]).startswith("marker") else "lesion"
        for item in record.grounded:
            if about == thing and thing in record.meta and sign in item.among:
                x.append([float(v) for v in record.meta[thing]])
                y.append(item.word)
                sizes.append(len(item.among))
    return x, y, sizes


def _figures(hits: dict[str, list[tuple[float, float]]]) -> Figures:
    return {
        name: {
            "accuracy": round(float(np.mean([h for h, _ in rows])), 4),
            "chance": round(float(np.mean([c for _, c in rows])), 4),
            "n": len(rows),
        }
        for name, rows in sorted(hits.items())
    }
