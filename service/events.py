"""The events of a run as the service stores them: a typed, bounded reading of the run's JSON lines.

Only known types with known fields pass, texts are cut and numbers must be finite, so that a run cannot put anything else into the database.
The run's side is hscr/events.py; it writes no question, answer or file name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

LINE_MAX_BYTES = 64 * 1024
STAGES = ("generating", "optimizing", "evaluating", "reporting", "publishing")

StageName = Literal["generating", "optimizing", "evaluating", "reporting", "publishing"]
Code = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./@\-]{1,80}$")]
Text = Annotated[str, BeforeValidator(lambda v: v[:500] if isinstance(v, str) else v)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Values = Annotated[dict[MetricName, Finite], Field(max_length=200)]
Count = Annotated[int, Field(ge=0, le=2**40)]


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class StageEvent(_Event):
    type: Literal["stage"] = "stage"
    stage: StageName
    status: Literal["started", "completed", "skipped"]


class ProgressEvent(_Event):
    type: Literal["progress"] = "progress"
    stage: StageName
    done: Count
    total: Count
    rate: Finite | None = None
    eta_s: Finite | None = None


class MetricsEvent(_Event):
    type: Literal["metrics"] = "metrics"
    stage: StageName
    step: Count
    values: Values


class CheckpointEvent(_Event):
    type: Literal["checkpoint"] = "checkpoint"
    stage: StageName
    step: Count
    digest: Digest


class PartEvent(_Event):
    type: Literal["part"] = "part"
    stage: StageName
    first: Count
    last: Count


class WarningEvent(_Event):
    type: Literal["warning"] = "warning"
    code: Code
    message: Text


class ResultEvent(_Event):
    type: Literal["result"] = "result"
    adapter: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\-]{1,64}$")] | None  # None: an evaluation
    digest: Digest
    metrics: Values = Field(default_factory=dict)


class ErrorEvent(_Event):
    type: Literal["error"] = "error"
    code: Code
    message: Text


RunEvent = (
    StageEvent | ProgressEvent | MetricsEvent | CheckpointEvent | PartEvent | WarningEvent | ResultEvent | ErrorEvent
)
_READER: TypeAdapter[RunEvent] = TypeAdapter(Annotated[RunEvent, Field(discriminator="type")])


def parse_run_event(line: bytes) -> RunEvent | None:
    """The event of one line of a run's output, or None where it is none."""
    if len(line) > LINE_MAX_BYTES:
        return None
    try:
        return _READER.validate_json(line)
    except ValidationError:
        return None


def water(event: RunEvent) -> int | None:
    """How far into the run an event lies, as one growing number: crashes are counted between points of progress."""
    if isinstance(event, StageEvent) and event.status != "started":
        return (STAGES.index(event.stage) + 1) * 2**44
    if isinstance(event, ProgressEvent):
        return STAGES.index(event.stage) * 2**44 + event.done
    return None
