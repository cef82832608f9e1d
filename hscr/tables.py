"""The tables of an evaluation, from its predictions alone: scores with intervals, paired gains, reliance on the image, the plain reading.

What the real image adds is real − shuffled. Whether the grounding score tells wrong answers from right ones is hscr/selective.py's part,
BLEU of a set of captions hscr/caption_sets.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hscr.caption_sets import METRIC, bleu_interval, caption_counts
from hscr.config import EvaluationConfig
from hscr.predictions import CONDITIONS, Prediction, kind
from hscr.scoring import is_right
from hscr.selective import Judged, flagging, in_calibration_part, interval, separation
from hscr.words import normalized

BLANK_NOTE = (
    "One blank image serves all questions, so equal questions get equal answers: intervals under the blank image resample distinct "
    "questions, not records, and are still too narrow where these are few. The shuffled image is the steadier control."
)


def summarize(predictions: Sequence[Prediction], config: EvaluationConfig) -> dict[str, Any]:
    """Tables of an evaluation, from its predictions alone.

    `scores[policy][condition][metric]` with intervals; `gain[condition][metric]` = adapter − base, paired, and `gain_over_before` =
    adapter − before, where there is such a policy; `reliance[policy][metric]` = real − shuffled, paired; `sensitivity[policy]` = share of
    answers that another image changes; `image_invariant[policy]` = share of open answers, visual claims, that stay word for word the same
    under another image; `grounding[policy]` = the mean score;
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
        for other, name in (("base", "gain"), ("before", "gain_over_before")):
            if policy == "adapter" and (other, condition) in table:
                minus = table[other, condition]
                gains = by_metric(differences(rows, minus), condition) | caption_sets(rows, condition, minus)
                out.setdefault(name, {})[condition] = gains
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
