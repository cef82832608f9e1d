"""Evaluation: policies × image conditions × records -> predictions; predictions -> tables with intervals.

Every prediction is a typed record that the caller stores, so each table can be computed again from the file. Conditions: the real image,
a blank one, and another record's image (a derangement by seed): what the real image adds is real − shuffled. Whether the grounding score
tells wrong answers from right ones is hscr/selective.py's part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hscr.answer import Answerer, AnswerRequest
from hscr.caption_sets import METRIC, bleu_interval, caption_counts
from hscr.config import EvaluationConfig
from hscr.images import Images, as_images
from hscr.records import VQARecord
from hscr.scoring import check_scorable, is_right, score
from hscr.selective import Judged, flagging, in_calibration_part, interval, separation
from hscr.similarity import normalized
from hscr.visual_tokens import derived_seed

CONDITIONS = ("real", "blank", "shuffled")
BLANK_NOTE = (
    "One blank image serves all questions, so equal questions get equal answers: intervals under the blank image resample distinct "
    "questions, not records, and are still too narrow where these are few. The shuffled image is the steadier control."
)


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


def derangement(n: int, seed: int) -> list[int]:
    """A permutation without fixed points (n ≥ 2): a seeded cycle through all."""
    order = np.random.default_rng(derived_seed("shuffle", seed)).permutation(n)
    out = np.empty(n, dtype=int)
    out[order] = np.roll(order, 1)
    return [int(i) for i in out]


def plan(
    n: int, policies: Sequence[str], config: EvaluationConfig, conditions: Sequence[str] = CONDITIONS
) -> list[tuple[str, str, list[int]]]:
    """The batches of an evaluation in order: (policy, condition, record indices). A resumed evaluation skips whole batches."""
    conditions = conditions if config.counterfactual and n > 1 else CONDITIONS[:1]
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
    conditions: Sequence[str] = CONDITIONS,
    grounding: bool = True,
) -> Iterator[list[Prediction]]:
    """Yield one list of predictions a batch of `plan`. `policies` maps a label ("base", "adapter") to an adapter name or None.

    `grounding` measures the grounding score with the real image.

    Raises ValueError before the first answer where a scorer is not installed.
    """
    check_scorable(records)
    other = derangement(len(records), seed) if len(records) > 1 else [0]
    for policy, condition, rows in plan(len(records), list(policies), config, conditions)[skip_batches:]:
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
                    grounding="summary" if grounding and condition == "real" else "none",
                )
            )
        yield [
            Prediction(
                policy,
                condition,
                records[i].id,
                a.text,
                score(records[i], a.text),
                a.score,
                question=records[i].question,
                group=records[i].group,
                reference=records[i].answer,
            )
            for i, a in zip(rows, answerer.answer(requests), strict=True)
        ]


def summarize(predictions: Sequence[Prediction], config: EvaluationConfig) -> dict[str, Any]:
    """Tables of an evaluation, from its predictions alone.

    `scores[policy][condition][metric]` with intervals; `gain[condition][metric]` = adapter − base, paired; `reliance[policy][metric]` =
    real − shuffled, paired; `sensitivity[policy]` = share of answers that another image changes; `image_invariant[policy]` = share of open
    answers, visual claims, that stay word for word the same under another image; `grounding[policy]` = the mean score;
    `separation[policy][open | closed | all]` and `flag[policy]` = what the score says about wrong answers (hscr/selective.py);
    `verdict[metric]` = the plain reading of the gains; `settings` = the configuration's fields that the tables depend on.
    """
    table: dict[tuple[str, str], dict[str, Prediction]] = {}
    for p in predictions:
        table.setdefault((p.policy, p.condition), {})[p.id] = p
    names = ("scores", "gain", "reliance", "sensitivity", "image_invariant", "grounding", "separation", "flag")
    out: dict[str, Any] = {name: {} for name in names}
    n_bootstrap = config.n_bootstrap
    questions = {p.id: p.question or p.id for p in predictions}

    def by_metric(values: dict[str, dict[str, float]], condition: str) -> dict[str, Any]:
        """Intervals of {id: {metric: value}}; under the blank image over questions."""
        spans = {}
        for metric in sorted({m for scores in values.values() for m in scores}):
            ids = sorted(i for i, scores in values.items() if metric in scores)
            clusters = [questions[i] for i in ids] if condition == "blank" else None
            spans[metric] = interval([values[i][metric] for i in ids], n_bootstrap, clusters=clusters)
        return spans

    def caption_sets(
        rows: dict[str, Prediction], condition: str, minus: dict[str, Prediction] | None = None
    ) -> dict[str, Any]:
        """BLEU of the captions among `rows` as one metric more, or its gain over those of `minus`; without captions none."""
        ids = sorted(
            i for i, p in rows.items() if kind(p) == "caption" and p.reference and (minus is None or i in minus)
        )
        if not ids:
            return {}
        counted = [[caption_counts(side[i].text, side[i].reference) for i in ids] for side in (rows, minus) if side]
        clusters = [questions[i] for i in ids] if condition == "blank" else None
        found = bleu_interval(counted[0], n_bootstrap, minus=counted[1] if minus else None, clusters=clusters)
        return {METRIC: found}

    def differences(a: dict[str, Prediction], b: dict[str, Prediction]) -> dict[str, dict[str, float]]:
        return {i: {m: v - b[i].scores[m] for m, v in p.scores.items()} for i, p in a.items() if i in b}

    for (policy, condition), rows in table.items():
        scores = by_metric({i: p.scores for i, p in rows.items()}, condition) | caption_sets(rows, condition)
        out["scores"].setdefault(policy, {})[condition] = scores
        if policy == "adapter" and ("base", condition) in table:
            base = table["base", condition]
            out["gain"][condition] = by_metric(differences(rows, base), condition) | caption_sets(rows, condition, base)
        if condition == "blank":
            out["note"] = BLANK_NOTE
        if condition != "real":
            continue
        grounding = [p.grounding for p in rows.values() if p.grounding is not None]
        if grounding:
            out["grounding"][policy] = interval(grounding, n_bootstrap)
        out["separation"][policy], out["flag"][policy] = _judged(list(rows.values()), config)
        if (policy, "shuffled") in table:
            shuffled = table[policy, "shuffled"]
            reliance = by_metric(differences(rows, shuffled), "real") | caption_sets(rows, "real", shuffled)
            out["reliance"][policy] = reliance
            same = {i: normalized(p.text) == normalized(shuffled[i].text) for i, p in rows.items() if i in shuffled}
            out["sensitivity"][policy] = interval([float(not v) for v in same.values()], n_bootstrap)
            claims = [float(v) for i, v in same.items() if kind(rows[i]) == "open"]
            if claims:
                out["image_invariant"][policy] = interval(claims, n_bootstrap)
    settings = {"n_bootstrap": config.n_bootstrap, "calibration_share": config.calibration_share}
    return {**out, "verdict": verdict(out), "settings": settings}


def kind(prediction: Prediction) -> str:
    """open, closed or caption: the first part of its metrics' names."""
    return next(iter(prediction.scores), "open").partition("/")[0]


def _judged(predictions: Sequence[Prediction], config: EvaluationConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The score against wrong answers by kind, and the flag: one threshold for all kinds, since a question online does not say its kind."""
    judged = [
        (p, Judged(p.grounding, not right))
        for p in predictions
        if p.grounding is not None and math.isfinite(p.grounding) and (right := is_right(p.scores)) is not None
    ]
    kinds = {k: [j for p, j in judged if k in ("all", kind(p))] for k in ("open", "closed", "all")}
    parts: dict[bool, list[Judged]] = {True: [], False: []}
    for p, j in judged:
        parts[in_calibration_part(p.group or p.id, config.calibration_share)].append(j)
    return (
        {k: separation(rows, config.n_bootstrap) for k, rows in kinds.items() if rows},
        flagging(parts[True], parts[False], config.n_bootstrap),
    )


def verdict(summary: dict[str, Any]) -> dict[str, Any]:
    """The plain reading of an evaluation: did the adapter beat the base beyond the interval, and does blindness undo it?

    Per metric: `better` (interval above 0), `worse` (below 0) or `tie`; for blank and shuffled images the gain there, and `gone` where
    its interval is not above 0 (BLANK_NOTE says what the blank image's interval is worth).
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
