"""Evaluation: policies × image conditions × records -> predictions.

Conditions: the real image, a blank one, and another record's image (a derangement by seed). Every prediction is stored; the tables are
hscr/tables.py's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from hscr.answer import Answerer, AnswerRequest
from hscr.config import EvaluationConfig
from hscr.images import Images, as_images
from hscr.predictions import CONDITIONS, Prediction
from hscr.records import VQARecord
from hscr.scoring import check_scorable, score
from hscr.visual_tokens import derived_seed


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
