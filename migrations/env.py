"""Alembic's environment: the service's own engine (so that SQLite locks as everywhere else), on the address given or the settings'."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context

from service.db import Database, UTCDateTime
from service.models import Base
from service.settings import Settings


def _render(kind: str, item: Any, autogen: Any) -> str | Literal[False]:
    """A revision names plain column types: it must not change when the service's own types do."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UTCDateTime) else False


def run() -> None:
    database = Database(context.config.get_main_option("sqlalchemy.url") or Settings().database)
    try:
        with database.write() as session:
            connection = session.connection()
            if connection.dialect.name == "postgresql":
                # Two replicas that start together migrate one after the other.
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(4853435201)")
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                render_as_batch=connection.dialect.name == "sqlite",
                compare_type=True,
                transactional_ddl=True,
                render_item=_render,
            )
            with context.begin_transaction():
                context.run_migrations()
    finally:
        database.close()


run()
