"""A data set's row knows the digest of its stored files, by which a copy from an object store is verified."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("datasets", sa.Column("files_digest", sa.String(length=80), nullable=True))


def downgrade() -> None:
    op.drop_column("datasets", "files_digest")
