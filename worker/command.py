"""What a job's row becomes on disk and on the command line: the files of its configuration and corrections, and the run to start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from hscr.artifacts import verify_manifest, write_json
from service import adapters, datasets, gates, lineage, reviews
from service.evaluations import KIND
from service.models import Dataset, Job
from service.settings import Settings

CONFIG, REVIEW = "config.json", "review.json"


class SourceDamaged(Exception):
    """The stored version that the job is about is not what its digest says."""


@dataclass(frozen=True)
class Order:
    """A run to start. `review` is what a person corrected of the generated preferences; `for_review`: it stops after generation."""

    command: list[str]
    evaluates: bool
    review: dict[str, Any] | None
    for_review: bool


def order_of(session: Session, settings: Settings, job: Job, folder: Path, work: Path) -> Order:
    """Write what the run reads into the job's folder; its output will be in `work`. Raises SourceDamaged."""
    write_json(folder / CONFIG, job.config)
    evaluates = job.kind == KIND
    review = reviews.for_run(session, job.id)
    if review is not None:
        write_json(folder / REVIEW, review)
    for_review = job.review and job.approved_at is None
    place = settings.data_dir.resolve()
    data = datasets.folder(place, session.get_one(Dataset, job.dataset_id).digest)
    command = [*(settings.evaluate_command if evaluates else settings.run_command), str(data)]
    command += ["--model", settings.model_path, "--out", str(work.resolve())]
    command += ["--config", str((folder / CONFIG).resolve()), "--events", "json"]
    if evaluates:
        return Order([*command, *_source(session, place, job)], True, None, False)
    if job.evaluation_dataset_id:
        other = session.get_one(Dataset, job.evaluation_dataset_id).digest
        command += ["--eval", str(datasets.folder(place, other))]
    if job.source_name is not None:
        command += _source(session, place, job)
    if review is not None:
        command += ["--review", str((folder / REVIEW).resolve())]
    return Order([*command, *(["--stop-after", "generating"] if for_review else [])], False, review, for_review)


def _source(session: Session, place: Path, job: Job) -> list[str]:
    """The version to evaluate or to align on top of, and the data that it learnt from, whose pictures must not be evaluated on."""
    assert job.source_name is not None
    assert job.source_version is not None
    version, before = adapters.get_version(session, job.source_name, job.source_version), gates.before(session, job.id)
    arguments = ["--adapter" if job.kind == KIND else "--parent", _checked(place, version.digest)]
    arguments += ["--before", _checked(place, before.digest)] if before else []
    seen = [digest for v in (version, before) if v is not None for digest in lineage.learnt_from(session, v)]
    for digest in dict.fromkeys(seen):
        arguments += ["--trained-on", str(datasets.folder(place, digest))]
    return arguments


def _checked(place: Path, digest: str) -> str:
    folder = adapters.folder(place, digest)
    try:
        verify_manifest(folder, digest)
    except ValueError:
        raise SourceDamaged from None
    return str(folder)
