"""What an evaluation's calibration part must have to carry a threshold of the grounding score (docs/decisions/0018), and what it lacks.

The evaluation asks here, and later whoever kept its numbers only. No torch.
"""

from __future__ import annotations

MIN_OF_EACH = 20  # wrong and right answers that a threshold needs in the calibration part


def too_few(n: int, n_wrong: int) -> str | None:
    """Why n answers, n_wrong of them wrong, carry no threshold; None where they are enough."""
    if min(n_wrong, n - n_wrong) >= MIN_OF_EACH:
        return None
    return f"the calibration part has {n_wrong} wrong and {n - n_wrong} right answers; {MIN_OF_EACH} of each are needed"


def says_nothing(auroc_low: float) -> str | None:
    """Why a score whose AUROC on the calibration part has this lower end of its interval carries none; None where it does."""
    return None if auroc_low > 0.5 else "on the calibration part the score does not tell wrong answers from right ones"
