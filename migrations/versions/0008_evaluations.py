"""Evaluations of versions are jobs, and what they measured is kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("kind", sa.String(length=20), server_default="align", nullable=False))
    op.add_column("jobs", sa.Column("source_name", sa.String(length=64), nullable=True))
    op.add_column("jobs", sa.Column("source_version", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("source_digest", sa.String(length=80), nullable=True))
    op.create_table(
        "evaluations",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("adapter_name", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=80), nullable=False),
        sa.Column("before_version", sa.Integer(), nullable=True),
        sa.Column("dataset_id", sa.String(length=40), nullable=False),
        sa.Column("dataset_digest", sa.String(length=80), nullable=False),
        sa.Column("result_digest", sa.String(length=80), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_name", "version"],
            ["adapter_versions.adapter_name", "adapter_versions.version"],
            name=op.f("fk_evaluations_adapter_name_version_adapter_versions"),
        ),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_evaluations_dataset_id_datasets")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_evaluations_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_evaluations")),
    )
    op.create_index("ix_evaluations_adapter_version", "evaluations", ["adapter_name", "version"])


def downgrade() -> None:
    """The older service would align where an evaluation, or an alignment on top of a version, was asked for: such jobs are given up."""
    op.execute(
        "UPDATE jobs SET status = 'cancelled', finished_at = CURRENT_TIMESTAMP, lease_until = NULL, fence = fence + 1 "
        "WHERE status NOT IN ('succeeded', 'failed', 'cancelled') AND (kind <> 'align' OR source_name IS NOT NULL)"
    )
    op.drop_table("evaluations")
    for name in ("source_digest", "source_version", "source_name", "kind"):
        op.drop_column("jobs", name)
