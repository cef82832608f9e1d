"""Promotion gates: what a gate asks for, and the decisions about an alias."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from service import adapters, gates, jobs
from service.models import Gate
from service.pages import AfterJob, Limit, Page, page
from service.routes.adapters import AliasName, Name
from service.routing import Router
from service.state import Service

router = Router(prefix="/adapters", tags=["adapters"])
Metric = Literal[
    "open/strict", "open/llava_med", "open/grounded_words", "closed/strict", "closed/llava_med",
    "caption/bleu", "caption/rouge_l",
]  # fmt: skip


Reason = Annotated[  # no NUL: PostgreSQL stores none, and a `promote` is written only when its job ends
    str | None, Field(max_length=500, pattern=r"^[^\x00]*$", description="Why; kept in the history.")
]


class GateRequest(BaseModel):
    """Move only where an evaluation of candidate and champion on `dataset` allows it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dataset: Annotated[str, StringConstraints(max_length=40)] = Field(description="Id of the data set to decide on.")
    metric: Metric = Field(description="Its paired difference decides, with the real image.")
    rule: Literal["better", "not_worse"] = Field(
        "better",
        description="Where the whole 95 % interval of candidate − champion must lie: above 0, or above −tolerance.",
    )
    tolerance: float = Field(
        0.02, ge=0, le=1, allow_inf_nan=False, description="For `not_worse`, in units of the score."
    )
    min_questions: int = Field(30, ge=2, le=1_000_000, description="On fewer nothing is decided in its favour.")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="As in POST /evaluate.")

    def stated(self) -> gates.Rule:
        return gates.Rule(self.metric, self.rule, self.tolerance, self.min_questions)


class GateView(BaseModel):
    job_id: str
    alias: str
    candidate: int
    champion: int | None = Field(
        description="The version it would replace; null: the base, for the alias pointed nowhere."
    )
    dataset_id: str
    rule: dict[str, Any]
    decision: Literal["pending", "moved", "refused", "overtaken"]
    interval: dict[str, float] | None = Field(description="Of candidate − champion in the rule's metric.")
    finding: str | None
    reason: str | None
    actor: str
    job_status: str = Field(description="A gate stays pending where its job failed or was cancelled.")
    created_at: datetime
    decided_at: datetime | None


@router.get("/{name}/aliases/{alias}/gates", summary="What was decided about an alias, oldest first")
def index(state: Service, name: Name, alias: AliasName, limit: Limit = 50, after: AfterJob = None) -> Page[GateView]:
    with state.database.read() as session:
        adapters.get(session, name)
        rows = gates.of_alias(session, name, alias, after or "", limit + 1)
        statuses = jobs.statuses(session, [row.job_id for row in rows])
        return Page(**page(rows, limit, lambda row: gate_view(row, statuses[row.job_id]), lambda row: row.job_id))


def gate_view(gate: Gate, job_status: str) -> GateView:
    fields = {name: getattr(gate, name) for name in GateView.model_fields if name != "job_status"}
    return GateView(**fields, job_status=job_status)
