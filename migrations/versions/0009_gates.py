"""Aliases move through gates: an evaluation against the version that would be replaced, and what was decided."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("alias_history", sa.Column("gate_job_id", sa.String(length=40), nullable=True))
    op.create_table(
        "gates",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("adapter_name", sa.String(length=64), nullable=False),
        sa.Column("alias", sa.String(length=64), nullable=False),
        sa.Column("candidate", sa.Integer(), nullable=False),
        sa.Column("champion", sa.Integer(), nullable=True),
        sa.Column("dataset_id", sa.String(length=40), nullable=False),
        sa.Column("rule", sa.JSON(), nullable=False),
        sa.Column("decision", sa.String(length=20), nullable=False),
        sa.Column("interval", sa.JSON(), nullable=True),
        sa.Column("finding", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("actor", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "decision IN ('pending', 'moved', 'refused', 'overtaken')", name=op.f("ck_gates_decision_known")
        ),
        sa.CheckConstraint("(decision = 'pending') = (decided_at IS NULL)", name=op.f("ck_gates_decided_has_time")),
        sa.ForeignKeyConstraint(["adapter_name"], ["adapters.name"], name=op.f("fk_gates_adapter_name_adapters")),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_gates_dataset_id_datasets")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_gates_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_gates")),
    )
    op.create_index("ix_gates_adapter_alias", "gates", ["adapter_name", "alias"])


def downgrade() -> None:
    op.drop_table("gates")
    op.drop_column("alias_history", "gate_job_id")
