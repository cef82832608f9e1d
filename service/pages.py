"""Cursor pages, the one shape of every list: {data, has_more, next}."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

T = TypeVar("T")
Row = TypeVar("Row")

Limit = Annotated[int, Query(ge=1, le=500, description="Most rows of a page.")]
After = Annotated[
    str | None, Query(max_length=80, pattern=r"^[A-Za-z0-9._\-]+$", description="The `next` of the page before.")
]


def after_id(prefix: str) -> Any:
    """`after` of a list whose cursor is an id (service/models.py `new_id`): else whatever is sent sorts somewhere, and a page lies."""
    pattern = rf"^({prefix})_[0-9a-f]{{28}}$"
    return Query(max_length=60, pattern=pattern, description="The `next` of the page before.")


AfterJob = Annotated[str | None, after_id("job")]
AfterDataset = Annotated[str | None, after_id("ds")]
AfterKey = Annotated[str | None, after_id("key")]
AfterDelivery = Annotated[str | None, after_id("msg")]
AfterNumber = Annotated[int, Query(ge=0, le=2**53, description="The `next` of the page before.")]


class Page(BaseModel, Generic[T]):
    data: list[T]
    has_more: bool
    next: str | None = Field(description="Pass as `after` to go on; null on the last page.")


def page(rows: Sequence[Row], limit: int, view: Callable[[Row], Any], cursor: Callable[[Row], Any]) -> dict[str, Any]:
    """A page of `rows`, which were asked for with one row more than `limit`."""
    shown, more = rows[:limit], len(rows) > limit
    return {"data": [view(r) for r in shown], "has_more": more, "next": str(cursor(shown[-1])) if more else None}


def page_text(rows: Sequence[tuple[Any, str]], limit: int) -> str:
    """The same as JSON, of rows that are written already: the cursor and the text of each."""
    shown, more = rows[:limit], len(rows) > limit
    cursor = json.dumps(str(shown[-1][0])) if more else "null"
    data = ",".join(text for _, text in shown)
    return f'{{"data":[{data}],"has_more":{"true" if more else "false"},"next":{cursor}}}'
