"""Answers that are written where they are made: for the routes that are read most.

FastAPI takes what a handler in a thread returns to a second thread, checks there that it is what it says it is, and writes it in the event
loop. A pydantic model was checked when it was made. The route's description (OpenAPI) goes by the handler's annotations, as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from fastapi import Response
from pydantic import BaseModel

P = ParamSpec("P")


def written(handler: Callable[P, BaseModel]) -> Callable[P, Response]:
    """The handler with its model as a response, 200 and JSON. Not for handlers that set a status or headers by a parameter."""

    @wraps(handler)
    def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
        return in_json(handler(*args, **kwargs))

    return answer


def in_json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(by_alias=True), media_type="application/json")
