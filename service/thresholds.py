"""Which evaluation of a version gives its grounding score a threshold and an AUROC, and why there is no threshold where there is none.

A version is measured by the job that made it, and by every POST /evaluate since. The newest that has a threshold counts; where none has
one, the newest that has an AUROC, so that `reason` is about the numbers beside it (docs/decisions/0106). Knows no route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import JSON, ColumnElement, Select, Text, bindparam, cast, select, type_coerce
from sqlalchemy.orm import Session

from hscr.calibration import says_nothing, too_few
from hscr.config import PreferenceConfig
from service.models import AdapterVersion, Evaluation

NEVER = "no evaluation has measured the grounding score of this version; POST /evaluate does"
UNTOLD = "its evaluation gave none; the evaluation's report says why"
_PREFIX = "adapter/grounding_"

_V, _E = AdapterVersion.__table__.c, Evaluation.__table__.c


def _names(name: str) -> ColumnElement[bool]:
    """Whether the metrics have this number. As text: a path into JSON is written by each driver's own rules, which Look passes by."""
    return cast(_E.metrics, Text).like(f'%"{_PREFIX}{name}"%')


_BEST = (
    select(_E.job_id)
    .where(_E.adapter_name == _V.adapter_name, _E.version == _V.version)
    .order_by(
        _names("threshold").desc(),
        _names("auroc").desc(),
        _E.created_at.desc(),
        _E.job_id.desc(),
    )
    .limit(1)
)
# Of a version, as columns of a statement that selects from adapter_versions.
EVALUATED_BY = _BEST.scalar_subquery().label("evaluated_by")
EVALUATED = type_coerce(_BEST.with_only_columns(_E.metrics).scalar_subquery(), JSON()).label("evaluated")
_OF: Select[Any] = select(_V.version, EVALUATED_BY, EVALUATED).where(
    _V.adapter_name == bindparam("name"), _V.version.in_(bindparam("numbers", expanding=True))
)


@dataclass(frozen=True)
class Flag:
    """`auroc` against wrong answers; `threshold` (nats) below which an answer is flagged, or the `reason` why there is none; and the job
    of the `evaluation` that they come from, None where nothing was measured."""

    auroc: float | None
    threshold: float | None
    reason: str | None
    evaluation: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def later(session: Session, name: str, numbers: Sequence[int]) -> dict[int, tuple[str | None, dict[str, Any] | None]]:
    """Of these versions the evaluation since they were made that counts: its job and its metrics, None where there is none."""
    rows = session.execute(_OF, {"name": name, "numbers": numbers})
    return {row.version: (row.evaluated_by, row.evaluated) for row in rows}


def flag(version: Any, job_id: str | None, metrics: dict[str, Any] | None) -> Flag:
    """What is known of a version's score from its own numbers and those of the later evaluation that counts (`later`).

    No threshold where the evaluations scored with another dropout ratio than the engine does: the two scores are not one.
    """
    measured = [(job, m) for job, m in ((version.job_id, version.metrics), (job_id, metrics)) if m]
    measured.sort(
        key=lambda found: (_has(found[1], "threshold"), _has(found[1], "auroc"))
    )  # of equals the later stays last
    if not measured or not any(name.startswith(_PREFIX) for name in measured[-1][1]):
        return Flag(None, None, NEVER, None)
    evaluation, found = measured[-1]
    threshold, reason = found.get(_PREFIX + "threshold"), None
    ratio = version.config.get("preference", {}).get("dropout_ratio", PreferenceConfig.dropout_ratio)
    if ratio != PreferenceConfig.dropout_ratio:
        threshold = None
        reason = f"it was measured with preference.dropout_ratio {ratio}, and answers are scored with {PreferenceConfig.dropout_ratio}"
    elif threshold is None:
        reason = _reason(found)
    return Flag(found.get(_PREFIX + "auroc"), threshold, reason, evaluation)


def _has(metrics: dict[str, Any], name: str) -> bool:
    return metrics.get(_PREFIX + name) is not None


def _reason(metrics: dict[str, Any]) -> str:
    """In the words of the evaluation itself; one from before its numbers were kept tells none."""
    n, n_wrong, low = (metrics.get(f"{_PREFIX}calibration/{name}") for name in ("n", "n_wrong", "auroc_low"))
    if n is None or n_wrong is None:
        return UNTOLD
    return too_few(int(n), int(n_wrong)) or (says_nothing(low) if low is not None else None) or UNTOLD
