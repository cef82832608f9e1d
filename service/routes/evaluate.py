"""POST /evaluate: a version on a data set, as a job; and what a version's evaluations measured."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import Body, Header, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy.orm import Session

from hscr.config import AlignConfig
from service import adapters, evaluations, job_requests, webhooks
from service.errors import Problem
from service.idempotency import once
from service.models import AdapterVersion
from service.pages import AfterJob, Limit, Page, page
from service.routes.adapters import Name, Number
from service.routes.job_view import JobView, job_view
from service.routing import Router
from service.state import Service, State, Who

router = Router(tags=["evaluate"])
_WORD = r"^[^\x00]*$"  # PostgreSQL reads no JSON text with a NUL
Metadata = dict[
    Annotated[str, StringConstraints(max_length=64, pattern=_WORD)],
    Annotated[str, StringConstraints(max_length=512, pattern=_WORD)],
]

EXAMPLE: dict[str, Any] = {
    "dataset": "ds_019ab2c4d5e6f708192a3b4c5d6f",
    "adapter": "brain-mri:3",
    "evaluation": {"max_records": 200},
}


class EvaluateRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE]})

    dataset: Annotated[str, StringConstraints(max_length=40)] = Field(description="Id of the data set to evaluate on.")
    adapter: Annotated[str, StringConstraints(max_length=140)] = Field(
        description="The version: name:version, name@alias or name. The base model is evaluated beside it."
    )
    evaluation: dict[str, Any] = Field(
        default_factory=dict, description="Fields of `evaluation` as in POST /align; `hscr.config` lists them."
    )
    seed: int | None = None
    deadline_s: float | None = Field(
        None, gt=0, le=30 * 86400, allow_inf_nan=False, description="Fail the job after this time."
    )
    webhook: Annotated[str, StringConstraints(max_length=webhooks.URL_MAX)] | None = None
    metadata: Metadata = Field(default_factory=dict, max_length=32)


class EvaluationView(BaseModel):
    job_id: str
    name: str
    version: int
    digest: str = Field(description="Of the version's weights.")
    before_version: int | None = Field(
        description="The version that it was compared with, where a gate asked for that."
    )
    dataset_id: str
    dataset_digest: str
    result_digest: str = Field(description="Of evaluation.json, with all tables.")
    metrics: dict[str, float]
    report_url: str
    created_at: datetime


@router.post("/evaluate", status_code=202, summary="Evaluate a version on a data set")
def evaluate(
    state: Service,
    who: Who,
    response: Response,
    request: Annotated[EvaluateRequest, Body()],
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> JobView:
    """202 means: the job is stored and will run. The reference is resolved now: the alias may move meanwhile."""
    if request.webhook is not None:
        webhooks.check_url(request.webhook, state.settings)

    def make(session: Session) -> tuple[str, dict[str, Any]]:
        found = adapters.resolve(session, request.adapter)
        version = adapters.get_version(session, found.name, found.version)
        check_served(state, version)
        config = evaluation_config(version.config, request.evaluation, request.seed)
        job_requests.check_room(session, who.id, state.settings.key_waiting_max)
        more: dict[str, Any] = {"deadline_s": request.deadline_s, "webhook": request.webhook, "meta": request.metadata}
        job = evaluations.ask(session, version, request.dataset, config, owner=who.id, **more)
        return job.id, job_view(session, job).model_dump(mode="json")

    key = f"{who.id}:{idempotency_key}" if idempotency_key is not None else None
    sent = {"evaluate": request.model_dump(mode="json")}  # not the body of a POST /align, whatever its fields
    body, replayed = once(state.database, state.in_flight, key, sent, make)
    response.headers["Location"] = f"/jobs/{body['id']}"
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return JobView.model_validate(body)


@router.get("/adapters/{name}/versions/{version}/evaluations", summary="What was measured of a version, oldest first")
def index(
    state: Service, name: Name, version: Number, limit: Limit = 50, after: AfterJob = None
) -> Page[EvaluationView]:
    with state.database.read() as session:
        adapters.get_version(session, name, version)
        rows = evaluations.of_version(session, name, version, after or "", limit + 1)
    return Page(**page(rows, limit, _view, lambda row: row.job_id))


def check_served(state: State, version: AdapterVersion) -> None:
    if version.model != state.settings.model_id:
        detail = f"The version is for {version.model}; this service serves {state.settings.model_id}."
        raise Problem("adapter_for_other_model", detail)


def evaluation_config(aligned: dict[str, Any], values: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """The preference settings of a version's own configuration (the grounding score's masks) with the evaluation asked for.

    Raises Problem.
    """
    asked: dict[str, Any] = {"preference": aligned.get("preference", {}), "evaluation": values}
    if seed is not None:
        asked["seed"] = seed
    try:
        config = AlignConfig.from_dict(asked)
    except ValueError as error:
        raise Problem("invalid_config", str(error)) from None
    if config.evaluation.max_records == 0:
        raise Problem("invalid_config", "evaluation.max_records: is 0, so there is nothing to evaluate")
    return config.to_dict()


def _view(row: Any) -> EvaluationView:
    return EvaluationView(
        job_id=row.job_id,
        name=row.adapter_name,
        version=row.version,
        digest=row.digest,
        before_version=row.before_version,
        dataset_id=row.dataset_id,
        dataset_digest=row.dataset_digest,
        result_digest=row.result_digest,
        metrics=row.metrics,
        report_url=f"/jobs/{row.job_id}/report",
        created_at=row.created_at,
    )
