"""/v1/fine_tuning/jobs: align jobs in OpenAI's shapes. Each route says in OpenAI's words what POST /align, /jobs and their requests do.

Methods are `hscr`, `dpo` and `supervised` (the objective `sft`), with OpenAI's four hyperparameters and the groups of POST /align; `model`
is the served base, or a version to align on top of. A file was checked when it came, so no job is ever `validating_files`.
"""

from __future__ import annotations

import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Text, cast, select
from sqlalchemy.orm import Session

from hscr.config import PRESETS, preset
from service import job_requests, jobs, openai_errors
from service.adapters import NAME, REFERENCE
from service.errors import Problem
from service.models import Job, JobEvent
from service.outlook import Outlook
from service.pages import After
from service.routes.align import AlignRequest, start
from service.routes.evaluate import Metadata
from service.routes.files import RESULTS
from service.routes.job_requests import ask
from service.routes.jobs import JobView, job_view
from service.state import Service, Who

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["openai"], responses=openai_errors.RESPONSES)
_ID = r"^[A-Za-z0-9_]+$"
JobId = Annotated[str, Path(max_length=40, pattern=_ID, examples=["job_019ab2c4d5e6f708192a3b4c5d6e"])]
Limit = Annotated[int, Query(ge=1, le=100)]
Auto = Literal["auto"] | None
DEFAULT_NAME = "fine-tuned"  # of the adapter, where neither a suffix nor a parent names it
_STATUS = {"awaiting_review": "paused"}  # all others are called the same
_METHODS = {"hscr": "hscr", "dpo": "dpo", "supervised": "sft"}  # -> objective
# OpenAI's hyperparameter -> ours; β of DPO is the reward's scale γ.
_NAMES = {"n_epochs": "epochs", "batch_size": "batch_size", "beta": "gamma", "learning_rate_multiplier": "lr"}
_CURSOR = re.compile(r"^ft(?:event|ckpt)_(job_[0-9a-f]{28})_([0-9]{1,15})$")
_EXAMPLE = {
    "training_file": "ds_019ab2c4d5e6f708192a3b4c5d6e",
    "model": "hscr-demo",
    "suffix": "ward-7",
    "method": {"type": "hscr", "hscr": {"hyperparameters": {"n_epochs": 3}}},
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(_Body):
    """OpenAI's (`auto`: the preset's value), and beside them the groups of POST /align."""

    n_epochs: int | Auto = None
    batch_size: int | Auto = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | Auto = Field(
        default=None, description="Times the preset's rate."
    )
    beta: float | Auto = None
    preset: Annotated[str, StringConstraints(max_length=40)] = "recommended"
    preference: dict[str, Any] = Field(default_factory=dict)
    optimization: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)


class _Given(_Body):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(_Body):
    type: Literal["hscr", "dpo", "supervised", "reinforcement"]
    hscr: _Given | None = None
    dpo: _Given | None = None
    supervised: _Given | None = None
    reinforcement: dict[str, Any] | None = None


class FineTuningRequest(_Body):
    training_file: Annotated[str, StringConstraints(max_length=40, pattern=_ID)]
    model: Annotated[str, StringConstraints(max_length=300)] = Field(
        description="The served base, or name:version of it to go on from."
    )
    validation_file: Annotated[str, StringConstraints(max_length=40, pattern=_ID)] | None = None
    suffix: Annotated[str, StringConstraints(pattern=NAME)] | None = Field(None, description="The adapter's name.")
    seed: int | None = None
    method: Method | None = Field(None, description="`hscr` where it is left out.")
    hyperparameters: Hyperparameters | None = Field(None, description="OpenAI's older place of them.")
    metadata: Metadata | None = Field(None, max_length=32)
    integrations: list[Any] | None = None


class FineTuningError(BaseModel):
    code: str
    message: str
    param: str | None = None


