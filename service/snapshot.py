"""A consistent copy of the database while everybody goes on writing, and the way back: SQLite by its backup API, PostgreSQL by COPY of all
tables in one repeatable-read transaction (no program of PostgreSQL's is needed).

A copy is a folder: hscr.db, or tables/<name>.copy. It belongs to one schema revision, which `Taken` names.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import func, inspect, select, text
from sqlalchemy.engine import make_url

from service.db import Database, alembic_config, upgrade
from service.models import Base

SQLITE, POSTGRESQL = "sqlite", "postgresql"
FILE, TABLES = "hscr.db", "tables"
_OURS_FROM_THE_START = ("audit_head",)  # the migrations put a row there


@dataclass(frozen=True)
class Taken:
    """A copy: of which database, at which revision, and its tables with their columns, in an order in which they can be filled."""

    kind: str
    revision: str
    tables: dict[str, list[str]]
    rows: Callable[[str], list[Any]]  # a query against the copy: the first column


def kind_of(url: str) -> str:
    return make_url(url).get_backend_name()


@contextmanager
def take(url: str, out: Path) -> Iterator[Taken]:
    """Copy the database into `out`. What is asked of `rows` inside the block is the state of the copy. ValueError for an old schema."""
    names = [table.name for table in Base.metadata.sorted_tables]
    if kind_of(url) == SQLITE:
        with _sqlite_copy(url, out / FILE) as connection:

            def rows(query: str) -> list[Any]:
                return [row[0] for row in connection.execute(query)]

            yield Taken(SQLITE, _at_head(rows, url), {name: [] for name in names}, rows)
        return
    with psycopg.connect(_libpq(url), autocommit=False) as postgres:
        postgres.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        postgres.read_only = True

        def fetch(query: str) -> list[Any]:
            return [row[0] for row in postgres.execute(query.encode()).fetchall()]

        revision = _at_head(fetch, url)  # the transaction's first statement: from here on nothing changes for it
        (out / TABLES).mkdir()
        columns = {table.name: [column.name for column in table.columns] for table in Base.metadata.sorted_tables}
        for name, fields in columns.items():
            asked = _copy(name, fields, "TO STDOUT")
            with (out / TABLES / f"{name}.copy").open("wb") as file, postgres.cursor().copy(asked) as blocks:
                for block in blocks:
                    file.write(block)
        yield Taken(POSTGRESQL, revision, columns, fetch)


def check_empty(url: str) -> None:
    """ValueError where the database holds anything of ours."""
    database = Database(url)
    try:
        there = set(inspect(database.engine).get_table_names())
        with database.read() as session:
            for table in Base.metadata.sorted_tables:
                if table.name in there and table.name not in _OURS_FROM_THE_START:
                    n = session.scalar(select(func.count()).select_from(text(f'"{table.name}"')))
                    if n:
                        raise ValueError("the database holds rows already; restore into an empty one")
    finally:
        database.close()


def put_back(url: str, source: Path, kind: str, revision: str, tables: dict[str, list[str]]) -> None:
    """Fill an empty database from a copy and bring it to the newest schema. ValueError where the kinds differ."""
    if kind != kind_of(url):
        raise ValueError(f"the backup is of {kind}, the database to restore is {kind_of(url)}")
    if kind == SQLITE:
        database = make_url(url).database
        assert database is not None
        with closing(sqlite3.connect(source / FILE)) as copy, closing(sqlite3.connect(database)) as target:
            copy.backup(target)  # over whatever empty schema is there
    else:
        _set_schema(url, revision)
        with psycopg.connect(_libpq(url)) as postgres, postgres.cursor() as cursor:
            for name in _OURS_FROM_THE_START:
                cursor.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(name)))
            for name, fields in tables.items():
                asked = _copy(name, fields, "FROM STDIN")
                with (source / TABLES / f"{name}.copy").open("rb") as file, cursor.copy(asked) as blocks:
                    while block := file.read(2**20):
                        blocks.write(block)
            _set_counters(cursor)
    upgrade(url)


@contextmanager
def _sqlite_copy(url: str, path: Path) -> Iterator[sqlite3.Connection]:
    database = make_url(url).database
    if database is None or not Path(database).is_file():
        raise ValueError("there is no database yet; nothing to back up")
    with closing(sqlite3.connect(path)) as copy:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as source:
            source.backup(copy)  # all pages in one step: one read transaction, and writers go on beside it (WAL)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, with nothing beside it
        yield copy


def _at_head(rows: Callable[[str], list[Any]], url: str) -> str:
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(alembic_config(url)).get_current_head()
    try:
        found = rows("SELECT version_num FROM alembic_version")
    except (sqlite3.Error, psycopg.Error):
        found = []
    if found != [head]:
        raise ValueError(
            "the database has no schema, or an older one than this program's; start the service once, which upgrades it"
        )
    assert head is not None
    return head


def _set_schema(url: str, revision: str) -> None:
    """Bring an empty database's schema to a revision, from below or above."""
    from alembic import command

    try:
        upgrade(url, revision)
    except Exception:  # alembic's word for a revision that lies below the current one
        command.downgrade(alembic_config(url), revision)
    else:
        command.downgrade(alembic_config(url), revision)


def _set_counters(cursor: psycopg.Cursor[Any]) -> None:
    """Numbers that the database gives out go on after the highest one that was restored."""
    cursor.execute(
        "SELECT table_name, column_name FROM information_schema.columns "
        "WHERE table_schema = current_schema() AND column_default LIKE 'nextval%'"
    )
    for table, column in cursor.fetchall():
        cursor.execute(
            sql.SQL("SELECT setval(pg_get_serial_sequence({0}, {1}), max({2})) FROM {3}").format(
                sql.Literal(table), sql.Literal(column), sql.Identifier(column), sql.Identifier(table)
            )
        )


def _copy(table: str, columns: list[str], direction: str) -> sql.Composed:
    names = sql.SQL(", ").join(sql.Identifier(c) for c in columns)
    return sql.SQL("COPY {} ({}) ").format(sql.Identifier(table), names) + sql.SQL(direction)


def _libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
