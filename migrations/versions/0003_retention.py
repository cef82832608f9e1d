"""Jobs can be deleted, and their folders go after a time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("files_removed_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_jobs_files_finished", "jobs", ["files_removed_at", "finished_at"])
    op.create_index("ix_idempotency_keys_created", "idempotency_keys", ["created_at"])


def downgrade() -> None:
    op.drop_index("ix_idempotency_keys_created", table_name="idempotency_keys")
    op.drop_index("ix_jobs_files_finished", table_name="jobs")
    op.drop_column("jobs", "files_removed_at")
    op.drop_column("jobs", "deleted_at")
