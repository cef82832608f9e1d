"""Align jobs, their events and their checkpoints as OpenAI shows them. Knows no route and no query."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, Field

from service.models import Job, JobEvent
from service.routes.files import RESULTS
from service.routes.fine_tuning_request import METHODS
from service.routes.job_view import JobView

_STATUS = {"awaiting_review": "paused"}  # all others are called the same


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


def tuning_view(view: JobView) -> FineTuningJob:
    settings = view.config["optimization"]
    method = next((m for m, objective in METHODS.items() if objective == settings["objective"]), "hscr")
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


def event_view(row: JobEvent) -> FineTuningEvent:
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
        case "part":
            return "info", f"{data['stage']}: {data['first']} to {data['last']} were made by another worker"
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


def checkpoint_view(job: Job, row: JobEvent, said: JobEvent | None) -> Checkpoint:
    """`said`: the last metrics before it, which are its own where they are of the same stage."""
    step = row.data["step"]
    return Checkpoint(
        id=f"ftckpt_{job.id}_{row.seq}",
        created_at=int(row.created_at.timestamp()),
        fine_tuned_model_checkpoint=f"{job.adapter_name}:checkpoint-{step}",
        fine_tuning_job_id=job.id,
        step_number=step,
        metrics=_metrics(said) if said is not None and said.data["stage"] == row.data["stage"] else {"step": step},
    )
