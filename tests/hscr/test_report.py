"""The report: bounded whatever the run's size, offline, escaped, and plain about displacement."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hscr import figures
from hscr.config import AlignConfig, EvaluationConfig
from hscr.predictions import Prediction
from hscr.records import Level, PreferenceRecord, VQARecord, WordReward, write_jsonl
from hscr.report import displaced, distributions, write_report
from hscr.reproduction.plan import FULL
from hscr.reproduction.table import figures as reproduction_figures
from hscr.tables import summarize

LONG = "<script>alert(1)</script> " + "word " * 3500


def preference(i: int, text: str = "a <b>left</b> one") -> PreferenceRecord:
    record = VQARecord(f"r{i}", f"{i}.png", f"Where & why {text}?", text)
    words = tuple(WordReward(w, 0.1 * n - 0.2, n == 2) for n, w in enumerate(text.split()))
    return PreferenceRecord(record, (Level(text + " x", 0.8), Level(text + " y", 0.5)), words, {"gap_too_small": 1})


def made(run: Path, preferences: list[PreferenceRecord], chosen: list[float], *, evaluated: bool = True) -> str:
    """A run directory with these preferences and this course of rewards/chosen; its report's page."""
    run.mkdir()
    lineage = {"model": "sha256:m", "model_name": "tiny", "data": "sha256:d", "hscr": "0"}
    (run / "config.json").write_text(json.dumps({**AlignConfig().to_dict(), "lineage": lineage}))
    write_jsonl(run / "preferences.jsonl", preferences)
    steps = [{"step": n, "loss": 1.0, "rewards/chosen": c, "rewards/margins": 0.1 * n} for n, c in enumerate(chosen, 1)]
    (run / "steps.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    records = [p.record for p in preferences]
    if evaluated:
        said = [
            Prediction(policy, condition, r.id, f"{policy} {r.answer}", {"open/strict": float(n % 2)}, float(n))
            for policy in ("base", "adapter")
            for condition in ("real", "blank", "shuffled")
            for n, r in enumerate(records)
        ]
        write_jsonl(run / "predictions.jsonl", said)
        (run / "evaluation.json").write_text(json.dumps(summarize(said, EvaluationConfig(n_bootstrap=100))))
    noise = Image.effect_noise((900, 900), 90).convert("RGB")
    write_report(run, records, lambda r: noise, records if evaluated else (), (lambda r: noise) if evaluated else None)
    return (run / "report.html").read_text()


def test_the_page_holds_every_part_and_fetches_nothing(tmp_path: Path) -> None:
    page = made(tmp_path / "run", [preference(i) for i in range(60)], [0.1] * 8)
    for part in ("Did it help?", "Does the grounding score know?", "Accuracy when the lowest scores are withheld"):
        assert part in page, part
    for part in ("Answers that changed", "Preferences", "Examples", "Training", "Lineage and configuration"):
        assert part in page, part
    assert (
        page.count("<svg") == 1 + 3 - 1 + 2 + 3
    )  # a metric; all and open questions; two histograms; loss, reward, margin
    assert "One blank image serves all questions" in page
    for fetch in ('src="http', 'href="http', "url(http", "@import", "<script", "<link"):
        assert fetch not in page, fetch


@pytest.mark.thorough
def test_the_size_is_bounded_by_no_property_of_the_run(tmp_path: Path) -> None:
    """Texts of 17,500 characters, pictures of 900 × 900 noise, 3,000 steps."""
    page = made(tmp_path / "run", [preference(i, LONG) for i in range(40)], [0.1 + 0.0001 * i for i in range(3000)])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert len(page) < 2_500_000
    assert (tmp_path / "run" / "report.json").stat().st_size < 500_000


def test_a_run_without_evaluation_has_a_report_too(tmp_path: Path) -> None:
    page = made(tmp_path / "run", [preference(0)], [], evaluated=False)
    assert "Did it help?" not in page
    assert "Examples" in page


@pytest.mark.parametrize(
    ("chosen", "warned"),
    [([0.0, 0.2, -0.1, -0.1, -0.1, -0.1], True), ([-1.0, 0.1, 0.1, 0.1, 0.1], False), ([-1.0] * 3, False)],
)
def test_displacement_is_told_in_the_report(tmp_path: Path, chosen: list[float], warned: bool) -> None:
    assert displaced(chosen) is warned
    page = made(tmp_path / "run", [preference(0)], chosen, evaluated=False)
    assert ("Likelihood displacement" in page) is warned
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["displaced"] is warned


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    """A report is stored under the digest of its content."""
    preferences = [preference(i) for i in range(12)]
    pages = []
    for name in ("a", "b"):
        page = made(tmp_path / name, preferences, [0.1] * 8)
        pages.append(page[: page.index("Answers that changed")])  # the pictures of this test are noise
    assert pages[0] == pages[1]


def test_distributions_count_every_level_and_word() -> None:
    found = distributions([preference(i) for i in range(5)])
    assert {k: sum(v) for k, v in found["similarity"]["counts"].items()} == {"level 1": 5, "level 2": 5}
    assert {k: sum(v) for k, v in found["reward"]["counts"].items()} == {"replaced words": 5, "other words": 10}
    assert distributions([]) == {}


def test_long_curves_are_averaged_to_a_bounded_number_of_points() -> None:
    """4,000 steps of value = step: 400 runs of ten, the first with mean (1 + … + 10)/10 = 5.5."""
    x, y = figures.thinned([{"step": n, "loss": float(n)} for n in range(1, 4001)], "loss")
    assert len(x) == len(y) == 400
    assert (x[0], y[0]) == (5.5, 5.5)
    assert figures.thinned([{"step": 1}], "loss") == ([], [])


def test_figures_are_svg_that_takes_the_pages_colour() -> None:
    for svg in figures.training_curves([{"step": n, "loss": 1.0 / n} for n in (1, 2, 3)]):
        assert ET.fromstring(svg).attrib["aria-label"] == "loss"
        assert "currentColor" in svg
        assert "#010203" not in svg


def arm_row(name: str) -> dict[str, Any]:
    return {"arm": name, "diverged": [], "entries": 320} | {"gain": {"grounded": SPAN, "closed": SPAN}}


SPAN = {"mean": 0.01, "low": -0.05, "high": 0.06}


def counted(most: int) -> list[str]:
    return [figures.histogram("Similarity of the levels", "similarity", [0.1, 0.2, 0.3], {"level 1": [most, 1]})]


def trained(**values: float) -> list[str]:
    return figures.training_curves([{"step": n, **{k: v * n for k, v in values.items()}} for n in (1, 2, 20_000)])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: counted(350_000),  # words of a large data set
        lambda: counted(6_500_000),
        lambda: trained(**{"rewards/margins": 3e-7, "rewards/chosen": -1.2e-9}),  # the paper's rate moves little
        lambda: figures.training_curves([{"step": n, "loss": 0.69314718 + 1e-7 * n} for n in range(9)]),
        lambda: trained(**{"logps/chosen": -7.5, "logps/rejected": -21.0}),
        lambda: reproduction_figures({"rows": {"b": [{}, *(arm_row(a.name) for a in FULL.arms["habit"])]}})["b"],
    ],
)
def test_no_label_leaves_its_figure(draw: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As matplotlib measures them, with room to spare for a browser's other font."""
    drawn: list[Any] = []
    end = figures.Panel.__exit__

    def noted(self: Any, *raised: Any) -> None:
        end(self, *raised)
        drawn.append(self._figure)

    monkeypatch.setattr(figures.Panel, "__exit__", noted)
    assert draw()
    for figure in drawn:
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 > 0.02, figure.axes[0].get_title("left")
        assert box.y0 > 0.02
        assert box.x1 < width - 0.02
        assert box.y1 < height - 0.02


def test_the_attention_that_was_chosen_stands_with_what_the_run_took(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "Attention in training" not in made(run, [preference(0)], [0.1] * 2, evaluated=False)
    (run / "costs.json").write_text('{"optimizing": {"units": 2, "seconds": 1.0, "bytes": 0}}')

    def page(attention: dict[str, Any]) -> str:
        (run / "attention.json").write_text(json.dumps(attention))
        write_report(run, [preference(0).record], lambda r: Image.new("RGB", (8, 8)))
        assert json.loads((run / "report.json").read_text())["training"]["attention"] == attention
        return (run / "report.html").read_text()

    timed = page({"kind": "flex", "sdpa_ms": 41.27, "flex_ms": 30.0, "why": None})
    assert "flex (timed on the first records: SDPA 41.3 ms, flex_attention 30.0 ms)." in timed
    failed = page({"kind": "sdpa", "sdpa_ms": 41.27, "flex_ms": None, "why": "RuntimeError: <no> compiler"})
    assert "sdpa (timed on the first records: SDPA 41.3 ms): RuntimeError: &lt;no&gt; compiler." in failed
