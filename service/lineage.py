"""Where a version came from and what came of a data set: answer → version → job → preferences → data set, and the way back.

Answers name their version by digest (`adapter.digest`), so the way begins at a digest too. Rows only; files are named by their digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import literal, or_, select, tuple_
from sqlalchemy.orm import Session

from service import aliases
from service.models import AdapterVersion, Dataset, Job


@dataclass(frozen=True)
class Origin:
    """Everything a version rests on, and the aliases that point at it now."""

    version: AdapterVersion
    job: Job | None  # None: uploaded
    dataset: Dataset | None
    evaluation_dataset: Dataset | None
    parent: AdapterVersion | None
    aliases: list[str]


def origins(session: Session, versions: Sequence[AdapterVersion]) -> list[Origin]:
    """In as many questions as for one: what they rest on is fetched together, and then found in the session."""
    jobs = list(session.scalars(select(Job).where(Job.id.in_([v.job_id for v in versions if v.job_id]))))
    data = {v.dataset_id for v in versions} | {j.evaluation_dataset_id for j in jobs}
    below = [(j.source_name, j.source_version) for j in jobs if j.source_name]
    of_version = tuple_(AdapterVersion.adapter_name, AdapterVersion.version)
    held = [
        *session.scalars(select(Dataset).where(Dataset.id.in_([d for d in data if d]))),
        *session.scalars(select(AdapterVersion).where(of_version.in_(below))),
    ]
    pointing = aliases.pointing(session, {v.adapter_name for v in versions})
    found = [_origin(session, v, pointing.get((v.adapter_name, v.version), [])) for v in versions]
    del held  # a session holds weakly what nobody else does
    return found


def _origin(session: Session, version: AdapterVersion, names: list[str]) -> Origin:
    job = session.get_one(Job, version.job_id) if version.job_id else None
    tested = session.get_one(Dataset, job.evaluation_dataset_id) if job and job.evaluation_dataset_id else None
    dataset = session.get_one(Dataset, version.dataset_id) if version.dataset_id else None
    return Origin(version, job, dataset, tested, parent(session, version), names)


def versions_of_digest(session: Session, digest: str, after: tuple[str, int], limit: int) -> list[AdapterVersion]:
    """Equal weights have one digest, so that many jobs and uploads may lead to one; by name and version, from behind `after`."""
    place = (AdapterVersion.adapter_name, AdapterVersion.version)
    query = select(AdapterVersion).where(AdapterVersion.digest == digest, tuple_(*place) > tuple_(*map(literal, after)))
    return list(session.scalars(query.order_by(*place).limit(limit)))


def jobs_on(session: Session, dataset_id: str, after: str, limit: int) -> list[tuple[Job, AdapterVersion | None]]:
    """The jobs that learnt from a data set or were evaluated on it, oldest first, each with the version that it published."""
    uses = or_(Job.dataset_id == dataset_id, Job.evaluation_dataset_id == dataset_id)
    query = select(Job, AdapterVersion).outerjoin(AdapterVersion, AdapterVersion.job_id == Job.id)
    rows = session.execute(query.where(uses, Job.id > after).order_by(Job.id).limit(limit))
    return [(job, version) for job, version in rows]


def parent(session: Session, version: AdapterVersion) -> AdapterVersion | None:
    """The version that this one was aligned on top of."""
    job = session.get_one(Job, version.job_id) if version.job_id else None
    return session.get(AdapterVersion, (job.source_name, job.source_version)) if job and job.source_name else None


def learnt_from(session: Session, version: AdapterVersion) -> list[str]:
    """Digests of the data sets that a version, and those below it, were aligned on."""
    digests: list[str] = []
    step: AdapterVersion | None = version
    while step is not None:
        if step.dataset_digest is not None:  # nobody knows what an uploaded one learnt from
            digests.append(step.dataset_digest)
        step = parent(session, step)
    return list(dict.fromkeys(digests))