class FineTuningJob(BaseModel):
    """OpenAI's job. `paused` is also a job that awaits review; POST /jobs/{id}/approve lets it go on."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    error: FineTuningError | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    trained_tokens: int | None = Field(default=None, description="Not counted here.")
    seed: int
    metadata: dict[str, Any]
    integrations: list[Any] = []


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class Checkpoint(BaseModel):
    """A point that a job goes on from when it is resumed or retried; its model cannot be asked."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Checkpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None


@router.post("", summary="Start an align job (OpenAI)")
def create(
    state: Service,
    who: Who,
    response: Response,
    request: Annotated[FineTuningRequest, Body(openapi_examples={"hscr": {"value": _EXAMPLE}})],
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> FineTuningJob:
    """As POST /align: the job is stored when this answers, and with an Idempotency-Key one request makes one job."""
    wanted = _align_request(request, state.settings.model_id)
    try:
        view, replayed = start(state, who, wanted, idempotency_key)
    except Problem as refusal:
        raise _in_their_words(refusal, state.settings.model_id) from None
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return _job(view)


@router.get("", summary="Align jobs, newest first (OpenAI)")
def index(state: Service, request: Request, limit: Limit = 20, after: After = None) -> JobList:
    """`metadata[key]=value` keeps those that carry it, `metadata=null` those that carry none."""
    query = select(Job).where(Job.kind == "align", Job.deleted_at.is_(None)).order_by(Job.id.desc()).limit(limit + 1)
    query = query.where(Job.id < after) if after else query
    for name, value in list(request.query_params.multi_items())[:20]:
        if name == "metadata" and value == "null":
            query = query.where(cast(Job.meta, Text) == "{}")
        elif name.startswith("metadata"):
            query = query.where(Job.meta[_key(name, value)].as_string() == value)
    with state.database.read() as session:
        rows, outlook = session.scalars(query).all(), Outlook(session)
        shown = [_job(job_view(session, row, outlook)) for row in rows[:limit]]
    return JobList(data=shown, has_more=len(rows) > limit)


@router.get("/{job_id}", summary="One align job (OpenAI)")
def show(state: Service, job_id: JobId) -> FineTuningJob:
    with state.database.read() as session:
        return _job(job_view(session, _get(session, job_id)))


@router.get("/{job_id}/events", summary="What happened, newest first (OpenAI)")
def events(state: Service, job_id: JobId, limit: Limit = 20, after: After = None) -> EventList:
    with state.database.read() as session:
        rows = _newest(session, _get(session, job_id), after, limit + 1)
    return EventList(data=[_event(row) for row in rows[:limit]], has_more=len(rows) > limit)


@router.get("/{job_id}/checkpoints", summary="Its checkpoints, newest first (OpenAI)")
def checkpoints(state: Service, job_id: JobId, limit: Limit = 10, after: After = None) -> CheckpointList:
    with state.database.read() as session:
        job = _get(session, job_id)
        rows = _newest(session, job, after, limit + 1, "checkpoint")
        data = [_checkpoint(session, job, row) for row in rows[:limit]]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return CheckpointList(data=data, has_more=len(rows) > limit, first_id=ends[0], last_id=ends[1])


@router.post("/{job_id}/cancel", summary="Cancel (OpenAI)")
def cancel(state: Service, who: Who, job_id: JobId) -> FineTuningJob:
    """A waiting job is cancelled at once, a running one within seconds: until then its status is the old one."""
    return _job(ask(state, who, job_id, "job.cancel", _theirs(job_requests.cancel)))


@router.post("/{job_id}/pause", summary="Pause (OpenAI)")
def pause(state: Service, who: Who, job_id: JobId) -> FineTuningJob:
    return _job(ask(state, who, job_id, "job.pause", _theirs(job_requests.pause)))


@router.post("/{job_id}/resume", summary="Resume a paused job (OpenAI)")
def resume(state: Service, who: Who, job_id: JobId) -> FineTuningJob:
    return _job(ask(state, who, job_id, "job.resume", _theirs(job_requests.resume)))


def _key(name: str, value: str) -> str:
    """The key of `metadata[key]`; quotes and the like are part of a path's grammar in the database. Raises Problem."""
    found = re.fullmatch(r"metadata\[([\w.\- :/@]{1,64})\]", name)
    if found is None or "\0" in value:
        detail = "Write metadata[key]=value, with a key of letters, digits and . - _ : / @, or metadata=null."
        raise Problem("invalid_request", detail, param="metadata")
    return found[1]


def _get(session: Session, job_id: str) -> Job:
    """An align job that is not deleted. Raises Problem."""
    job = jobs.get(session, job_id)
    if job.kind != "align" or job.deleted_at is not None:
        raise Problem("job_not_found", "No fine-tuning job has this id.")
    return job


def _theirs(wish: Any) -> Any:
    """A wish that is carried out on align jobs only."""

    def checked(session: Session, job_id: str) -> Job:
        _get(session, job_id)
        return wish(session, job_id)

    return checked


def _align_request(request: FineTuningRequest, base: str) -> AlignRequest:
    """The POST /align that means the same. Raises Problem."""
    method = request.method or Method(
        type="hscr", hscr=_Given(hyperparameters=request.hyperparameters or Hyperparameters())
    )
    if method.type == "reinforcement":
        detail = "Methods here are hscr, dpo and supervised; graders are not run."
        raise Problem("method_not_supported", detail, param="method.type")
    others = [
        name for name in (*_METHODS, "reinforcement") if name != method.type and getattr(method, name) is not None
    ]
    if others or (request.method is not None and request.hyperparameters is not None):
        field = f"method.{others[0]}" if others else "hyperparameters"
        raise Problem("invalid_request", f"Put the hyperparameters into method.{method.type}.", param=field)
    if request.integrations:
        raise Problem("invalid_request", "Nothing is sent to other services.", param="integrations")
    own = (getattr(method, method.type) or _Given()).hyperparameters
    parent = None if request.model == base else request.model
    if parent is not None and not REFERENCE.match(parent):
        raise _not_a_base(base)
    evaluation = own.evaluation | ({"dataset": request.validation_file} if request.validation_file else {})
    return AlignRequest.model_validate(
        {
            "dataset": request.training_file,
            "adapter": request.suffix or (re.split("[:@]", parent)[0] if parent else DEFAULT_NAME),
            "parent": parent,
            "preset": own.preset,
            "preference": own.preference,
            "optimization": _optimization(own, _METHODS[method.type]),
            "evaluation": evaluation,
            "seed": request.seed,
            "metadata": request.metadata or {},
        }
    )


def _optimization(own: Hyperparameters, objective: str) -> dict[str, Any]:
    """POST /align's group of that name. Raises Problem."""
    if own.preset not in PRESETS:
        raise Problem("invalid_config", f"preset: must be one of {', '.join(PRESETS)}", param="preset")
    values: dict[str, Any] = {"objective": objective}
    for theirs, ours in _NAMES.items():
        given = getattr(own, theirs)
        if given is None or given == "auto":
            continue
        if ours in own.optimization:
            raise Problem("invalid_config", f"{theirs}: is optimization.{ours}; give one of them", param=theirs)
        values[ours] = given * preset(own.preset).optimization.lr if theirs == "learning_rate_multiplier" else given
    if own.optimization.get("objective", objective) != objective and objective != "hscr":
        raise Problem("invalid_config", "optimization.objective: is the method's", param="optimization.objective")
    return values | own.optimization


def _in_their_words(refusal: Problem, base: str) -> Problem:
    """A refusal of POST /align with the names of this route's fields."""
    if refusal.code in ("adapter_not_found", "version_not_found", "alias_not_found"):
        return _not_a_base(base)
    param = {"dataset_not_found": "training_file", "dataset_empty": "training_file"}.get(refusal.code)
    return Problem(refusal.code, refusal.detail, headers=refusal.headers, **({"param": param} | refusal.extra))


def _not_a_base(base: str) -> Problem:
    return Problem("model_not_served", f"Fine-tuned is {base}, or name:version of an adapter of it.", param="model")


def _job(view: JobView) -> FineTuningJob:
    settings = view.config["optimization"]
    method = next((m for m, objective in _METHODS.items() if objective == settings["objective"]), "hscr")
    told = {"n_epochs": settings["epochs"], "batch_size": settings["batch_size"]}
    own = told | {"beta": settings["gamma"], "optimization": settings, "preference": view.config["preference"]}
    made, source, tested = view.lineage.adapter, view.lineage.source, view.lineage.evaluation_dataset
    return FineTuningJob(
        id=view.id,
        created_at=int(view.created_at.timestamp()),
        finished_at=int(view.finished_at.timestamp()) if view.finished_at else None,
        estimated_finish=int(time.time() + view.remaining_s) if view.remaining_s is not None else None,
        model=f"{source.name}:{source.version}" if source else view.model,
        fine_tuned_model=f"{made.name}:{made.version}" if made else None,
        organization_id=view.owner,
        status=_STATUS.get(view.status, view.status),  # type: ignore[arg-type]
        error=FineTuningError(code=view.error.code, message=view.error.message) if view.error else None,
        training_file=view.lineage.dataset.id,
        validation_file=tested.id if tested else None,
        result_files=[RESULTS + view.id] if view.report_url else [],
        hyperparameters=told,
        method={"type": method, method: {"hyperparameters": own}},
        seed=view.config["seed"],
        metadata=view.metadata,
    )


def _newest(session: Session, job: Job, after: str | None, limit: int, kind: str | None = None) -> list[JobEvent]:
    """Events before the one that `after` names, newest first. Raises Problem."""
    query = select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.seq.desc()).limit(limit)
    if kind is not None:
        query = query.where(JobEvent.type == kind)
    if after is not None:
        cursor = _CURSOR.match(after)
        if cursor is None or cursor[1] != job.id:
            raise Problem("invalid_request", "after: must be the id of the last row of the page before.", param="after")
        query = query.where(JobEvent.seq < int(cursor[2]))
    return list(session.scalars(query))


