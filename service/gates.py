"""Promotion gates: an alias moves to a candidate only where a job's evaluation allows it by a stated rule.

The candidate is compared, question by question, with the version that the alias points at (the champion; without one with the base). The
job's end and the decision are one transaction; an alias that moved meanwhile is left alone, for the comparison was with another version.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import adapters, aliases, audit, datasets, evaluations, jobs
from service.db import now
from service.errors import Problem
from service.models import AdapterVersion, Alias, Evaluation, Gate, Job


@dataclass(frozen=True)
class Rule:
    """`better`: the interval (95 %) of candidate − champion in `metric` lies above 0; `not_worse`: above −`tolerance`. On enough data."""

    metric: str
    rule: str = "better"
    tolerance: float = 0.02
    min_questions: int = 30


def judge(rule: Rule, interval: dict[str, float] | None) -> tuple[bool, str]:
    """Whether the rule lets the candidate pass, and why in one sentence."""
    if interval is None:
        return False, f"the data set has no question that {rule.metric} scores"
    seen = f"{rule.metric} {interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}] over {interval['n']:.0f} questions"
    if interval["n"] < rule.min_questions:
        return False, f"{seen}; the rule asks for {rule.min_questions} questions at least"
    if rule.rule == "better":
        return interval["low"] > 0, f"{seen}; the rule asks for an interval above 0"
    return interval["low"] > -rule.tolerance, f"{seen}; the rule asks for an interval above {-rule.tolerance:+.4f}"


def ask(
    session: Session,
    by: str,
    name: str,
    alias: str,
    number: int,
    *,
    dataset_id: str,
    rule: Rule,
    config: dict[str, Any],
    reason: str | None,
) -> Gate:
    """A queued evaluation that will move the alias or not; the one under way where the very same was asked before. Raises Problem."""
    row = aliases.locked(session, name, alias)
    candidate = adapters.get_version(session, name, number)
    champion = adapters.get_version(session, name, row.version) if row else None
    wish = {
        "candidate": number,
        "champion": row.version if row else None,
        "dataset_id": dataset_id,
        "rule": asdict(rule),
    }
    for gate in session.scalars(select(Gate).join(Job).where(*_open(name, alias))):
        if {field: getattr(gate, field) for field in wish} == wish and session.get_one(
            Job, gate.job_id
        ).config == config:
            return gate
    field = "gate.dataset"
    dataset = datasets.usable(session, dataset_id, field)
    if champion is not None:
        evaluations.check_unseen(session, dataset, config, field, version=champion)
    job = evaluations.ask(session, candidate, dataset_id, config, owner=by, field=field)
    gate = Gate(job_id=job.id, adapter_name=name, alias=alias, reason=reason, actor=by, **wish)
    session.add(gate)
    session.flush()
    told = {"candidate": number, "champion": gate.champion, "job": job.id}
    audit.record(session, by, "gate.ask", f"{name}@{alias}", **told)
    return gate


def publish(session: Session, mine: jobs.Claim, **made: Any) -> Evaluation:
    """Keep what an evaluation job measured, and decide where a gate waits for it. Raises jobs.Superseded."""
    measured = evaluations.publish(session, mine, **made)
    gate = session.get(Gate, mine.job_id, with_for_update=True)
    if gate is not None:
        measured.before_version = gate.champion
        _decide(session, gate, measured.metrics)
    return measured


def before(session: Session, job_id: str) -> AdapterVersion | None:
    """The version that a job's candidate is compared with, besides the base."""
    gate = session.get(Gate, job_id)
    if gate is None or gate.champion is None:
        return None
    return adapters.get_version(session, gate.adapter_name, gate.champion)


def of_alias(session: Session, name: str, alias: str, after: str, limit: int) -> list[Gate]:
    """An alias's gates, oldest first."""
    query = select(Gate).where(Gate.adapter_name == name, Gate.alias == alias, Gate.job_id > after)
    return list(session.scalars(query.order_by(Gate.job_id).limit(limit)))


def _decide(session: Session, gate: Gate, metrics: dict[str, Any]) -> None:
    row = aliases.locked(session, gate.adapter_name, gate.alias)
    rule = Rule(**gate.rule)
    gate.interval = _interval(metrics, "gain" if gate.champion is None else "gain_over_before", rule.metric)
    passed, gate.finding = judge(rule, gate.interval)
    if passed and _points_at(row) != gate.champion:
        gate.decision = "overtaken"
        gate.finding += "; the alias was moved meanwhile, so it was not compared with the version that stands now"
    else:
        gate.decision = "moved" if passed else "refused"
    gate.decided_at = now()
    session.flush()
    told = {"job": gate.job_id, "decision": gate.decision, "candidate": gate.candidate, "champion": gate.champion}
    audit.record(session, "worker", "gate.decide", f"{gate.adapter_name}@{gate.alias}", **told, interval=gate.interval)
    if gate.decision == "moved":
        aliases.move(
            session, gate.actor, gate.adapter_name, gate.alias, gate.candidate, gate.reason, gate_job_id=gate.job_id
        )


def _interval(metrics: dict[str, Any], over: str, metric: str) -> dict[str, float] | None:
    names = ("mean", "low", "high", "n")
    found = {name: metrics.get(f"{over}/{metric}/{name}") for name in names}
    return None if None in found.values() else found  # type: ignore[return-value]


def _points_at(row: Alias | None) -> int | None:
    return row.version if row else None


def _open(name: str, alias: str) -> tuple[Any, ...]:
    return Gate.adapter_name == name, Gate.alias == alias, Gate.decision == "pending", Job.status.not_in(jobs.ENDED)


def check_not_there(session: Session, name: str, alias: str, number: int) -> Alias | None:
    """The alias where it points at the version already, so that there is nothing to decide. Raises Problem."""
    row = aliases.locked(session, name, alias)
    if adapters.get_version(session, name, number).digest == _digest(session, row):
        if row is not None and row.version == number:
            return row
        raise Problem("gate_same_weights", "The alias points at these very weights already, under another number.")
    return None


def _digest(session: Session, row: Alias | None) -> str | None:
    return adapters.get_version(session, row.adapter_name, row.version).digest if row else None
