"""The tables, as SQLAlchemy 2 typed models. Constraints hold what must never be false; the life cycle itself is in service/jobs.py."""

from __future__ import annotations

import secrets
import time
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.db import UTCDateTime, now

STATUSES = ("queued", "running", "paused", "awaiting_review", "succeeded", "failed", "cancelled")

# SQLite counts up only for a column that is exactly INTEGER PRIMARY KEY.
_RowId = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UTCDateTime,
        dict[str, Any]: JSON,
        list[Any]: JSON,
        str: String(200),
    }


class Dataset(Base):
    """One version of a named data set; its files lie in DATA/datasets/<digest>/ and are shared by equal content."""

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("name", "version"), UniqueConstraint("name", "digest"))

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str]
    version: Mapped[int]
    format: Mapped[str] = mapped_column(String(40))
    digest: Mapped[str] = mapped_column(String(80), index=True)
    files_digest: Mapped[str | None] = mapped_column(String(80))  # of the stored folder's SHA256SUMS
    n_records: Mapped[int]
    n_images: Mapped[int]
    n_rejected: Mapped[int]
    rejected: Mapped[list[Any]]  # [{"line": 3, "reason": "…"}], the first thousand
    n_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of its files; None: uploaded before that was noted
    pictures: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # their formats, flags, and how many were cleaned
    repeats: Mapped[dict[str, Any] | None] = mapped_column(
        JSON
    )  # hscr/repeats.py; None: uploaded before that was noted
    created_at: Mapped[datetime] = mapped_column(default=now)


class DatasetRecord(Base):
    """One record of a data set; `number` counts from 1 in file order and is the page cursor."""

    __tablename__ = "dataset_records"
    __table_args__ = (CheckConstraint("number > 0", name="number_positive"),)

    dataset_id: Mapped[str] = mapped_column(String(40), ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    record_id: Mapped[str] = mapped_column(Text)
    record: Mapped[dict[str, Any]]


class Job(Base):
    """One job: an alignment, or the evaluation of a version (`kind`).

    `fence` counts claims and hand-backs: a write that names an older fence changes nothing.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN ({', '.join(repr(s) for s in STATUSES)})", name="status_known"),
        CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="lease_only_while_running"),
        CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="ended_has_time"
        ),
        Index("ix_jobs_status_lease", "status", "lease_until"),
        Index("ix_jobs_status_queued", "status", "queued_at"),
        Index("ix_jobs_owner_status", "owner", "status"),
        Index("ix_jobs_files_finished", "files_removed_at", "finished_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20), default="align")
    status: Mapped[str] = mapped_column(String(20))
    stage: Mapped[str | None] = mapped_column(String(20))
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False)
    review: Mapped[bool] = mapped_column(default=False)  # stop after generation until somebody approves
    approved_at: Mapped[datetime | None]
    owner: Mapped[str] = mapped_column(String(40), default="local")  # id of the key that asked for it
    dataset_id: Mapped[str] = mapped_column(String(40), ForeignKey("datasets.id"), index=True)
    evaluation_dataset_id: Mapped[str | None] = mapped_column(String(40), ForeignKey("datasets.id"), index=True)
    adapter_name: Mapped[str]
    source_name: Mapped[str | None] = mapped_column(String(64))  # the version that is evaluated, or aligned on top of
    source_version: Mapped[int | None]
    source_digest: Mapped[str | None] = mapped_column(String(80))
    model: Mapped[str] = mapped_column(Text)
    config: Mapped[dict[str, Any]]
    meta: Mapped[dict[str, Any]]
    webhook: Mapped[str | None] = mapped_column(Text)  # told when the job ends or awaits review
    promote: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # what becomes of its version (service/promotion.py)
    deadline_s: Mapped[float | None]
    deadline_at: Mapped[datetime | None]

    fence: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)  # in a row without progress between them
    high_water: Mapped[int] = mapped_column(BigInteger, default=-1)  # the furthest point any attempt reached
    crash_water: Mapped[int] = mapped_column(BigInteger, default=-1)  # high_water at the last crash
    last_seq: Mapped[int] = mapped_column(default=0)
    queued_at: Mapped[datetime] = mapped_column(default=now)  # its place in the queue, anew each time it comes back
    rung_at: Mapped[datetime | None]

    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    stage_seconds: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # time spent, over all attempts
    error_code: Mapped[str | None] = mapped_column(String(80))
    error_message: Mapped[str | None] = mapped_column(Text)
    report: Mapped[str | None] = mapped_column(String(80))  # name of the published report's folder
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]  # its words and events are gone; the row stays for what it made
    files_removed_at: Mapped[datetime | None]  # DATA/runs/<id>/ is gone


class JobEvent(Base):
    """One event of a job, append-only. `seq` counts from 1 without a gap within its job and is the cursor of pages and streams."""

    __tablename__ = "job_events"
    __table_args__ = (UniqueConstraint("job_id", "seq"),)

    id: Mapped[int] = mapped_column(_RowId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"))
    seq: Mapped[int]
    fence: Mapped[int]
    type: Mapped[str] = mapped_column(String(20))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class PreferenceEdit(Base):
    """What a person made of one generated preference record of a job that awaits review. `number` counts from 1 in the run's file."""

    __tablename__ = "preference_edits"
    __table_args__ = (CheckConstraint("number > 0", name="number_positive"),)

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    line: Mapped[str] = mapped_column(String(80))  # digest of the line that was looked at
    rejected: Mapped[bool] = mapped_column(default=False)
    levels: Mapped[dict[str, Any]]  # {"1": {"rejected": true}, "2": {"text": "…"}}
    actor: Mapped[str] = mapped_column(String(40))
    updated_at: Mapped[datetime] = mapped_column(default=now)


class GenerationShard(Base):
    """One of the `parts` of a job's generation that an idle worker may make: part `number` from 1, records [start, stop).

    `own`: given up, the job's run makes it itself. `fence` counts claims, as a job's does.
    """

    __tablename__ = "generation_shards"
    __table_args__ = (
        CheckConstraint("status IN ('open', 'running', 'done', 'own')", name="status_known"),
        CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="lease_only_while_running"),
        Index("ix_generation_shards_status_lease", "status", "lease_until"),
    )

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parts: Mapped[int]
    start: Mapped[int]
    stop: Mapped[int]
    status: Mapped[str] = mapped_column(String(20), default="open")
    fence: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[datetime | None]
    crashes: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Outbox(Base):
    """A bell that is still to be rung: written with the job's row, deleted by the relay once the broker has it."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(_RowId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class WebhookDelivery(Base):
    """One thing to tell a job's webhook, and how telling it went. `tries` counts since it was last asked for, `attempts` all."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("job_id", "seq"),
        CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status_known"),
        Index("ix_webhook_deliveries_status_next", "status", "next_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"))
    seq: Mapped[int]  # of the job's event
    event: Mapped[str] = mapped_column(String(40))
    url: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(20))
    attempts: Mapped[int] = mapped_column(default=0)
    tries: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]
    log: Mapped[list[Any]] = mapped_column(JSON, default=list)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Adapter(Base):
    """A name under which versions gather. One adapter has one base model."""

    __tablename__ = "adapters"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    last_version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(default=now)


