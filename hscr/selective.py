"""Does the grounding score tell wrong answers from right ones, and below which score is an answer flagged?

AUROC and the accuracy–coverage curve (the lowest scores withheld first) with bootstrap intervals, and a threshold picked on one part of the
evaluation data and measured on the rest (docs/decisions/0018). Plain numbers in and out; nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hscr.calibration import says_nothing, too_few
from hscr.visual_tokens import derived_seed

COVERAGES = tuple(round(0.05 * i, 2) for i in range(1, 21))
RULE = "maximal Youden J (share of wrong answers flagged − share of right answers flagged) on the calibration part"
_CELLS = 1_000_000  # of a bootstrap's matrices at a time: all at once would be gigabytes for a large data set

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """An answer's grounding score (nats) and whether the answer is wrong."""

    score: float
    wrong: bool


def in_calibration_part(key: str, share: float) -> bool:
    """Whether a record (by its group, else its id) belongs to the calibration part: a hash, so that it does not depend on the others."""
    return derived_seed("calibration", key) < share * 2**63


def interval(
    values: Sequence[float], n_bootstrap: int, seed: int = 0, clusters: Sequence[object] | None = None
) -> dict[str, float | int]:
    """Mean with a 95 % percentile bootstrap interval over items, or over whole clusters of items that share their chance."""
    x = np.asarray(values, dtype=float)
    of = np.arange(len(x)) if clusters is None else np.unique([str(c) for c in clusters], return_inverse=True)[1]
    sums, sizes = np.bincount(of, weights=x), np.bincount(of)
    means = np.concatenate(
        [sums[draw].sum(axis=1) / sizes[draw].sum(axis=1) for draw in resamples(len(sums), n_bootstrap, seed)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high), "n": len(x)}


