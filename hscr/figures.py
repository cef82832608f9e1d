"""The report's figures: numbers in, SVG text out. Text stays text and takes the page's colour, so a figure reads in light, dark and print.

matplotlib is loaded only when a figure is drawn, without pyplot: no global state, no display. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = ("#3b7dd8", "#d9772b", "#2e9e6b", "#b3559e", "#8a94a0")  # tell apart on white and on near-black
_INK = "#010203"  # a colour that nothing else has: becomes currentColor
_POINTS = 400  # of a line: a long run's curve is averaged to so many


def _style() -> Any:  # matplotlib types every key by name
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    return ink | {
        "svg.fonttype": "none",
        "svg.hashsalt": "hscr",
        "font.family": "sans-serif",
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "grid.color": "#8a94a0",
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "lines.linewidth": 1.5,
        "axes.prop_cycle": _cycle(),
    }


def _cycle() -> Any:
    from cycler import cycler

    return cycler(color=COLOURS)


class Panel:
    """One small plot: `with Panel(title) as axes: …`; afterwards `svg` holds it."""

    def __init__(
        self,
        title: str,
        xlabel: str = "",
        ylabel: str = "",
        width: float = 3.5,
        height: float = 2.5,
        left: float = 0.6,
    ) -> None:
        """Sizes in inches; `left` is the room for the labels beside the vertical axis."""
        self.title, self.xlabel, self.ylabel, self.size = title, xlabel, ylabel, (width, height)
        self.margins = left, 0.14, 0.42 if xlabel else 0.26, 0.28
        self.svg = ""

    def __enter__(self) -> Any:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        self._context = rc_context(_style())
        self._context.__enter__()
        self._figure = Figure(figsize=self.size)
        axes = self._figure.add_subplot()
        (width, height), (left, right, bottom, top) = self.size, self.margins
        # Fixed: panels side by side line up, and a layout that measures every label takes half as long again as all the rest.
        self._figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        axes.set_title(self.title, loc="left")
        # An exponent or offset stands at the right: at the left it would push the title out of the fixed margin.
        axes.yaxis.set_offset_position("right")
        axes.set_xlabel(self.xlabel)
        axes.set_ylabel(self.ylabel)
        return axes

    def __exit__(self, kind: object, *rest: object) -> None:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.ticker import EngFormatter

        try:
            if kind is None:
                out = io.StringIO()
                for axes in self._figure.axes:
                    if max(map(abs, axes.get_ylim())) >= 10_000:
                        axes.yaxis.set_major_formatter(EngFormatter(sep=""))  # 30k
                self._figure.patch.set_alpha(0)
                for axes in self._figure.axes:
                    axes.patch.set_alpha(0)
                FigureCanvasSVG(self._figure).print_svg(out, metadata={"Date": None, "Creator": None})
                self.svg = self._inline(out.getvalue())
        finally:
            self._context.__exit__(None, None, None)

    def _inline(self, text: str) -> str:
        text = text[text.index("<svg") :].replace(_INK, "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(
            r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        )
        return text.replace("<svg", f'<svg role="img" aria-label="{_escaped(self.title)}"', 1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def thinned(steps: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric, averaged in runs of neighbours to at most 400 points."""
    points = np.array([(s["step"], s[name]) for s in steps if name in s], dtype=float).reshape(-1, 2)
    if len(points) > _POINTS:
        points = np.array([part.mean(axis=0) for part in np.array_split(points, _POINTS)])
    return points[:, 0].tolist(), points[:, 1].tolist()


def training_curves(steps: Sequence[Mapping[str, float]]) -> list[str]:
    """Loss, rewards, margins, log-probabilities and reward accuracy over the steps; a panel without numbers is left out."""
    panels = {
        "loss": ["loss", "nll"],
        "rewards": ["rewards/chosen", "rewards/rejected"],
        "reward margin": ["rewards/margins"],
        "log-probability (nats)": ["logps/chosen", "logps/rejected"],
        "pairs in the right order": ["rewards/accuracies"],
    }
    out = []
    for title, names in panels.items():
        lines = {name: thinned(steps, name) for name in names}
        lines = {name: line for name, line in lines.items() if line[0]}
        if not lines:
            continue
        panel = Panel(title, "step")
        with panel as axes:
            for name, (x, y) in lines.items():
                axes.plot(x, y, label=name.split("/")[-1])
            if title in ("rewards", "reward margin"):
                axes.axhline(0, color=_INK, linewidth=0.6, linestyle=":")
            if len(lines) > 1:
                axes.legend()
        out.append(panel.svg)
    return out


def histogram(title: str, xlabel: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> str:
    """Step histograms of several groups over the same bins."""
    panel = Panel(title, xlabel, "count")
    with panel as axes:
        for colour, (label, values) in zip(COLOURS, counts.items(), strict=False):
            axes.stairs(values, edges, label=f"{label} (n = {sum(values)})", fill=True, alpha=0.22, color=colour)
            axes.stairs(values, edges, color=colour, linewidth=1.3)
        axes.legend()
    return panel.svg


def score_panels(scores: Mapping[str, Any]) -> list[str]:
    """A panel a metric: mean and 95 % interval of every policy under the real, a blank and another image."""
    names = {"real": "real image", "blank": "blank", "shuffled": "another"}
    metrics = list(next(iter(scores.values()))["real"])
    out = []
    for metric in metrics:
        conditions = [c for c in names if all(metric in s.get(c, {}) for s in scores.values())]
        panel = Panel(metric)
        with panel as axes:
            for at, (policy, by_condition) in enumerate(scores.items()):
                values = [by_condition[c][metric] for c in conditions]
                mean = np.array([v["mean"] for v in values])
                ends = np.abs([[v["low"] for v in values], [v["high"] for v in values]] - mean)
                x = np.arange(len(conditions)) + 0.16 * (at - (len(scores) - 1) / 2)
                axes.errorbar(x, mean, ends, fmt="o", markersize=4.5, capsize=2.5, label=policy, color=COLOURS[at % 5])
            axes.set_xticks(range(len(conditions)), [names[c] for c in conditions])
            axes.set_xlim(-0.5, len(conditions) - 0.5)
            axes.set_ylim(0, 1.02)
            axes.grid(visible=False, axis="x")
            if len(scores) > 1:
                axes.legend(loc="lower left")
        out.append(panel.svg)
    return out


def coverage_curves(separation: Mapping[str, Any]) -> list[str]:
    """A panel a kind of question: accuracy of the answers kept when the lowest grounding scores are withheld, with 95 % bands."""
    out = []
    for kind in ("all", "open", "closed"):
        lines = {policy: kinds[kind] for policy, kinds in separation.items() if kind in kinds}
        if not lines:
            continue
        panel = Panel(f"{kind} questions", "share answered (lowest scores withheld)", "accuracy")
        with panel as axes:
            for colour, (policy, found) in zip(COLOURS, lines.items(), strict=False):
                points = [p for p in found["coverage"] if p["coverage"] >= 0.1]  # below it a handful of answers
                x = [p["coverage"] for p in points]
                axes.fill_between(x, [p["low"] for p in points], [p["high"] for p in points], alpha=0.16, color=colour)
                area = f", AUROC {found['auroc']['mean']:.2f}" if found["auroc"] else ""
                axes.plot(x, [p["accuracy"] for p in points], label=policy + area, color=colour)
                axes.axhline(points[-1]["accuracy"], color=colour, linewidth=0.8, linestyle=":")
            axes.set_xlim(0.1, 1)
            axes.set_ylim(0, 1.02)
            axes.legend(loc="lower left")
        out.append(panel.svg)
    return out
