"""What `hscr demo` says of its outcome."""

from __future__ import annotations

from hscr.predictions import Prediction
from service.demo import flag_line

FEW = "the calibration part has 10 wrong and 32 right answers; 20 of each are needed"


def said(policy: str, condition: str, score: float | None, right: bool, n: int) -> list[Prediction]:
    return [Prediction(policy, condition, f"r{i}", "x", {"closed/strict": float(right)}, score) for i in range(n)]


def test_the_demo_says_what_the_versions_threshold_does_to_its_answers() -> None:
    """At the threshold itself an answer is kept, as /vqa does: kept are 6 + 1 right and 2 wrong, flagged 1 right and 3 wrong."""
    predictions = [
        *said("adapter", "real", 0.5, True, 6),
        *said("adapter", "real", -0.25, True, 1),
        *said("adapter", "real", 0.5, False, 2),
        *said("adapter", "real", -0.5, True, 1),
        *said("adapter", "real", -0.5, False, 3),
        *said("adapter", "real", None, True, 5),
        *said("adapter", "blank", -0.5, False, 50),
        *said("base", "real", -0.5, False, 50),
    ]
    line = flag_line({"grounding": {"threshold": -0.25, "reason": None}}, predictions)
    assert "-0.2500 nats: 4 of its 13 answers" in line
    assert "Right are 78 % of those kept, 25 % of those flagged." in line
    alone = flag_line({"grounding": {"threshold": -9.0, "reason": None}}, predictions)
    assert "Right are 62 % of those kept, none of those flagged." in alone


def test_the_demo_says_why_nothing_is_flagged() -> None:
    assert FEW in flag_line({"grounding": {"threshold": None, "reason": FEW}}, [])
