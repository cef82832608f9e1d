"""Data sets say how large they are, and what their upload said of the pictures."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("datasets", sa.Column("n_bytes", sa.BigInteger(), nullable=True))
    op.add_column("datasets", sa.Column("pictures", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("datasets", "pictures")
    op.drop_column("datasets", "n_bytes")
