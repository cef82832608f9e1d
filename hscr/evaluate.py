"""Evaluation: policies × image conditions × records -> predictions; predictions -> tables with intervals.

Every prediction is a typed record that the caller stores, so each table can be computed again from the file. Conditions: the real image,
a blank one, and another record's image (a derangement by seed): what the real image adds is real − shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from hscr.answer import Answerer, AnswerRequest
from hscr.config import EvaluationConfig
from hscr.images import Images, as_images
from hscr.records import VQARecord
from hscr.scoring import score
from hscr.similarity import normalized
from hscr.visual_tokens import derived_seed

CONDITIONS = ("real", "blank", "shuffled")


@dataclass(frozen=True)
class Prediction:
    """One answer under one policy and condition. `grounding` (nats) is measured with the real image only."""

    policy: str
    condition: str
    id: str
    text: str
    scores: dict[str, float]
    grounding: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def derangement(n: int, seed: int) -> list[int]:
    """A permutation without fixed points (n ≥ 2): a seeded cycle through all."""
    order = np.random.default_rng(derived_seed("shuffle", seed)).permutation(n)
    out = np.empty(n, dtype=int)
    out[order] = np.roll(order, 1)
    return [int(i) for i in out]


def plan(n: int, policies: Sequence[str], config: EvaluationConfig) -> list[tuple[str, str, list[int]]]:
    """The batches of an evaluation in order: (policy, condition, record indices). A resumed evaluation skips whole batches."""
    conditions = CONDITIONS if config.counterfactual and n > 1 else CONDITIONS[:1]
    return [
        (policy, condition, list(range(start, min(start + config.batch_size, n))))
        for policy in policies
        for condition in conditions
        for start in range(0, n, config.batch_size)
    ]


def evaluate(
    answerer: Answerer,
    records: Sequence[VQARecord],
    open_image: Callable[[VQARecord], Images],
    policies: dict[str, str | None],
    config: EvaluationConfig,
    *,
    seed: int = 0,
    skip_batches: int = 0,
) -> Iterator[list[Prediction]]:
    """Yield one list of predictions a batch of `plan`. `policies` maps a label ("base", "adapter") to an adapter name or None."""
    other = derangement(len(records), seed) if len(records) > 1 else [0]
    for policy, condition, rows in plan(len(records), list(policies), config)[skip_batches:]:
        requests = []
        for i in rows:
            images = as_images(open_image(records[other[i] if condition == "shuffled" else i]))
            if condition == "blank":
                images = tuple(Image.new("RGB", image.size) for image in images)
            requests.append(
                AnswerRequest(
                    images if len(images) > 1 else images[0],
                    records[i].question,
                    adapter=policies[policy],
                    max_tokens=config.max_new_tokens,
                    grounding="summary" if condition == "real" else "none",
                )
            )
        yield [
            Prediction(policy, condition, records[i].id, a.text, score(records[i], a.text), a.score)
            for i, a in zip(rows, answerer.answer(requests), strict=True)
        ]


def interval(values: Sequence[float], n_bootstrap: int, seed: int = 0) -> dict[str, float | int]:
    """Mean with a 95 % percentile bootstrap interval over items."""
    x = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // len(x))  # resamples at a time: all at once would be gigabytes for a large data set
    parts = [min(rows, n_bootstrap - start) for start in range(0, n_bootstrap, rows)]
    means = np.concatenate([x[random.integers(0, len(x), (part, len(x)))].mean(axis=1) for part in parts])
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high), "n": len(x)}


def summarize(predictions: Sequence[Prediction], config: EvaluationConfig) -> dict[str, Any]:
    """Tables of an evaluation.

    `scores[policy][condition][metric]` with intervals; `gain[condition][metric]` = adapter − base, paired; `reliance[policy][metric]` =
    real − shuffled, paired; `sensitivity[policy]` = share of answers that another image changes; `grounding[policy]`.
    """
    table: dict[tuple[str, str], dict[str, Prediction]] = {}
    for p in predictions:
        table.setdefault((p.policy, p.condition), {})[p.id] = p
    out: dict[str, Any] = {"scores": {}, "gain": {}, "reliance": {}, "sensitivity": {}, "grounding": {}}

    def paired(a: dict[str, Prediction], b: dict[str, Prediction]) -> dict[str, Any]:
        differences: dict[str, list[float]] = {}
        for key in a.keys() & b.keys():
            for metric, value in a[key].scores.items():
                differences.setdefault(metric, []).append(value - b[key].scores[metric])
        return {m: interval(sorted(v), config.n_bootstrap) for m, v in sorted(differences.items())}

    for (policy, condition), rows in table.items():
        values: dict[str, list[float]] = {}
        for p in rows.values():
            for metric, value in p.scores.items():
                values.setdefault(metric, []).append(value)
        out["scores"].setdefault(policy, {})[condition] = {
            m: interval(v, config.n_bootstrap) for m, v in sorted(values.items())
        }
        if condition == "real":
            scores = [p.grounding for p in rows.values() if p.grounding is not None]
            if scores:
                out["grounding"][policy] = interval(scores, config.n_bootstrap)
            if (policy, "shuffled") in table:
                shuffled = table[policy, "shuffled"]
                out["reliance"][policy] = paired(rows, shuffled)
                changed = [float(normalized(p.text) != normalized(shuffled[k].text)) for k, p in rows.items()]
                out["sensitivity"][policy] = interval(changed, config.n_bootstrap)
        if policy == "adapter" and ("base", condition) in table:
            out["gain"][condition] = paired(rows, table["base", condition])
    return out


def verdict(summary: dict[str, Any]) -> dict[str, Any]:
    """The plain reading of an evaluation: did the adapter beat the base beyond the interval, and does blindness undo it?

    Per metric: `better` (interval above 0), `worse` (below 0) or `tie`; for blank and shuffled images the gain there, and `gone` where
    its interval is not above 0. A blank image is one image: a model says nearly the same to all, so chance moves all items together and
    the interval is too narrow there; the shuffled image is the steadier control.
    """
    out: dict[str, Any] = {}
    for metric, gain in summary["gain"].get("real", {}).items():
        word = "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "tie"
        out[metric] = {"result": word, "gain": gain}
        for condition in CONDITIONS[1:]:
            without = summary["gain"].get(condition, {}).get(metric)
            if without is not None:
                out[metric][f"{condition}_gain"] = without
                out[metric][f"gone_when_{condition}"] = not without["low"] > 0
    return out
