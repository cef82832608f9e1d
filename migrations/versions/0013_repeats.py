"""Data sets say which of their records contradict or repeat each other."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("datasets", sa.Column("repeats", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("datasets", "repeats")
