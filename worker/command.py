"""What a job's row becomes on disk and on the command line: the files of its configuration and corrections, and the run to start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from hscr.artifacts import write_json
from service import adapters, artifact_store, datasets, gates, lineage, reviews
from service.artifact_store import Artifact
from service.evaluations import KIND
from service.models import Dataset, Job
from service.run_folders import PARTS
from service.settings import Settings

CONFIG, REVIEW = "config.json", "review.json"


@dataclass(frozen=True)
class Sources:
    """What a run reads of the store: data sets, the version that it is about and the one before it, and the data that they learnt from."""

    data: Artifact
    evaluation: Artifact | None
    version: Artifact | None
    before: Artifact | None
    learnt_from: tuple[Artifact, ...]

    def to_generate(self) -> list[Artifact]:
        """Those that the generation reads."""
        return [self.data, *([] if self.version is None else [self.version])]

    def all(self) -> list[Artifact]:
        named = (self.data, self.evaluation, self.version, self.before, *self.learnt_from)
        return list(dict.fromkeys(a for a in named if a is not None))


@dataclass(frozen=True)
class Order:
    """A run to start. `review` is what a person corrected of the generated preferences; `for_review`: it stops after generation."""

    command: list[str]
    evaluates: bool
    review: dict[str, Any] | None
    for_review: bool


def sources_of(session: Session, job: Job) -> Sources:
    """The artifacts to have at hand before the run starts."""
    data = datasets.artifact(session, session.get_one(Dataset, job.dataset_id).digest)
    other = job.evaluation_dataset_id if job.kind != KIND else None
    evaluation = datasets.artifact(session, session.get_one(Dataset, other).digest) if other else None
    if job.source_name is None or job.source_version is None:
        return Sources(data, evaluation, None, None, ())
    version, before = adapters.get_version(session, job.source_name, job.source_version), gates.before(session, job.id)
    learnt = [digest for v in (version, before) if v is not None for digest in lineage.learnt_from(session, v)]
    return Sources(
        data,
        evaluation,
        artifact_store.adapter(version.digest),
        artifact_store.adapter(before.digest) if before else None,
        tuple(datasets.artifact(session, digest) for digest in dict.fromkeys(learnt)),
    )


def order_of(
    session: Session, settings: Settings, job: Job, folder: Path, work: Path, sources: Sources, at: dict[Artifact, Path]
) -> Order:
    """Write what the run reads into the job's folder; its output will be in `work`. `at`: where each source lies on this disk."""
    write_json(folder / CONFIG, job.config)
    evaluates = job.kind == KIND
    review = reviews.for_run(session, job.id)
    if review is not None:
        write_json(folder / REVIEW, review)
    for_review = job.review and job.approved_at is None
    command = [*(settings.evaluate_command if evaluates else settings.run_command), str(at[sources.data])]
    command += [*settings.model_options, "--out", str(work.resolve())]
    command += ["--config", str((folder / CONFIG).resolve()), "--events", "json"]
    command += ["--eval", str(at[sources.evaluation])] if sources.evaluation else []
    if sources.version is not None:
        command += ["--adapter" if evaluates else "--parent", str(at[sources.version])]
        command += ["--before", str(at[sources.before])] if sources.before else []
        for seen in sources.learnt_from:
            command += ["--trained-on", str(at[seen])]
    if evaluates:
        return Order(command, True, None, False)
    command += ["--parts", str((folder / PARTS).resolve())]
    if review is not None:
        command += ["--review", str((folder / REVIEW).resolve())]
    return Order([*command, *(["--stop-after", "generating"] if for_review else [])], False, review, for_review)


def parts_command(settings: Settings, folder: Path, sources: Sources, at: dict[Artifact, Path]) -> list[str]:
    """The run that makes the parts of an alignment's preferences that it is told, by the configuration that the job's own run has from
    `order_of`."""
    command = [*settings.generate_command, str(at[sources.data]), *settings.model_options]
    command += ["--config", str((folder / CONFIG).resolve()), "--shard", "-", "--events", "json"]
    command += ["--parent", str(at[sources.version])] if sources.version is not None else []
    return [*command, "--parts", str((folder / PARTS).resolve())]
