"""Jobs can be paused, reviewed and retried, have an owner, a place in the queue, and know how long their stages took."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Columns are added in place: on SQLite a rebuilt table would be dropped first, and its events with it.
    op.add_column("jobs", sa.Column("pause_requested", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("review", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("approved_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("owner", sa.String(length=40), server_default="local", nullable=False))
    op.add_column("jobs", sa.Column("deadline_s", sa.Double(), nullable=True))
    op.add_column(
        "jobs",
        sa.Column("queued_at", sa.DateTime(timezone=True), server_default="1970-01-01 00:00:00+00:00", nullable=False),
    )
    op.add_column("jobs", sa.Column("stage_seconds", sa.JSON(), server_default="{}", nullable=False))
    op.execute("UPDATE jobs SET queued_at = created_at")
    op.create_index("ix_jobs_status_queued", "jobs", ["status", "queued_at"])
    op.create_index("ix_jobs_owner_status", "jobs", ["owner", "status"])


def downgrade() -> None:
    """Statuses that the older service cannot leave are given up: such jobs end as cancelled."""
    op.execute(
        "UPDATE jobs SET status = 'cancelled', finished_at = CURRENT_TIMESTAMP WHERE status IN ('paused', 'awaiting_review')"
    )
    op.drop_index("ix_jobs_owner_status", table_name="jobs")
    op.drop_index("ix_jobs_status_queued", table_name="jobs")
    for name in ("stage_seconds", "queued_at", "deadline_s", "owner", "approved_at", "review", "pause_requested"):
        op.drop_column("jobs", name)
