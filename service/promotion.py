"""What `promote` of POST /align asks for: once the job's version exists an alias is pointed at it, or a gate decides about it.

In the transaction that publishes. A wish that cannot be carried out any more (the gate's data set is gone, the alias stands at these very
weights) does not cost the version: the job's last event says why. No torch and no web framework here.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from service import adapters, aliases, datasets, evaluations, gates, jobs
from service.db import Database
from service.errors import Problem
from service.look import Look
from service.models import AdapterVersion, Gate, Job


def check(
    session: Session, wish: dict[str, Any] | None, learnt: str, parent: AdapterVersion | None
) -> dict[str, Any] | None:
    """The wish of a job that will learn from the data set `learnt`, on top of `parent`: what a gate would refuse later. Raises Problem."""
    if wish is None or wish["gate"] is None:
        return wish
    field = "promote.gate.dataset"
    tested, learning = datasets.usable(session, wish["gate"]["dataset_id"], field), datasets.get(session, learnt)
    evaluations.check_unseen(session, tested, wish["gate"]["config"], field, version=parent, learning=learning)
    return wish


def publish(session: Session, mine: jobs.Claim, **made: Any) -> AdapterVersion:
    """Publish a job's version, and carry out what was asked for then. Raises jobs.Superseded."""
    wish = session.get_one(Job, mine.job_id).promote
    if wish is not None and wish["gate"] is not None:  # before the audit's head is held, as who deletes a data set does
        with suppress(Problem):  # gone: told below
            datasets.get(session, wish["gate"]["dataset_id"], hold=True)
    return adapters.publish(session, mine, then=_promoted, **made)


def _promoted(session: Session, job: Job, version: AdapterVersion) -> dict[str, Any]:
    """What the job's last event says of it. What raises Problem in here has written nothing yet."""
    if job.promote is None:
        return {}
    try:
        done = _carry_out(session, job, version, job.promote)
    except Problem as problem:
        done = {"decision": "impossible", "code": problem.code, "message": problem.detail}
    return {"promotion": {"alias": job.promote["alias"], **done}}


def _carry_out(session: Session, job: Job, version: AdapterVersion, wish: dict[str, Any]) -> dict[str, Any]:
    name, alias, gate = version.adapter_name, wish["alias"], wish["gate"]
    if gate is None:
        aliases.move(session, job.owner, name, alias, version.version, wish["reason"])
        return {"decision": "moved"}
    gates.check_not_there(session, name, alias, version.version)
    asked = gates.ask(
        session,
        job.owner,
        name,
        alias,
        version.version,
        dataset_id=gate["dataset_id"],
        rule=gates.Rule(**gate["rule"]),
        config=gate["config"],
        reason=wish["reason"],
    )
    return {"decision": "pending", "job_id": asked.job_id}


class GateNow(NamedTuple):
    """`pending` for ever where its evaluation failed or was cancelled: the job's status tells."""

    decision: str
    job_status: str


_G, _J = Gate.__table__.c, Job.__table__.c
_NOW = Look(
    select(_G.decision, _J.status)
    .select_from(Gate.__table__.join(Job.__table__, _J.id == _G.job_id))
    .where(_G.job_id == bindparam("job_id"))
)


def gate_of(database: Database, told: dict[str, Any]) -> GateNow | None:
    """How the gate stands that a job's last event told of; None where it told of none."""
    job_id = told.get("job_id")
    rows = _NOW.rows(database, job_id=job_id) if job_id is not None else []
    return GateNow(*map(str, rows[0])) if rows else None