def resamples(n: int, n_bootstrap: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Resampled indices [b, n], in chunks of b."""
    random = np.random.default_rng(seed)
    rows = max(1, _CELLS // n)
    for start in range(0, n_bootstrap, rows):
        yield random.integers(0, n, (min(rows, n_bootstrap - start), n))


@dataclass(frozen=True)
class _Groups:
    """Answers of equal score taken together, scores ascending: how many are wrong and right, [..., G]."""

    wrong: Array
    right: Array

    def auroc(self) -> Array:
        """P(wrong answer's score < right one's), ties half: the area under the ROC with mid-ranks. NaN where one class is missing."""
        n_right, n_wrong = self.right.sum(axis=-1), self.wrong.sum(axis=-1)
        above = n_right[..., None] - np.cumsum(self.right, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.wrong * (above + self.right / 2)).sum(axis=-1) / (n_wrong * n_right)

    def accuracies(self) -> Array:
        """Accuracy of the answers kept at each of COVERAGES, [..., C]. Within a tie the kept ones are a fair draw: its expected value."""
        kept = np.flip(self.wrong + self.right, axis=-1).cumsum(axis=-1)
        right = np.flip(self.right, axis=-1).cumsum(axis=-1)
        rows = zip(kept.reshape(-1, kept.shape[-1]), right.reshape(-1, right.shape[-1]), strict=True)
        made = [
            np.interp(wanted, np.append(0, k), np.append(0, r)) / wanted
            for k, r in rows
            for wanted in [np.array(COVERAGES) * k[-1]]
        ]
        return np.array(made).reshape(*kept.shape[:-1], len(COVERAGES))


def _grouped(answers: Sequence[Judged], weights: Array) -> _Groups:
    """Group by score; `weights` [..., n] say how often each answer was drawn."""
    scores, wrong = np.array([a.score for a in answers]), np.array([a.wrong for a in answers])
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) > 0))
    weights, wrong = weights[..., order], wrong[order]
    return _Groups(
        np.add.reduceat(weights * wrong, starts, axis=-1), np.add.reduceat(weights * ~wrong, starts, axis=-1)
    )


def auroc(answers: Sequence[Judged]) -> float:
    """Probability that a wrong answer scores lower than a right one (ties half); 0.5 says nothing, NaN where all are wrong or all right."""
    return float(_grouped(answers, np.ones(len(answers))).auroc())


def separation(answers: Sequence[Judged], n_bootstrap: int, seed: int = 0) -> dict[str, Any]:
    """`auroc` with its interval (None where all answers are wrong or all are right) and `coverage`: accuracy at each coverage.

    Resamples without both classes say nothing about the AUROC and are left out of its interval.
    """
    n, n_wrong = len(answers), sum(a.wrong for a in answers)
    whole = _grouped(answers, np.ones(n))
    areas, curves = [], []
    for draw in resamples(n, n_bootstrap, seed):
        counts = np.array([np.bincount(row, minlength=n) for row in draw], dtype=float)
        groups = _grouped(answers, counts)
        areas.append(groups.auroc())
        curves.append(groups.accuracies())
    area = np.concatenate(areas)
    low, high = np.percentile(np.concatenate(curves), [2.5, 97.5], axis=0)
    out: dict[str, Any] = {"n": n, "n_wrong": n_wrong, "auroc": None}
    if 0 < n_wrong < n:
        span = np.percentile(area[~np.isnan(area)], [2.5, 97.5])
        out["auroc"] = {"mean": float(whole.auroc()), "low": float(span[0]), "high": float(span[1]), "n": n}
    out["coverage"] = [
        {"coverage": c, "accuracy": float(a), "low": float(lo), "high": float(hi)}
        for c, a, lo, hi in zip(COVERAGES, whole.accuracies(), low, high, strict=True)
    ]
    return out


def youden_threshold(answers: Sequence[Judged]) -> float:
    """The score below which flagging catches the most wrong answers for the right ones it costs: argmax over the middles between
    neighbouring scores of P(score < t | wrong) − P(score < t | right); of equals the lowest, which flags least.

    Raises ValueError where there are no two different scores, or no wrong or no right answer.
    """
    scores = np.unique([a.score for a in answers])
    groups = _grouped(answers, np.ones(len(answers)))
    if len(scores) < 2 or not groups.wrong.sum() or not groups.right.sum():
        raise ValueError("a threshold needs two different scores, a wrong answer and a right one")
    # J times both class sizes: whole numbers, so that equals are equal.
    flagged_wrong = np.cumsum(groups.wrong)[:-1] * groups.right.sum()
    flagged_right = np.cumsum(groups.right)[:-1] * groups.wrong.sum()
    best = int(np.argmax(flagged_wrong - flagged_right))
    return float((scores[best] + scores[best + 1]) / 2)


def flagging(calibration: Sequence[Judged], rest: Sequence[Judged], n_bootstrap: int) -> dict[str, Any]:
    """A threshold from the calibration part and what it does on the rest.

    `threshold` is None, with a `reason`, where the calibration part cannot carry one: too few wrong or right answers, or a score whose
    AUROC there is not above 0.5 beyond its interval. A flag that means nothing is worse than none.
    """
    n, n_wrong = len(calibration), sum(a.wrong for a in calibration)
    out: dict[str, Any] = {"threshold": None, "rule": RULE, "calibration": {"n": n, "n_wrong": n_wrong}}
    if (reason := too_few(n, n_wrong)) is None:
        out["calibration"]["auroc"] = area = separation(calibration, n_bootstrap)["auroc"]
        reason = says_nothing(area["low"])
    if reason is not None:
        return out | {"reason": reason}
    threshold = out["threshold"] = youden_threshold(calibration)
    out["measured"] = _measured(rest, lambda a: a.score < threshold, n_bootstrap) if rest else None
    return out


def _measured(answers: Sequence[Judged], flags: Callable[[Judged], bool], n_bootstrap: int) -> dict[str, Any]:
    """Share flagged, and accuracy of kept and of flagged answers; None where there are none."""
    flagged = [a for a in answers if flags(a)]
    kept = [a for a in answers if not flags(a)]

    def accuracy(part: Sequence[Judged]) -> dict[str, Any] | None:
        return interval([float(not a.wrong) for a in part], n_bootstrap) if part else None

    return {
        "flagged": interval([float(flags(a)) for a in answers], n_bootstrap),
        "accuracy": accuracy(answers),
        "accuracy_kept": accuracy(kept),
        "accuracy_flagged": accuracy(flagged),
    }