def _event(row: JobEvent) -> FineTuningEvent:
    level, message = _words(row)
    return FineTuningEvent(
        id=f"ftevent_{row.job_id}_{row.seq}",
        created_at=int(row.created_at.timestamp()),
        level=level,
        message=message,
        type="metrics" if row.type == "metrics" else "message",
        data=_metrics(row) if row.type == "metrics" else row.data,
    )


def _words(row: JobEvent) -> tuple[Literal["info", "warn", "error"], str]:
    data = row.data
    match row.type:
        case "status":
            error = data.get("error")
            told = f": {error['message']}" if error else ""
            return ("error" if error else "info"), f"The job is {data['status'].replace('_', ' ')}{told}"
        case "stage":
            return "info", f"{data['stage']}: {data['status']}"
        case "progress":
            return "info", f"{data['stage']}: {data['done']} of {data['total']}"
        case "metrics":
            return "info", f"{data['stage']}: metrics of step {data['step']}"
        case "checkpoint":
            return "info", f"{data['stage']}: checkpoint after step {data['step']}"
        case "warning":
            return "warn", data["message"]
        case "error":
            return "error", data["message"]
        case other:
            return "info", other.replace("_", " ")


def _metrics(row: JobEvent) -> dict[str, Any]:
    """OpenAI's names beside ours."""
    values = row.data.get("values", {})
    loss = {"train_loss": values["loss"]} if "loss" in values else {}
    return {"step": row.data["step"], **loss, **values}


def _checkpoint(session: Session, job: Job, row: JobEvent) -> Checkpoint:
    step = row.data["step"]
    query = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.type == "metrics", JobEvent.seq < row.seq)
    said = session.scalar(query.order_by(JobEvent.seq.desc()).limit(1))
    same = said is not None and said.data["stage"] == row.data["stage"]
    return Checkpoint(
        id=f"ftckpt_{job.id}_{row.seq}",
        created_at=int(row.created_at.timestamp()),
        fine_tuned_model_checkpoint=f"{job.adapter_name}:checkpoint-{step}",
        fine_tuning_job_id=job.id,
        step_number=step,
        metrics=_metrics(said) if same and said is not None else {"step": step},
    )
