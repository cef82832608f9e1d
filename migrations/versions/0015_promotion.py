"""What an align job asks for once its version exists: an alias, with or without a gate."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("promote", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "promote")
