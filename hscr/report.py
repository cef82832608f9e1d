"""report.html and report.json of a run: configuration, what was generated, how training went, and whether it helped.

Self-contained: pictures are embedded, nothing is fetched, so it opens offline. All numbers come from the run directory's files. Its size is
bounded whatever the run's: so many examples, words and characters, and curves of at most 400 points.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from hscr import figures
from hscr.artifacts import atomic_write, verify_manifest, write_json
from hscr.predictions import Prediction, read_predictions
from hscr.records import PreferenceRecord, VQARecord, read_preferences

OpenImage = Callable[[VQARecord], Image.Image]
EXAMPLES = 8
WORDS = 120  # of an example's answer
CHARACTERS = 500  # of a question or answer
_templates = Environment(loader=PackageLoader("hscr", "templates"), autoescape=select_autoescape())


def shortened(text: str, n: int = CHARACTERS) -> str:
    """The text, or its beginning with an ellipsis."""
    return text if len(text) <= n else text[: n - 1] + "…"


_templates.filters["shortened"] = shortened


def image_uri(image: Image.Image, side: int = 160) -> str:
    """A small PNG as a data address."""
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def displaced(chosen: Sequence[float]) -> bool:
    """Whether the right answers became less likely (likelihood displacement): the last four rewards/chosen are below −0.05 in the mean."""
    return len(chosen) >= 4 and sum(chosen[-4:]) / 4 < -0.05


def reward_colors(preference: PreferenceRecord) -> list[dict[str, Any]]:
    """The right answer's words with a background whose strength is the reward (nats), chosen words marked."""
    top = max([abs(w.reward) for w in preference.words] or [1.0]) or 1.0
    return [
        {
            "text": shortened(w.text, 60),
            "reward": w.reward,
            "coupled": w.coupled,
            "color": f"rgba({'34,139,84' if w.reward >= 0 else '190,60,60'},{0.75 * abs(w.reward) / top:.2f})",
        }
        for w in preference.words[:WORDS]
    ]


def distributions(preferences: Sequence[PreferenceRecord]) -> dict[str, dict[str, Any]]:
    """Histograms of the levels' similarity and the words' reward (nats): `edges` and `counts` by group.

    The outermost half per cent of the rewards counts in the first and last bin, or one outlier would leave everything in a single bin.
    """
    by_level: dict[str, list[float]] = {}
    words: dict[str, list[float]] = {"replaced words": [], "other words": []}
    for p in preferences:
        for number, level in enumerate(p.levels, 1):
            by_level.setdefault(f"level {number}" if number < 4 else "later levels", []).append(level.similarity)
        for word in p.words:
            words["replaced words" if word.coupled else "other words"].append(word.reward)
    out = {}
    for name, groups, share in (("similarity", by_level, 0.0), ("reward", words, 0.5)):
        groups = {k: [x for x in v if np.isfinite(x)] for k, v in groups.items()}
        pooled = [x for v in groups.values() for x in v]
        if not pooled:
            continue
        low, high = np.percentile(pooled, [share, 100 - share])
        edges = np.linspace(low, high, 25) if high > low else np.linspace(low - 0.5, low + 0.5, 25)
        counts = {k: np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0].tolist() for k, v in groups.items() if v}
        out[name] = {"edges": edges.tolist(), "counts": counts}
    return out


def write_report(
    run: Path,
    records: Sequence[VQARecord],
    open_image: OpenImage,
    evaluation_records: Sequence[VQARecord] = (),
    open_evaluation_image: OpenImage | None = None,
) -> None:
    """Write RUN/report.html and RUN/report.json from what the stages left there."""
    config = json.loads((run / "config.json").read_text())
    reviewed = run / "reviewed.jsonl"
    preferences = list(read_preferences(reviewed if reviewed.is_file() else run / "preferences.jsonl"))
    steps = _jsonl(run / "steps.jsonl")
    evaluation = _json(run / "evaluation.json")
    lineage = config.pop("lineage")
    if (run / "adapter").is_dir():
        lineage["adapter"] = verify_manifest(run / "adapter")
    examples = _examples(preferences, {r.id: r for r in records})
    answers = _answers(run, evaluation_records) if open_evaluation_image else []
    summary = {
        "lineage": lineage,
        "config": config,
        "data": {"repeats": _json(run / "repeats.json")},
        "preferences": _preferences(preferences),
        "distributions": distributions(preferences),
        "training": {**_training(steps), "attention": _json(run / "attention.json")},
        "costs": costs(run),
        "evaluation": evaluation,
        "examples": [{k: v for k, v in e.items() if k != "record"} for e in examples],
        "answers": [{k: v for k, v in a.items() if k != "record"} for a in answers],
    }
    write_json(run / "report.json", summary)
    summary["examples"] = [{**e, "image": image_uri(open_image(e["record"]))} for e in examples]
    if open_evaluation_image:
        summary["answers"] = [{**a, "image": image_uri(open_evaluation_image(a["record"]))} for a in answers]
    html = render("report.html", **summary, figures=_figures(summary, steps))
    atomic_write(run / "report.html", html.encode())


