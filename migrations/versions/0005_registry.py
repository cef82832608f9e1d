"""The registry knows who moved an alias and what was rolled back, tags and notes of versions, and what a version was optimised on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("alias_history", sa.Column("actor", sa.String(length=40), server_default="local", nullable=False))
    op.add_column("alias_history", sa.Column("rollback", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("adapter_versions", sa.Column("preferences_digest", sa.String(length=80), nullable=True))
    op.add_column("adapter_versions", sa.Column("notes", sa.Text(), nullable=True))
    op.create_table(
        "version_tags",
        sa.Column("adapter_name", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tag", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_name", "version"],
            ["adapter_versions.adapter_name", "adapter_versions.version"],
            name=op.f("fk_version_tags_adapter_name_version_adapter_versions"),
        ),
        sa.PrimaryKeyConstraint("adapter_name", "version", "tag", name=op.f("pk_version_tags")),
    )
    op.create_index("ix_version_tags_tag", "version_tags", ["adapter_name", "tag"])
    op.create_index("ix_jobs_dataset_id", "jobs", ["dataset_id"])
    op.create_index("ix_jobs_evaluation_dataset_id", "jobs", ["evaluation_dataset_id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_evaluation_dataset_id", table_name="jobs")
    op.drop_index("ix_jobs_dataset_id", table_name="jobs")
    op.drop_table("version_tags")
    op.drop_column("adapter_versions", "notes")
    op.drop_column("adapter_versions", "preferences_digest")
    op.drop_column("alias_history", "rollback")
    op.drop_column("alias_history", "actor")
