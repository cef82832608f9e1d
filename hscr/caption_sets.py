"""BLEU of a whole set of captions, with bootstrap intervals. It is what papers print.

Counts are added over the set before they are divided, so it is no mean over captions: a resample adds the counts of the captions drawn. The
numbers are those of sacrebleu's corpus BLEU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hscr.scoring import require_caption_libraries
from hscr.selective import resamples

METRIC = "caption/corpus_bleu"
Counts = NDArray[np.int64]  # of one caption, [10]: matching 1- to 4-grams, all of its own, its length, the reference's


def caption_counts(prediction: str, reference: str) -> Counts:
    """What a caption adds to its set's BLEU. Raises ValueError where the extra is missing."""
    require_caption_libraries()
    from sacrebleu.metrics import BLEU

    found = BLEU(effective_order=True).sentence_score(prediction, [reference])
    return np.array([*found.counts, *found.totals, found.sys_len, found.ref_len], dtype=np.int64)


def bleu(counts: Counts) -> float:
    """BLEU-4 in [0, 1] of added counts [10]."""
    from sacrebleu.metrics import BLEU

    correct, total, (said, wanted) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return min(float(BLEU.compute_bleu(correct, total, said, wanted, smooth_method="exp").score) / 100, 1.0)  # rounding


def bleu_interval(
    captions: Sequence[Counts],
    n_bootstrap: int,
    *,
    minus: Sequence[Counts] | None = None,
    clusters: Sequence[object] | None = None,
) -> dict[str, float | int]:
    """BLEU of the set (`mean`), or its difference to that of the paired set `minus`, with a 95 % percentile interval.

    Resamples captions, or whole clusters of captions that share their chance, as hscr.selective.interval does.
    """
    n = len(captions)
    of = np.arange(n) if clusters is None else np.unique([str(c) for c in clusters], return_inverse=True)[1]

    def by_cluster(counts: Sequence[Counts]) -> Counts:
        sums = np.zeros((int(of.max()) + 1, 10), dtype=np.int64)
        np.add.at(sums, of, np.array(counts))
        return sums

    sides = [by_cluster(captions), *([] if minus is None else [by_cluster(minus)])]

    def value(rows: list[Counts]) -> float:
        return bleu(rows[0]) - (bleu(rows[1]) if len(rows) > 1 else 0.0)

    values = [
        value([side[row].sum(axis=0) for side in sides])
        for draw in resamples(len(sides[0]), n_bootstrap, 0)
        for row in draw
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return {"mean": value([side.sum(axis=0) for side in sides]), "low": float(low), "high": float(high), "n": n}
