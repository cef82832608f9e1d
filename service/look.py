"""One statement that only reads, asked for as little as the driver takes: for what is read again and again.

SQLAlchemy writes the statement, once, and says how each column is read. A session, its transaction and its row objects cost several times
what the database does (0.3 ms against 0.03 on SQLite), and on PostgreSQL two more round trips, for BEGIN and ROLLBACK. Rows come raw:
a tuple of a driver's values can be compared and hashed, so that what was made of an equal row may be taken again (`read` makes it legible).
Where the connection was lost, or whatever else the driver says, the ordinary way is gone: it heals, or raises what its callers know.
"""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import JSON, Dialect, Select
from sqlalchemy.exc import InterfaceError

from service.db import Database

Raw = tuple[Any, ...]


class _Written(NamedTuple):
    """The statement in a dialect's words."""

    sql: str
    given: dict[str, Any]  # the values that stand in the statement itself
    order: list[str] | None  # of its parameters; None: they are named
    readers: list[Callable[[Any], Any] | None]


class Look:
    def __init__(self, statement: Select[Any]) -> None:
        """Parameters are texts and numbers, given by name as bindparam; of columns the keys become fields."""
        self._statement = statement
        self._row: Any = namedtuple("_row", [c.key for c in statement.selected_columns])  # type: ignore[misc]
        self._known: WeakKeyDictionary[Dialect, _Written] = WeakKeyDictionary()

    def rows(self, database: Database, **values: str | int | None) -> list[Raw]:
        try:
            return self._ask(database, values)
        except database.driver_errors:
            with database.read() as session:
                session.execute(self._statement, values).all()
        try:
            return self._ask(database, values)
        except database.driver_errors as error:
            raise InterfaceError(None, None, error, hide_parameters=True) from error

    def place(self, key: str) -> int:
        """Where in a raw row this column stands."""
        where: int = self._row._fields.index(key)
        return where

    def read(self, dialect: Dialect, raw: Raw) -> Any:
        """The row with a column a field, as a session would give it."""
        readers = self._known[dialect].readers
        return self._row._make([v if r is None or v is None else r(v) for r, v in zip(readers, raw, strict=True)])

    def _ask(self, database: Database, values: dict[str, Any]) -> list[Raw]:
        dialect = database.engine.dialect
        written = self._known.get(dialect)
        if written is None:
            written = self._known[dialect] = self._write(dialect, values)
        named = written.given | values
        with database.looker() as connection:
            cursor = connection.execute(
                written.sql, named if written.order is None else [named[name] for name in written.order]
            )
            rows: list[Raw] = cursor.fetchall()
            return rows

    def _write(self, dialect: Dialect, values: dict[str, Any]) -> _Written:
        """With values of the parameters as an example: SQLAlchemy wants some where it writes a constant into the statement."""
        compiled = self._statement.compile(dialect=dialect)
        whole = compiled.construct_expanded_state(values)
        order = list(whole.positiontup) if whole.positiontup is not None else None
        readers = [_reader(c.type, dialect) for c in self._statement.selected_columns]
        return _Written(whole.statement, dict(whole.parameters), order, readers)


def _reader(kind: Any, dialect: Dialect) -> Callable[[Any], Any] | None:
    """What makes a column's value of the driver's."""
    if isinstance(kind, JSON):  # text from both drivers (service/db.py)
        return json.loads
    reader: Callable[[Any], Any] | None = kind.dialect_impl(dialect).result_processor(dialect, None)
    return reader
