"""The database connection: read and write transactions on SQLite or PostgreSQL, single looks, and schema upgrades.

On SQLite every write transaction is BEGIN IMMEDIATE from its start: a read that later wants to write would else meet "database is locked".
Parameters never appear in an exception's text, for they may be health data.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import DateTime, Dialect, Engine, TypeDecorator, create_engine, event, func, inspect, select, text
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

_WRITE = "hscr_write"
_POSTGRES: dict[str, Any] = {"connect_timeout": 5, "options": "-c timezone=utc -c lock_timeout=30s"}


class UTCDateTime(TypeDecorator[datetime]):
    """An aware UTC time on both databases (SQLite stores no zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Database:
    """One engine and its two kinds of transaction: `with database.read() as session`, `with database.write() as session`."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(**{_WRITE: True})
        self._lookers = _lookers(self.engine)
        assert self.engine.dialect.dbapi is not None
        self.driver_errors: type[Exception] = self.engine.dialect.dbapi.Error

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def looker(self) -> Iterator[Any]:
        """A driver's own connection that is in no transaction, for service/look.py. Raises what the driver raises."""
        held = self._lookers.raw_connection()
        try:
            yield held.driver_connection
        except self.driver_errors as error:
            if self.engine.dialect.is_disconnect(error, held.driver_connection, None):  # type: ignore[arg-type]
                held.invalidate()
                self._lookers.dispose()  # the others were lost with it
            raise
        finally:
            held.close()

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Commits at the end of the block, rolls back where it raises."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def shared(self, name: str) -> Iterator[None]:
        """Hold a name together with others, against `alone`. On SQLite nothing: one host has the file, and files have locks."""
        if self.engine.dialect.name != "postgresql":
            yield
            return
        with self.engine.connect() as connection:
            connection.execute(text("SET LOCAL lock_timeout = 0"))  # a collector may take its time
            connection.execute(select(func.pg_advisory_xact_lock_shared(func.hashtextextended(name, 0))))
            try:
                yield
            finally:
                with suppress(DBAPIError):  # where the connection is lost the hold is too, and nothing is to be told
                    connection.rollback()

    def close(self) -> None:
        self.engine.dispose()
        self._lookers.dispose()


def _engine(url: str) -> Engine:
    address = make_url(url)
    if address.get_backend_name() == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
        return create_engine(
            address,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=10,
            max_overflow=30,
            connect_args=_POSTGRES,
        )
    if address.database and address.database != ":memory:":
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    # As many connections as threads that may ask: one beyond the pool would be opened, prepared and closed again for a single read.
    engine = create_engine(
        address,
        hide_parameters=True,
        pool_size=40,
        connect_args={"timeout": 30, "check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _lookers(engine: Engine) -> Engine:
    """Where connections for single looks come from. SQLite's are in no transaction until `begin`; PostgreSQL's are kept apart."""
    if engine.dialect.name != "postgresql":
        return engine
    lookers = create_engine(
        engine.url,
        hide_parameters=True,
        pool_size=4,  # no more than service/written.py has readers are asked for at once
        max_overflow=30,
        pool_reset_on_return=None,
        connect_args=_POSTGRES | {"autocommit": True},
    )
    event.listen(lookers, "connect", _json_as_text)
    return lookers


def _json_as_text(connection: Any, record: Any) -> None:
    from psycopg.types.string import TextLoader

    connection.adapters.register_loader("json", TextLoader)


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _begin_sqlite does
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get(_WRITE):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:  # takes no lock and so cannot fail; said to the driver itself, for a third of what a read costs is such words
        connection.connection.execute("BEGIN")


def lock(session: Session, name: str) -> None:
    """Hold a name until the write transaction ends, against all others that do so. On SQLite a write transaction is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


def alone(session: Session, name: str) -> bool:
    """Whether nobody holds a name (`Database.shared`); then nobody will until the transaction ends."""
    if session.get_bind().dialect.name != "postgresql":
        return True
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0)))))


def disk_is_full(error: DBAPIError) -> bool:
    """True where the database could not write because its disk takes no more."""
    return getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or (
        getattr(error.orig, "sqlstate", None) == "53100"
    )


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the schema to a revision; doing it again does nothing."""
    from alembic import command

    command.upgrade(alembic_config(url), revision)


def has_schema(url: str) -> bool:
    """Whether a service made its tables there, of whatever revision. Creates nothing, also where a SQLite file is missing."""
    where = make_url(url)
    if where.get_backend_name() == "sqlite" and not Path(where.database or "").is_file():
        return False
    database = Database(url)
    try:
        return inspect(database.engine).has_table("alembic_version")
    finally:
        database.close()


def alembic_config(url: str) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).resolve().parent.parent / "migrations"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def now() -> datetime:
    return datetime.now(UTC)
