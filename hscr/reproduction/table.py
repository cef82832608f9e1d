"""Tables and figures of a reproduction, from what its cells stored: one row an arm, gains over the base, intervals over seeds and items."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hscr.artifacts import atomic_write, write_json
from hscr.figures import Panel
from hscr.records import VQARecord
from hscr.report import render
from hscr.reproduction.measures import crossed_interval, grounding_auroc, mean, measures
from hscr.reproduction.plan import ANCHORED, BASES, OBJECTIVES, VARIANTS, Cell, Scale

GAINS = ("grounded", "closed", "right", "reliance", "prior", "logp")  # paired with the base, on the test part
# The paper's order and what has to be beaten: (better, worse).
ORDER = (
    ("explicit", "base"),
    ("implicit", "explicit"),
    ("both (HSCR)", "implicit"),
    ("both (HSCR)", "DPO"),
    ("both (HSCR)", "list-wise (Plackett-Luce)"),
    ("both (HSCR)", "further SFT"),
    ("both + NLL", "further SFT"),
    ("both + NLL", "further SFT, selected entries"),
    ("both + NLL", "random pairs + NLL"),
    ("both + NLL", "own wrong answers + NLL"),
    ("both + NLL", "DPO + NLL"),
    ("both + NLL", "explicit + NLL"),
    ("further SFT", "base"),
)
Results = Sequence[tuple[Cell, dict[str, Any]]]


def summarize(
    scale: Scale,
    results: Results,
    bases: dict[str, dict[str, Any]],
    tried: Results,
    records: dict[str, list[VQARecord]],
) -> dict[str, Any]:
    """Everything the tables show: `rows[base]`, `order[base]`, `grid[base]`, with the scale, versions and the machine."""
    out: dict[str, Any] = {
        "scale": {"seeds": list(scale.seeds), "entries": scale.entries, **scale.asked, "lrs": list(scale.lrs)},
        "bases": {name: BASES[name] for name in scale.arms},
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "numpy")},
        "machine": {"python": platform.python_version(), "arch": platform.machine()},
        "rows": {},
        "order": {},
        "grid": {},
    }
    for base, said in bases.items():
        test, valid = measures(records["test"], said["test"]), measures(records["valid"], said["valid"])
        rows: list[dict[str, Any]] = [
            {
                "arm": "base",
                "level": {m: mean(test[m]) for m in GAINS},
                "valid": mean(valid["right"]),
                "auroc": grounding_auroc(records["test"], said["test"]),
            }
        ]
        stacked: dict[str, dict[str, Any]] = {"base": {m: test[m][None].repeat(len(scale.seeds), 0) for m in GAINS}}
        for arm in scale.arms[base]:
            cells = [(c, r) for c, r in results if c.base == base and c.arm.name == arm.name]
            diverged = [r["seed"] for _, r in cells if "diverged" in r]
            row: dict[str, Any] = {"arm": arm.name, "lr": cells[0][0].lr, "diverged": diverged}
            rows.append(row)
            if diverged:
                continue
            per_seed = [measures(records["test"], r["test"]) for _, r in cells]
            stacked[arm.name] = {m: np.stack([one[m] for one in per_seed]) for m in GAINS}
            row |= {
                "level": {m: float(np.mean([mean(one[m]) for one in per_seed])) for m in GAINS},
                "gain": {m: crossed_interval(stacked[arm.name][m] - test[m]) for m in GAINS},
                "by_seed": [mean(one["grounded"] - test["grounded"]) for one in per_seed],
                "valid": float(np.mean([mean(measures(records["valid"], r["valid"])["right"]) for _, r in cells])),
                "auroc": float(np.mean([grounding_auroc(records["test"], r["test"]) for _, r in cells])),
                "entries": cells[0][1]["entries"],
                "levels": float(np.mean([r["levels"] / r["entries"] for _, r in cells])),
                "train_seconds": float(np.mean([r["train_seconds"] for _, r in cells])),
                "rewards_chosen": float(np.mean([r["last"]["rewards/chosen"] for _, r in cells])),
            }
        out["rows"][base] = rows
        out["order"][base] = [
            {"better": a, "worse": b}
            | {m: crossed_interval(stacked[a][m] - stacked[b][m]) for m in ("grounded", "closed", "right")}
            for a, b in ORDER
            if a in stacked and b in stacked
        ]
        out["grid"][base] = [
            {"arm": c.arm.name, "lr": c.lr}
            | ({"diverged": r["diverged"]} if "diverged" in r else {"valid": mean(measures(records["valid"], r["valid"])["right"])})
            for c, r in tried
            if c.base == base
        ]  # fmt: skip
    return out


def markdown(summary: dict[str, Any]) -> str:
    """The tables as Markdown: points of accuracy, 95 % intervals in brackets."""
    scale = summary["scale"]
    lines = [
        f"{len(scale['seeds'])} seeds, {scale['entries']} entries, {scale['test']} questions on the held-out template; learning rates "
        f"from {', '.join(f'{lr:g}' for lr in scale['lrs'])} by {scale['valid']} validation questions at a seed of their own.",
        "",
    ]
    for base, rows in summary["rows"].items():
        first = rows[0]["level"]
        lines += [
            f"### Base `{base}`: {summary['bases'][base]}",
            f"The base: grounded words {first['grounded']:.3f}, closed {first['closed']:.3f}, prior said where it is wrong "
            f"{first['prior']:.3f}, reliance {first['reliance']:.3f}, log π(y_w) {first['logp']:.2f}, AUROC {rows[0]['auroc']:.2f}.",
            "",
            "| arm | lr | grounded words | closed | prior when wrong | reliance | log π(y_w) | AUROC | valid, all right | s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows[1:]:
            if row["diverged"]:
                lines.append(f"| {row['arm']} | {row['lr']:g} | diverged at seeds {row['diverged']} | | | | | | | |")
                continue
            g = row["gain"]
            cells = [
                _points(g["grounded"]),
                _points(g["closed"]),
                f"{row['level']['prior']:.3f}",
                _points(g["reliance"]),
            ]
            cells += [f"{g['logp']['mean']:+.2f}", f"{row['auroc']:.2f}", f"{row['valid']:.3f}", f"{row['train_seconds']:.0f}"]  # fmt: skip
            lines.append(f"| {row['arm']} | {row['lr']:g} | " + " | ".join(cells) + " |")
        lines += ["", "| comparison | grounded words | closed | all questions |", "| --- | --- | --- | --- |"]
        for pair in summary["order"][base]:
            spans = " | ".join(_points(pair[m]) for m in ("grounded", "closed", "right"))
            lines.append(f"| {pair['better']} − {pair['worse']} | {spans} |")
        lines.append("")
    return "\n".join(lines)


def _points(span: dict[str, float]) -> str:
    apart = "**" if span["low"] > 0 or span["high"] < 0 else ""
    return f"{apart}{100 * span['mean']:+.1f}{apart} [{100 * span['low']:+.1f}, {100 * span['high']:+.1f}]"


def figures(summary: dict[str, Any]) -> dict[str, list[str]]:
    """SVG by base: gains with intervals of the arms in their groups, and the gain against the number of entries."""
    groups = {"objectives": OBJECTIVES, "anchored": ANCHORED, "variants": VARIANTS}
    out: dict[str, list[str]] = {}
    for base, rows in summary["rows"].items():
        known = {row["arm"]: row for row in rows[1:] if not row["diverged"]}
        panels = [
            _forest(f"{title}, {metric}", [known[a.name] for a in arms if a.name in known], metric)
            for title, arms in groups.items()
            for metric in ("grounded", "closed")
            if any(a.name in known for a in arms)
        ]
        curves = {
            a: [known[n] for n in known if n == a or n.startswith(f"{a}, ")] for a in ("further SFT", "both + NLL")
        }
        curves = {a: [r for r in rows if r["arm"].endswith("entries") or r["arm"] == a] for a, rows in curves.items()}
        if all(len(rows) > 1 for rows in curves.values()):
            panels.append(_against_entries({a: [r for r in rows if "selected" not in r["arm"]] for a, rows in curves.items()}))  # fmt: skip
        out[base] = panels
    return out


def _forest(title: str, rows: list[dict[str, Any]], metric: str) -> str:
    names = [row["arm"] for row in reversed(rows)]
    left = 0.2 + 0.07 * max(map(len, names))
    panel = Panel(title, "points over the base", width=left + 3, height=0.7 + 0.24 * len(rows), left=left)
    with panel as axes:
        for y, row in enumerate(reversed(rows)):
            span = row["gain"][metric]
            axes.plot([100 * span["low"], 100 * span["high"]], [y, y], color="C0", linewidth=1.2)
            axes.plot(100 * span["mean"], y, "o", color="C0", markersize=4)
        axes.set_yticks(range(len(rows)), names)
        axes.axvline(0, color="#8a94a0", linewidth=0.8)
    return panel.svg


def _against_entries(curves: dict[str, list[dict[str, Any]]]) -> str:
    panel = Panel("grounded words by number of entries", "entries", "points over the base", width=4.6)
    with panel as axes:
        for name, rows in curves.items():
            rows = sorted(rows, key=lambda r: r["entries"])
            spans = [row["gain"]["grounded"] for row in rows]
            x = [row["entries"] for row in rows]
            axes.plot(x, [100 * s["mean"] for s in spans], "o-", label=name, markersize=4)
            axes.fill_between(x, [100 * s["low"] for s in spans], [100 * s["high"] for s in spans], alpha=0.15)
        axes.axhline(0, color="#8a94a0", linewidth=0.8)
        axes.legend()
    return panel.svg


def write(out: Path, summary: dict[str, Any]) -> None:
    """OUT/reproduction.json, .md and .html (self-contained)."""
    write_json(out / "reproduction.json", summary)
    atomic_write(out / "reproduction.md", markdown(summary).encode())
    page = render("reproduction.html", summary=summary, figures=figures(summary), points=_points)
    atomic_write(out / "reproduction.html", page.encode())
