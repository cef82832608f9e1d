"""Preference records can be rejected and corrected before the optimisation, and a version knows of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapter_versions", sa.Column("review", sa.JSON(), nullable=True))
    op.create_table(
        "preference_edits",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("line", sa.String(length=80), nullable=False),
        sa.Column("rejected", sa.Boolean(), nullable=False),
        sa.Column("levels", sa.JSON(), nullable=False),
        sa.Column("actor", sa.String(length=40), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("number > 0", name=op.f("ck_preference_edits_number_positive")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_preference_edits_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_preference_edits")),
    )


def downgrade() -> None:
    """The older service would optimise on what was rejected: jobs with edits that have not ended are given up."""
    op.execute(
        "UPDATE jobs SET status = 'cancelled', finished_at = CURRENT_TIMESTAMP, lease_until = NULL, fence = fence + 1 "
        "WHERE status NOT IN ('succeeded', 'failed', 'cancelled') AND id IN (SELECT job_id FROM preference_edits)"
    )
    op.drop_table("preference_edits")
    op.drop_column("adapter_versions", "review")