class AdapterVersion(Base):
    """An immutable version: its folder lies in the store under its digest. A job publishes at most one; an uploaded one has no job."""

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("job_id"),
        CheckConstraint("version > 0", name="version_positive"),
        CheckConstraint("source = 'upload' OR job_id IS NOT NULL", name="job_unless_uploaded"),
    )

    adapter_name: Mapped[str] = mapped_column(String(64), ForeignKey("adapters.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(String(80), index=True)
    model: Mapped[str] = mapped_column(Text)
    source: Mapped[str] = mapped_column(String(20), default="job")
    job_id: Mapped[str | None] = mapped_column(String(40), ForeignKey("jobs.id"))
    dataset_id: Mapped[str | None] = mapped_column(String(40), ForeignKey("datasets.id"))
    dataset_digest: Mapped[str | None] = mapped_column(String(80))
    preferences_digest: Mapped[str | None] = mapped_column(
        String(80)
    )  # of the preferences.jsonl that it was optimised on, of reviewed.jsonl after corrections
    review: Mapped[dict[str, Any] | None] = mapped_column(
        JSON
    )  # digests of what was generated and corrected, and counts
    config: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]]
    notes: Mapped[str | None] = mapped_column(Text)  # with the tags all of a version that may change
    created_at: Mapped[datetime] = mapped_column(default=now)


class Evaluation(Base):
    """What an evaluation job measured of a version, on a data set: beside the base, and beside the version before it where there is one."""

    __tablename__ = "evaluations"
    __table_args__ = (
        ForeignKeyConstraint(
            ["adapter_name", "version"], ["adapter_versions.adapter_name", "adapter_versions.version"]
        ),
        Index("ix_evaluations_adapter_version", "adapter_name", "version"),
    )

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    adapter_name: Mapped[str] = mapped_column(String(64))
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(String(80))  # of the version's weights
    before_version: Mapped[int | None]
    dataset_id: Mapped[str] = mapped_column(String(40), ForeignKey("datasets.id"))
    dataset_digest: Mapped[str] = mapped_column(String(80))
    result_digest: Mapped[str] = mapped_column(String(80))  # of evaluation.json
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class VersionTag(Base):
    """A word on a version, for people to find it by."""

    __tablename__ = "version_tags"
    __table_args__ = (
        ForeignKeyConstraint(
            ["adapter_name", "version"], ["adapter_versions.adapter_name", "adapter_versions.version"]
        ),
        Index("ix_version_tags_tag", "adapter_name", "tag"),
    )

    adapter_name: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tag: Mapped[str] = mapped_column(String(64), primary_key=True)


