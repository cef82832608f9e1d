"""Evaluations of versions: the job that makes one, and what it leaves. No torch and no web framework here."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import adapters, audit, datasets, jobs, lineage
from service.errors import Problem
from service.models import AdapterVersion, Dataset, Evaluation, Job

KIND = "evaluate"


def ask(
    session: Session,
    version: AdapterVersion,
    dataset_id: str,
    config: dict[str, Any],
    *,
    owner: str,
    field: str = "dataset",
    **values: Any,
) -> Job:
    """A queued evaluation of a version on a data set, which the request named in `field`. Raises Problem."""
    dataset = datasets.usable(session, dataset_id, field)
    check_unseen(session, dataset, config, field, version=version)
    source = (version.adapter_name, version.version, version.digest)
    job = jobs.create(
        session,
        kind=KIND,
        source=source,
        dataset_id=dataset.id,
        evaluation_dataset_id=dataset.id,
        adapter_name=version.adapter_name,
        model=version.model,
        config=config,
        owner=owner,
        **values,
    )
    subject = {"adapter": f"{version.adapter_name}:{version.version}", "dataset": dataset.id}
    audit.record(session, owner, "job.create", job.id, evaluates=subject["adapter"], dataset=subject["dataset"])
    return job


def check_unseen(
    session: Session,
    tested: Dataset,
    config: dict[str, Any],
    field: str,
    *,
    version: AdapterVersion | None = None,
    learning: Dataset | None = None,
) -> None:
    """Refuse a data set that the version, or one below it, was aligned on, or that the job at hand will be (`learning`).

    By digest, at once; the run looks at the pictures too. `field` named the data set. Raises Problem.
    """
    if config["evaluation"]["allow_leak"]:
        return
    if learning is not None and tested.digest == learning.digest:
        who = "The job aligns"
    elif version is not None and tested.digest in lineage.learnt_from(session, version):
        who = f"{version.adapter_name}:{version.version} was aligned"
    else:
        return
    detail = (
        f"{who} on the very data set that `{field}` names. Take other data, or say evaluation.allow_leak: true there."
    )
    raise Problem("leak", detail, param=field)


def publish(
    session: Session,
    mine: jobs.Claim,
    *,
    digest: str,
    metrics: dict[str, Any],
    result: dict[str, Any],
    report: str | None,
) -> Evaluation:
    """In one transaction: the job succeeds, what it measured is kept, its last event says so. Raises jobs.Superseded."""
    seq = jobs.succeed(session, mine, metrics=metrics, report=report, stage="publishing")
    job = session.get_one(Job, mine.job_id, populate_existing=True)
    assert job.source_name is not None
    assert job.source_version is not None
    version = adapters.get_version(session, job.source_name, job.source_version)
    made = Evaluation(
        job_id=job.id,
        adapter_name=version.adapter_name,
        version=version.version,
        digest=version.digest,
        dataset_id=job.dataset_id,
        dataset_digest=session.get_one(Dataset, job.dataset_id).digest,
        result_digest=digest,
        metrics=result,
    )
    session.add(made)
    session.flush()
    what = {"name": version.adapter_name, "version": version.version, "digest": version.digest}
    jobs.add_event(session, job.id, seq, mine.fence, "status", {"status": "succeeded", "evaluated": what})
    return made


def of_version(session: Session, name: str, number: int, after: str, limit: int) -> list[Evaluation]:
    """A version's evaluations, oldest first."""
    query = select(Evaluation).where(Evaluation.adapter_name == name, Evaluation.version == number)
    return list(session.scalars(query.where(Evaluation.job_id > after).order_by(Evaluation.job_id).limit(limit)))