def write_evaluation_report(run: Path, records: Sequence[VQARecord], open_image: OpenImage) -> None:
    """Write RUN/report.html and RUN/report.json of an evaluation without a training: the same tables, figures and answers."""
    config = json.loads((run / "config.json").read_text())
    answers = _answers(run, records)
    summary = {
        "lineage": config.pop("lineage"),
        "config": {name: config[name] for name in ("evaluation", "seed")},
        "evaluation": json.loads((run / "evaluation.json").read_text()),
        "answers": [{k: v for k, v in a.items() if k != "record"} for a in answers],
    }
    write_json(run / "report.json", summary)
    shown = [{**a, "image": image_uri(open_image(a["record"]))} for a in answers]
    drawn = _figures({**summary, "distributions": {}}, ())
    html = render("evaluation.html", **{**summary, "answers": shown}, figures=drawn)
    atomic_write(run / "report.html", html.encode())


def costs(run: Path) -> list[dict[str, Any]]:
    """What each stage took beside what was planned, for as many units as were timed: a killed attempt is in neither."""
    took = _json(run / "costs.json") or {}
    planned = (_json(run / "plan.json") or {"stages": []})["stages"]
    by_stage = {p["stage"]: p for p in planned if p["units"]}
    rows = []
    for stage, cost in took.items():
        row, plan = {"stage": stage, **cost}, by_stage.get(stage)
        if plan is not None:
            # The optimisation's units are steps, its plan's are records.
            share = 1.0 if stage == "optimizing" else cost["units"] / plan["units"]
            row |= {"planned_seconds": plan["seconds"] * share, "planned_bytes": plan["bytes"]}
        rows.append(row)
    return rows


def _figures(summary: dict[str, Any], steps: Sequence[dict[str, float]]) -> dict[str, list[str]]:
    names = {
        "similarity": ("Similarity of the levels to the right answer", "similarity"),
        "reward": ("Alignment reward of the answers' words", "nats"),
    }
    evaluation = summary["evaluation"] or {}
    return {
        "distributions": [
            figures.histogram(*names[k], d["edges"], d["counts"]) for k, d in summary["distributions"].items()
        ],
        "training": figures.training_curves(steps) if len(steps) > 1 else [],
        "scores": figures.score_panels(evaluation["scores"]) if evaluation.get("scores") else [],
        "coverage": figures.coverage_curves(evaluation.get("separation", {})),
    }


def _preferences(preferences: Sequence[PreferenceRecord]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for p in preferences:
        reasons.update(p.dropped)
    return {
        "records": len(preferences),
        "with_levels": sum(bool(p.levels) for p in preferences),
        "levels": dict(sorted(Counter(len(p.levels) for p in preferences).items())),
        "dropped": dict(reasons.most_common()),
    }


def _training(steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    chosen = [s["rewards/chosen"] for s in steps if "rewards/chosen" in s]
    margins = [s["rewards/margins"] for s in steps if "rewards/margins" in s]
    return {
        "steps": len(steps),
        "first": steps[0] if steps else None,
        "last": steps[-1] if steps else None,
        "displaced": displaced(chosen),
        "last_four": {"rewards/chosen": _mean(chosen[-4:]), "rewards/margins": _mean(margins[-4:])},
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _examples(preferences: Sequence[PreferenceRecord], known: dict[str, VQARecord]) -> list[dict[str, Any]]:
    """The first records with several levels, then those with one: in file order, not picked by how well they look."""
    usable = [p for p in preferences if p.levels and p.record.id in known]
    several, one = [p for p in usable if len(p.levels) > 1], [p for p in usable if len(p.levels) == 1]
    return [
        {
            "id": p.record.id,
            "record": known[p.record.id],
            "question": shortened(p.record.question),
            "words": reward_colors(p),
            "levels": [{"text": shortened(level.text), "similarity": level.similarity} for level in p.levels],
        }
        for p in (*several, *one)[:EXAMPLES]
    ]


def _answers(run: Path, records: Sequence[VQARecord]) -> list[dict[str, Any]]:
    """Questions where base and adapter differ, side by side: in file order, not picked by who is right."""
    if not (run / "predictions.jsonl").is_file():
        return []
    said: dict[str, dict[str, Prediction]] = {}
    for p in read_predictions(run / "predictions.jsonl"):
        if p.condition == "real":
            said.setdefault(p.id, {})[p.policy] = p
    differ = [
        r
        for r in records
        if {"base", "adapter"} <= (s := said.get(r.id, {})).keys() and s["base"].text != s["adapter"].text
    ]
    return [
        {
            "id": r.id,
            "record": r,
            "question": shortened(r.question),
            "reference": shortened(r.answer),
            **{
                policy: {"text": shortened(p.text), "grounding": p.grounding, "scores": p.scores}
                for policy, p in said[r.id].items()
            },
        }
        for r in differ[:EXAMPLES]
    ]


def _json(path: Path) -> Any:
    """What a file holds; None where the run left none."""
    return json.loads(path.read_text()) if path.is_file() else None


def _jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def render(template: str, **values: Any) -> str:
    """Render one of hscr/templates with autoescaping: the demo's page uses it too."""
    return _templates.get_template(template).render(**values)
