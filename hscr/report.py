"""report.html and report.json of a run: configuration, what was generated, how training went, and whether it helped.

Self-contained: pictures are embedded, nothing is fetched, so it opens offline. All numbers come from the run directory's files.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from hscr.artifacts import atomic_write, write_json
from hscr.evaluate import Prediction
from hscr.records import PreferenceRecord, VQARecord, read_preferences

OpenImage = Callable[[VQARecord], Image.Image]
_templates = Environment(loader=PackageLoader("hscr", "templates"), autoescape=select_autoescape())


def image_uri(image: Image.Image, side: int = 160) -> str:
    """A small PNG as a data address."""
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def curves(steps: Sequence[dict[str, float]], panels: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Line plots of metrics over steps, one panel a title, as an SVG text."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 2.8), layout="constrained")
    for at, (title, names) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), at)
        for name in names:
            points = [(s["step"], s[name]) for s in steps if name in s]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.split("/")[-1], linewidth=1.4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if len(names) > 1:
            axes.legend(fontsize=8, frameon=False)
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out)
    text = out.getvalue()
    return text[text.index("<svg") :]


def reward_colors(preference: PreferenceRecord) -> list[dict[str, Any]]:
    """The right answer's words with a background whose strength is the reward (nats), chosen words marked."""
    top = max([abs(w.reward) for w in preference.words] or [1.0]) or 1.0
    return [
        {
            "text": w.text,
            "reward": w.reward,
            "coupled": w.coupled,
            "color": f"rgba({'34,139,84' if w.reward >= 0 else '190,60,60'},{0.75 * abs(w.reward) / top:.2f})",
        }
        for w in preference.words
    ]


def write_report(
    run: Path,
    records: Sequence[VQARecord],
    open_image: OpenImage,
    evaluation_records: Sequence[VQARecord] = (),
    open_evaluation_image: OpenImage | None = None,
) -> None:
    """Write RUN/report.html and RUN/report.json from what the stages left there."""
    config = json.loads((run / "config.json").read_text())
    preferences = list(read_preferences(run / "preferences.jsonl"))
    steps = _jsonl(run / "steps.jsonl")
    evaluation = json.loads((run / "evaluation.json").read_text()) if (run / "evaluation.json").is_file() else None
    reasons: Counter[str] = Counter()
    for p in preferences:
        reasons.update(p.dropped)
    summary = {
        "lineage": config.pop("lineage"),
        "config": config,
        "preferences": {
            "records": len(preferences),
            "with_levels": sum(bool(p.levels) for p in preferences),
            "levels": dict(sorted(Counter(len(p.levels) for p in preferences).items())),
            "dropped": dict(reasons.most_common()),
        },
        "training": {"steps": len(steps), "first": steps[0] if steps else None, "last": steps[-1] if steps else None},
        "evaluation": evaluation,
    }
    write_json(run / "report.json", summary)
    known = {r.id: r for r in records}
    examples = [
        {"preference": p, "image": image_uri(open_image(known[p.record.id])), "words": reward_colors(p)}
        for p in [p for p in preferences if len(p.levels) > 1][:8]
        if p.record.id in known
    ]
    html = _templates.get_template("report.html").render(
        **summary,
        curves=curves(
            steps,
            [
                ("loss", ["loss"]),
                ("rewards", ["rewards/chosen", "rewards/rejected"]),
                ("log π(chosen)", ["logps/chosen"]),
                ("reward accuracy", ["rewards/accuracies"]),
            ],
        )
        if len(steps) > 1
        else "",
        examples=examples,
        answers=_answers(run, evaluation_records, open_evaluation_image) if open_evaluation_image else [],
    )
    atomic_write(run / "report.html", html.encode())


def _answers(run: Path, records: Sequence[VQARecord], open_image: OpenImage, n: int = 8) -> list[dict[str, Any]]:
    """Questions where base and adapter differ, side by side: in file order, not picked by who is right."""
    if not (run / "predictions.jsonl").is_file():
        return []
    said: dict[str, dict[str, Prediction]] = {}
    for row in _jsonl(run / "predictions.jsonl"):
        if row["condition"] == "real":
            said.setdefault(row["id"], {})[row["policy"]] = Prediction(**row)
    differ = [r for r in records if len(s := said.get(r.id, {})) == 2 and s["base"].text != s["adapter"].text]
    return [
        {"record": r, "image": image_uri(open_image(r)), "base": said[r.id]["base"], "adapter": said[r.id]["adapter"]}
        for r in differ[:n]
    ]


def _jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def render(template: str, **values: Any) -> str:
    """Render one of hscr/templates with autoescaping: the demo's page uses it too."""
    return _templates.get_template(template).render(**values)
