"""POST /align: check everything that can be checked, write the job, answer 202. Nothing is published here; the relay does that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import Body, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy.orm import Session

from hscr.config import AlignConfig, preset
from service import adapters, audit, datasets, evaluations, job_requests, jobs, plans, promotion, webhooks
from service.adapters import NAME
from service.errors import Problem
from service.idempotency import once
from service.keys import Caller
from service.routes.datasets import RepeatsView
from service.routes.evaluate import Metadata, check_served, evaluation_config
from service.routes.gates import GateRequest, Reason
from service.routes.job_view import JobView, job_view
from service.routing import Router
from service.state import Service, State, Who

router = Router(tags=["align"])

EXAMPLES = {
    "plain": {
        "summary": "The recommended preset",
        "value": {"dataset": "ds_019ab2c4d5e6f708192a3b4c5d6e", "adapter": "brain-mri"},
    },
    "own values": {
        "summary": "Own values on top of a preset, evaluated on another data set",
        "value": {
            "dataset": "ds_019ab2c4d5e6f708192a3b4c5d6e",
            "adapter": "brain-mri",
            "preset": "recommended",
            "optimization": {"epochs": 3},
            "evaluation": {"dataset": "ds_019ab2c4d5e6f708192a3b4c5d6f", "max_records": 200},
            "seed": 1,
        },
    },
}


class PromoteRequest(BaseModel):
    """What becomes of the version: the alias is pointed at it, with a gate only where its evaluation allows it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    alias: Annotated[str, StringConstraints(pattern=NAME)] = "champion"
    reason: Reason = None
    gate: GateRequest | None = Field(None, description="As in PUT /adapters/{name}/aliases/{alias}.")


class AlignRequest(BaseModel):
    """`preference`, `optimization` and `evaluation` overlay the preset; `hscr.config` lists their fields and ranges."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dataset: Annotated[str, StringConstraints(max_length=40)] = Field(description="Id of the data set to align on.")
    adapter: Annotated[str, StringConstraints(pattern=NAME)] = Field(
        description="Name under which the version is published."
    )
    model: Annotated[str, StringConstraints(max_length=300)] | None = Field(
        None, description="The base model; must be the one this service serves."
    )
    parent: Annotated[str, StringConstraints(max_length=140)] | None = Field(
        None,
        description="Align on top of this version (name:version, name@alias or name): the policy starts as it, and the reference is it, "
        "frozen. Rank, scale and modules of the LoRA are its own.",
    )
    preset: Literal["recommended", "paper", "demo"] = "recommended"
    preference: dict[str, Any] = Field(default_factory=dict)
    optimization: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(
        default_factory=dict, description="Also takes `dataset`: the id of a data set to evaluate on."
    )
    seed: int | None = None
    deadline_s: float | None = Field(
        None, gt=0, le=30 * 86400, allow_inf_nan=False, description="Fail the job after this time."
    )
    review: bool = Field(
        False, description="Stop after generation, until somebody has looked and calls POST /jobs/{id}/approve."
    )
    webhook: Annotated[str, StringConstraints(max_length=webhooks.URL_MAX)] | None = Field(
        None,
        description="Told (signed, Standard Webhooks) when the job ends or awaits review. An operator allows its host.",
    )
    promote: PromoteRequest | None = Field(
        None, description="Once the version exists: point an alias at it, or let a gate decide. The last event tells."
    )
    metadata: Metadata = Field(default_factory=dict, max_length=32)


class StageView(BaseModel):
    stage: str
    units: int = Field(description="Records; answers for `evaluating`.")
    seconds: float
    bytes: int = Field(description="Peak, the weights in it.")


class PlanView(BaseModel):
    """What a run will take, estimated on the device of this replica; hscr/plan.py says what is not in it."""

    device: str
    dtype: str
    parameters: int
    weights_bytes: int
    prompt_tokens: float
    visual_tokens: float
    answer_tokens: float
    stages: list[StageView]
    seconds: float
    bytes: int
    available_bytes: int
    fits: bool
    settings: dict[str, Any] = Field(
        description="Changes of the configuration under which it would fit; empty if it does."
    )


class DryRun(BaseModel):
    """The checked configuration of a job that was not started, its counts, and the plan."""

    dry_run: Literal[True] = True
    records: int
    evaluation_records: int
    repeats: RepeatsView | None = Field(None, description="Of the data set, as its upload found them.")
    config: dict[str, Any]
    plan: PlanView


@router.post(
    "/align",
    status_code=202,
    summary="Start an align job",
    responses={200: {"model": DryRun, "description": "With dry_run: the plan; nothing is stored"}},
)
def align(
    state: Service,
    who: Who,
    response: Response,
    request: Annotated[AlignRequest, Body(openapi_examples=EXAMPLES)],
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    dry_run: Annotated[bool, Query(description="Only check everything and estimate time and memory.")] = False,
) -> Any:
    """202 means: the job is stored and will run. With an Idempotency-Key, sending the request again makes no second job."""
    if dry_run:
        response.status_code = 200
        return _planned(state, request)
    view, replayed = start(state, who, request, idempotency_key)
    response.headers["Location"] = f"/jobs/{view.id}"
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return view


def start(state: State, who: Caller, request: AlignRequest, idempotency_key: str | None) -> tuple[JobView, bool]:
    """Store the job, or find what the same request made before; the answer, and whether it is such a replay. Raises Problem."""
    checked, evaluation_dataset = _checks(state, request)

    def make(session: Session) -> tuple[str, dict[str, Any]]:
        values, source, promote = checked(session)
        job_requests.check_room(session, who.id, state.settings.key_waiting_max)
        job = jobs.create(
            session,
            dataset_id=request.dataset,
            evaluation_dataset_id=evaluation_dataset,
            adapter_name=request.adapter,
            model=state.settings.model_id,
            config=values,
            source=source,
            deadline_s=request.deadline_s,
            review=request.review,
            owner=who.id,
            webhook=request.webhook,
            meta=request.metadata,
            promote=promote,
        )
        told = {"parent": f"{source[0]}:{source[1]}"} if source else {}
        audit.record(session, who.id, "job.create", job.id, dataset=request.dataset, adapter=request.adapter, **told)
        return job.id, job_view(session, job).model_dump(mode="json")

    # Each key has its own Idempotency-Keys: nobody gets another one's answer, whatever they send.
    key = f"{who.id}:{idempotency_key}" if idempotency_key is not None else None
    body, replayed = once(state.database, state.in_flight, key, request.model_dump(mode="json"), make)
    return JobView.model_validate(body), replayed


Checked = tuple[dict[str, Any], tuple[str, int, str] | None, dict[str, Any] | None]


def _checks(state: State, request: AlignRequest) -> tuple[Callable[[Session], Checked], str | None]:
    """What must hold of a request: a function that looks into the database, and the evaluation's data set. Raises Problem."""
    config, evaluation_dataset = _configuration(request)
    if request.model not in (None, state.settings.model_id):
        raise Problem(
            "model_not_served", f"This service serves {state.settings.model_id}; leave `model` out or name it."
        )
    if request.webhook is not None:
        webhooks.check_url(request.webhook, state.settings)

    wish = _promotion(request.promote, config)

    def checked(session: Session) -> Checked:
        """The configuration, the version to align on top of, and what becomes of the new one."""
        data = datasets.usable(session, request.dataset, "dataset")
        tested = datasets.usable(session, evaluation_dataset, "evaluation.dataset") if evaluation_dataset else None
        values = config.to_dict()
        if tested is not None and config.evaluation.max_records:
            evaluations.check_unseen(session, tested, values, "evaluation.dataset", learning=data)
        if request.parent is None:
            return values, None, promotion.check(session, wish, request.dataset, None)
        found = adapters.resolve(session, request.parent)
        parent = adapters.get_version(session, found.name, found.version)
        check_served(state, parent)
        values["optimization"] |= adapters.lora_shape(parent)
        if tested is not None:
            evaluations.check_unseen(session, tested, values, "evaluation.dataset", version=parent)
        source = (parent.adapter_name, parent.version, parent.digest)
        return values, source, promotion.check(session, wish, request.dataset, parent)

    return checked, evaluation_dataset


