"""The registry: adapter names, immutable versions by digest, and what a reference means. Aliases move in service/aliases.py.

An adapter's folder lies in the store (service/artifact_store.py) under its digest; a row points at it only when it is whole.
No torch and no web framework here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from hscr.config import OptimizationConfig
from service import artifact_store, audit, jobs, thresholds
from service.errors import Problem
from service.models import Adapter, AdapterVersion, Alias, Dataset, Job, VersionTag

NAME = r"^[a-z0-9][a-z0-9._\-]{0,63}$"
CHAMPION = "champion"
REFERENCE = re.compile(
    r"^(?P<name>[a-z0-9][a-z0-9._\-]{0,63})(?:@(?P<alias>[a-z0-9][a-z0-9._\-]{0,63})|:(?P<version>[0-9]{1,9}))?$"
)

# Made once: to build a statement costs as much as to run it, and these are run with every look at the registry.
_ADAPTER = select(Adapter).where(Adapter.name == bindparam("name"))
_VERSION = select(AdapterVersion).where(
    AdapterVersion.adapter_name == bindparam("name"), AdapterVersion.version == bindparam("number")
)
_MEASURED = _VERSION.add_columns(thresholds.EVALUATED_BY, thresholds.EVALUATED)
_T = VersionTag.__table__.c
_TAGS = select(_T.version, _T.tag).where(_T.adapter_name == bindparam("name"))
_TAGS = _TAGS.where(_T.version.in_(bindparam("numbers", expanding=True))).order_by(_T.tag)


@dataclass(frozen=True)
class Resolved:
    """An adapter reference after resolution: what it was at that moment, by digest."""

    name: str
    version: int
    digest: str
    model: str
    threshold: float | None  # below it an answer is flagged
    no_threshold: str | None  # why there is none


def folder(data_dir: Path, digest: str) -> Path:
    """Where an adapter lies in the default store and in a backup."""
    return artifact_store.LocalStore.below(data_dir).folder(artifact_store.adapter(digest))


def publish(
    session: Session,
    mine: jobs.Claim,
    *,
    digest: str,
    metrics: dict[str, Any],
    result: dict[str, Any],
    report: str | None,
    preferences_digest: str | None = None,
    review: dict[str, Any] | None = None,
    then: Callable[[Session, Job, AdapterVersion], dict[str, Any]] = lambda *_: {},
) -> AdapterVersion:
    """In one transaction: the job succeeds, its version exists, its last event says so. Raises jobs.Superseded.

    `then` is done in it too, and what it returns stands in that event.
    """
    seq = jobs.succeed(session, mine, metrics=metrics, report=report, stage="publishing")
    job = session.get_one(Job, mine.job_id, populate_existing=True)
    dataset = session.get_one(Dataset, job.dataset_id)
    version = AdapterVersion(
        adapter_name=job.adapter_name,
        version=next_version(session, job.adapter_name),
        digest=digest,
        model=job.model,
        job_id=job.id,
        dataset_id=dataset.id,
        dataset_digest=dataset.digest,
        preferences_digest=preferences_digest,
        review=review,
        config=job.config,
        metrics=result,
    )
    session.add(version)
    what = {"name": version.adapter_name, "version": version.version, "digest": digest}
    audit.record(session, "worker", "version.publish", f"{what['name']}:{what['version']}", digest=digest, job=job.id)
    data = {"status": "succeeded", "adapter": what} | then(session, job, version)
    jobs.add_event(session, job.id, seq, mine.fence, "status", data)
    return version


def next_version(session: Session, name: str) -> int:
    """The next number under a name, which is made where it is new; the row lock orders all who ask."""
    bump = (
        update(Adapter)
        .where(Adapter.name == name)
        .values(last_version=Adapter.last_version + 1)
        .returning(Adapter.last_version)
    )
    number = session.scalar(bump)
    if number is None:
        try:
            with session.begin_nested():
                session.add(Adapter(name=name, last_version=0))
        except IntegrityError:
            pass  # another job made the name meanwhile; its row is there now
        number = session.scalars(bump).one()
    return number


def get(session: Session, name: str) -> Adapter:
    adapter = session.scalar(_ADAPTER, {"name": name})
    if adapter is None:
        raise not_found()
    return adapter


def not_found() -> Problem:
    return Problem("adapter_not_found", "No adapter has this name; GET /adapters lists them.")


def get_version(session: Session, name: str, number: int) -> AdapterVersion:
    version = session.scalar(_VERSION, {"name": name, "number": number})
    if version is None:
        get(session, name)
        raise _no_version()
    return version


def _no_version() -> Problem:
    return Problem("version_not_found", "The adapter has no version of this number; GET /adapters/{name} lists them.")


def resolve(session: Session, reference: str) -> Resolved:
    """`name@alias`, `name:version`, or `name` (its alias champion, else its newest version) -> one immutable version. Raises Problem."""
    match = REFERENCE.match(reference)
    if match is None:
        raise Problem("adapter_not_found", "Write an adapter as name, name@alias or name:version.")
    name, alias, number = match["name"], match["alias"], match["version"]
    adapter = get(session, name)
    if number is None:
        pointing = session.get(Alias, (name, alias or CHAMPION))
        if pointing is None and alias is not None:
            raise Problem("alias_not_found", "The adapter has no such alias; GET /adapters/{name} lists them.")
        number = pointing.version if pointing else adapter.last_version
    row = session.execute(_MEASURED, {"name": name, "number": int(number)}).first()
    if row is None:
        raise _no_version()
    version, flag = row.AdapterVersion, thresholds.flag(row.AdapterVersion, row.evaluated_by, row.evaluated)
    return Resolved(name, version.version, version.digest, version.model, flag.threshold, flag.reason)


def lora_shape(version: AdapterVersion) -> dict[str, Any]:
    """The fields of `optimization` that a version hands on to what is aligned on top of it."""
    given = {"lora_rank": OptimizationConfig.lora_rank, "lora_alpha": OptimizationConfig.lora_alpha, "lora_targets": ""}
    return given | {k: v for k, v in version.config.get("optimization", {}).items() if k in given}


def tags(session: Session, name: str, numbers: Sequence[int]) -> dict[int, list[str]]:
    """The tags of these versions of an adapter, by version; none for a version without."""
    found: dict[int, list[str]] = defaultdict(list)
    for number, tag in session.execute(_TAGS, {"name": name, "numbers": numbers}):
        found[number].append(tag)
    return found


def annotate(session: Session, version: AdapterVersion, tags_: list[str] | None, notes: str | None) -> bool:
    """Set a version's tags and its notes, each unless None; whether anything changed."""
    session.get(Adapter, version.adapter_name, with_for_update=True)  # one after the other
    name, number = version.adapter_name, version.version
    before = (tags(session, name, [number])[number], version.notes)
    if tags_ is not None:
        session.execute(delete(VersionTag).where(VersionTag.adapter_name == name, VersionTag.version == number))
        for tag in set(tags_):
            session.add(VersionTag(adapter_name=name, version=number, tag=tag))
    if notes is not None:
        version.notes = notes or None
    session.flush()
    return before != (tags(session, name, [number])[number], version.notes)