class Alias(Base):
    """A movable name of one version, as `champion`."""

    __tablename__ = "aliases"
    __table_args__ = (
        ForeignKeyConstraint(
            ["adapter_name", "version"], ["adapter_versions.adapter_name", "adapter_versions.version"]
        ),
    )

    adapter_name: Mapped[str] = mapped_column(String(64), primary_key=True)
    alias: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int]
    updated_at: Mapped[datetime] = mapped_column(default=now)


class AliasMove(Base):
    """When an alias moved, from where, to where, who moved it and why. A rollback is a move that undoes another. Append-only."""

    __tablename__ = "alias_history"
    __table_args__ = (Index("ix_alias_history_adapter_alias", "adapter_name", "alias"),)

    id: Mapped[int] = mapped_column(_RowId, primary_key=True, autoincrement=True)
    adapter_name: Mapped[str] = mapped_column(String(64), ForeignKey("adapters.name"))
    alias: Mapped[str] = mapped_column(String(64))
    from_version: Mapped[int | None]
    to_version: Mapped[int]
    reason: Mapped[str | None] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(String(40), default="local")
    rollback: Mapped[bool] = mapped_column(default=False)
    gate_job_id: Mapped[str | None] = mapped_column(String(40))  # the evaluation that let it pass
    created_at: Mapped[datetime] = mapped_column(default=now)


class Gate(Base):
    """A wish to move an alias if an evaluation allows it, and what was decided. `champion`: the version to be replaced; None: the base."""

    __tablename__ = "gates"
    __table_args__ = (
        CheckConstraint("decision IN ('pending', 'moved', 'refused', 'overtaken')", name="decision_known"),
        CheckConstraint("(decision = 'pending') = (decided_at IS NULL)", name="decided_has_time"),
        Index("ix_gates_adapter_alias", "adapter_name", "alias"),
    )

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id"), primary_key=True)
    adapter_name: Mapped[str] = mapped_column(String(64), ForeignKey("adapters.name"))
    alias: Mapped[str] = mapped_column(String(64))
    candidate: Mapped[int]
    champion: Mapped[int | None]
    dataset_id: Mapped[str] = mapped_column(String(40), ForeignKey("datasets.id"))
    rule: Mapped[dict[str, Any]]
    decision: Mapped[str] = mapped_column(String(20), default="pending")
    interval: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    finding: Mapped[str | None] = mapped_column(Text)
    reason: Mapped[str | None] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(default=now)
    decided_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    """What a caller's Idempotency-Key was answered with; only digests of key and body are kept."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_created", "created_at"),)

    key_digest: Mapped[str] = mapped_column(String(80), primary_key=True)
    body_digest: Mapped[str] = mapped_column(String(80))
    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"))
    response: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class ApiKey(Base):
    """A key by its digest. `previous_digest` opens it too until `previous_until`, after a rotation. Rows stay when a key is revoked."""

    __tablename__ = "api_keys"
    __table_args__ = (UniqueConstraint("digest"), UniqueConstraint("previous_digest"))

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str]
    shown: Mapped[str] = mapped_column(String(20))
    digest: Mapped[str] = mapped_column(String(80))
    previous_digest: Mapped[str | None] = mapped_column(String(80))
    previous_until: Mapped[datetime | None]
    scopes: Mapped[list[Any]]
    waiting_max: Mapped[int | None]  # its own limits of jobs; None: the service's
    running_max: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class AuditEntry(Base):
    """One change that somebody asked for. The database refuses to change or remove a row (triggers); service/audit.py chains them."""

    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    actor: Mapped[str] = mapped_column(String(40))
    action: Mapped[str] = mapped_column(String(40))
    subject: Mapped[str] = mapped_column(index=True)
    data: Mapped[dict[str, Any]]
    previous: Mapped[str] = mapped_column(String(80))
    digest: Mapped[str] = mapped_column(String(80))


class AuditHead(Base):
    """The end of the chain: one row, whose lock orders the entries."""

    __tablename__ = "audit_head"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(80))


def new_id(prefix: str) -> str:
    """An id that sorts by its time of birth, so that a list's cursor is its last id."""
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"