def _planned(state: State, request: AlignRequest) -> DryRun:
    checked, evaluation_dataset = _checks(state, request)
    with state.database.read() as session:
        values, _, _ = checked(session)
        data = datasets.get(session, request.dataset)
        other = None if evaluation_dataset is None else datasets.get(session, evaluation_dataset)
        repeats = None if data.repeats is None else RepeatsView.model_validate(data.repeats)
        n, n_evaluated = data.n_records, other.n_records if other else 0
        stored = datasets.artifact(session, data.digest)
        tested = datasets.artifact(session, other.digest) if other else None
    with ExitStack() as stack:
        folder = stack.enter_context(state.artifacts.lent(stored))
        second = stack.enter_context(state.artifacts.lent(tested)) if tested else None
        expected = plans.estimate(state.settings, folder, second, values)
    plan = PlanView.model_validate(expected)
    return DryRun(records=n, evaluation_records=n_evaluated, repeats=repeats, config=values, plan=plan)


def _promotion(wish: PromoteRequest | None, config: AlignConfig) -> dict[str, Any] | None:
    """The wish as the job's row keeps it. Raises Problem."""
    if wish is None:
        return None
    gate = None
    if wish.gate is not None:
        asked = evaluation_config(config.to_dict(), wish.gate.evaluation, None)
        gate = {"dataset_id": wish.gate.dataset, "rule": asdict(wish.gate.stated()), "config": asked}
    return {"alias": wish.alias, "reason": wish.reason, "gate": gate}


def _configuration(request: AlignRequest) -> tuple[AlignConfig, str | None]:
    """The preset with the request's values on it, and the evaluation's data set. Raises Problem."""
    own = [name[:80] for name in request.optimization if name.startswith("lora_")]
    if request.parent is not None and own:
        raise Problem("invalid_config", f"optimization.{own[0]}: is the parent's; leave it out, or leave out `parent`")
    evaluation = dict(request.evaluation)
    dataset = evaluation.pop("dataset", None)
    if dataset is not None and not (isinstance(dataset, str) and len(dataset) <= 40):
        raise Problem("invalid_config", "evaluation.dataset: must be the id of a data set")
    values: dict[str, Any] = {
        "preference": request.preference,
        "optimization": request.optimization,
        "evaluation": evaluation,
    }
    if request.seed is not None:
        values["seed"] = request.seed
    try:
        return AlignConfig.from_dict(values, base=preset(request.preset)), dataset
    except ValueError as error:
        raise Problem("invalid_config", str(error)) from None
