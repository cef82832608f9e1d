"""From what was said to what it scores, item by item, so that cells are paired on their questions.

A measure is an array over the records of a split, NaN where a record does not have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hscr.records import VQARecord
from hscr.scoring import grounded_words, is_right, score, strict_closed
from hscr.selective import Judged, auroc

Array = NDArray[np.float64]
PRIOR = ("left", "large", "bright", "frontal")  # the usual word of each category in the biased text (demo/data.py)


def answer_scores(records: Sequence[VQARecord], answers: Sequence[str]) -> dict[str, Array]:
    """`grounded` (share of an open answer's grounded words), `closed` (strict), `right` (either), `prior` (said where it is wrong)."""
    grounded, closed, prior = (np.full(len(records), np.nan) for _ in range(3))
    for i, (record, answer) in enumerate(zip(records, answers, strict=True)):
        if record.answer_type == "closed":
            closed[i] = strict_closed(answer, record.answer, record.options)
        elif record.grounded:
            grounded[i] = np.mean(grounded_words(answer, record.grounded))
            said = set(answer.lower().replace(".", " ").replace(",", " ").split())
            usual = [p for g in record.grounded for p in PRIOR if p in g.among and p != g.word]
            if usual:
                prior[i] = np.mean([p in said for p in usual])
    right = np.where(np.isnan(grounded), closed, grounded)
    return {"grounded": grounded, "closed": closed, "right": right, "prior": prior}


def probed(n: int) -> int:
    """Of n test records how many are also asked with another image, grounded and scored: these cost three times as much as an answer."""
    return n // 2


def measures(records: Sequence[VQARecord], said: dict[str, Any]) -> dict[str, Array]:
    """All item measures of one cell on one split. `reliance`: right with the real image − right with another record's."""
    out = answer_scores(records, said["answers"])
    if "shuffled" in said:
        m = len(said["shuffled"])
        out["reliance"], out["logp"] = np.full((2, len(records)), np.nan)
        out["reliance"][:m] = out["right"][:m] - answer_scores(records[:m], said["shuffled"])["right"]
        out["logp"][:m] = said["logp"]
    return out


def grounding_auroc(records: Sequence[VQARecord], said: dict[str, Any]) -> float:
    """Probability that a wrong answer's grounding score is lower than a right one's; NaN where there are not both."""
    judged = [
        Judged(g, not right)
        for r, a, g in zip(records, said["answers"], said["grounding"], strict=False)  # of the probed ones
        if g is not None and (right := is_right(score(r, a))) is not None
    ]
    return auroc(judged)


def mean(values: Array) -> float:
    """Mean over the items that have the measure."""
    return float(np.nanmean(values))


def crossed_interval(values: Array, n_bootstrap: int = 2000) -> dict[str, float]:
    """Mean of values [S, I] (seeds × items, NaN in whole columns) with a 95 % interval of a hierarchical bootstrap.

    Seeds and items are both resampled: all seeds answer the same items, so the two are crossed. One seed gives an interval over items.
    """
    x = values[:, ~np.isnan(values).any(axis=0)]
    seeds, items = x.shape
    stream = np.random.default_rng(0)
    means = []
    for start in range(0, n_bootstrap, 200):  # in parts: all draws at once would be S·I·n_bootstrap numbers
        n = min(200, n_bootstrap - start)
        s = stream.multinomial(seeds, np.full(seeds, 1 / seeds), size=n) / seeds
        i = stream.multinomial(items, np.full(items, 1 / items), size=n) / items
        means.append(((s @ x) * i).sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high)}
