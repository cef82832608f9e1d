"""Versions may be uploaded: such a one has no job and no data set.

On SQLite a column's NOT NULL goes only with the table, and a table that others point at cannot be dropped: what points at it is put aside.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TABLE = "adapter_versions"
POINTING = ("aliases", "version_tags", "evaluations")
COLUMNS = {"job_id": 40, "dataset_id": 40, "dataset_digest": 80}
HAS_JOB = "ck_adapter_versions_job_unless_uploaded", "source = 'upload' OR job_id IS NOT NULL"


def upgrade() -> None:
    op.add_column(TABLE, sa.Column("source", sa.String(length=20), server_default="job", nullable=False))
    if op.get_bind().dialect.name == "sqlite":
        _rebuild(uploads=True)
        return
    for name, length in COLUMNS.items():
        op.alter_column(TABLE, name, existing_type=sa.String(length=length), nullable=True)
    op.create_check_constraint(op.f(HAS_JOB[0]), TABLE, HAS_JOB[1])


def downgrade() -> None:
    """The older service knows no version without a job: uploaded ones go, with the aliases, tags and evaluations that point at them."""
    gone = f"(SELECT adapter_name, version FROM {TABLE} WHERE source = 'upload')"
    for table in POINTING:
        op.execute(f"DELETE FROM {table} WHERE (adapter_name, version) IN {gone}")
    op.execute(f"DELETE FROM {TABLE} WHERE source = 'upload'")
    if op.get_bind().dialect.name == "sqlite":
        _rebuild(uploads=False)
        return
    op.drop_constraint(op.f(HAS_JOB[0]), TABLE, type_="check")
    for name, length in COLUMNS.items():
        op.alter_column(TABLE, name, existing_type=sa.String(length=length), nullable=False)
    op.drop_column(TABLE, "source")


def _rebuild(*, uploads: bool) -> None:
    """SQLite: the same rows in a table that takes uploads, or does not (and has no `source`)."""
    columns = [
        sa.Column("adapter_name", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(length=80), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        *(sa.Column(name, sa.String(length=length), nullable=uploads) for name, length in COLUMNS.items()),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("preferences_digest", sa.String(length=80), nullable=True),
        sa.Column("notes", sa.Text(), nullable=True),
        sa.Column("review", sa.JSON(), nullable=True),
    ]
    checks = [sa.CheckConstraint("version > 0", name=op.f("ck_adapter_versions_version_positive"))]
    if uploads:
        columns.append(sa.Column("source", sa.String(length=20), server_default="job", nullable=False))
        checks.append(sa.CheckConstraint(HAS_JOB[1], name=op.f(HAS_JOB[0])))
    for pointing in POINTING:
        op.execute(f"CREATE TEMPORARY TABLE aside_{pointing} AS SELECT * FROM {pointing}")
        op.execute(f"DELETE FROM {pointing}")
    op.create_table(
        f"new_{TABLE}",
        *columns,
        *checks,
        sa.ForeignKeyConstraint(
            ["adapter_name"], ["adapters.name"], name=op.f("fk_adapter_versions_adapter_name_adapters")
        ),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_adapter_versions_dataset_id_datasets")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_adapter_versions_job_id_jobs")),
        sa.PrimaryKeyConstraint("adapter_name", "version", name=op.f("pk_adapter_versions")),
        sa.UniqueConstraint("job_id", name=op.f("uq_adapter_versions_job_id")),
    )
    names = ", ".join(column.name for column in columns)
    op.execute(f"INSERT INTO new_{TABLE} ({names}) SELECT {names} FROM {TABLE}")
    op.drop_table(TABLE)
    op.rename_table(f"new_{TABLE}", TABLE)
    op.create_index("ix_adapter_versions_digest", TABLE, ["digest"])
    for pointing in POINTING:
        op.execute(f"INSERT INTO {pointing} SELECT * FROM aside_{pointing}")
        op.execute(f"DROP TABLE aside_{pointing}")
