"""The web half of errors: every failure of a request becomes one problem document. The table itself is service/errors.py."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, DBAPIError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from hscr.disk import is_full
from service import openai_errors
from service.db import disk_is_full
from service.errors import Problem

MEDIA_TYPE = "application/problem+json"
_BY_STATUS = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}

# For the OpenAPI document: the shape of every error.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "code", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:hscr:problem:dataset_not_found"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "description": "Stable; switch on this."},
        "detail": {"type": "string"},
        "param": {"type": "string", "description": "The request's field that is meant, where it is one."},
        "request_id": {"type": "string"},
    },
}
_RESPONSE: dict[str, Any] = {
    "description": "A problem document (RFC 9457)",
    "content": {MEDIA_TYPE: {"schema": SCHEMA}},
}
RESPONSES: dict[int | str, dict[str, Any]] = {"default": _RESPONSE, 422: _RESPONSE}


class _Document(JSONResponse):
    def render(self, content: Any) -> bytes:
        """In ASCII: a field's name that a caller sent may hold half a surrogate pair, which UTF-8 cannot say."""
        return json.dumps(content, separators=(",", ":")).encode()


def answer(problem: Problem, scope: Scope) -> JSONResponse:
    """The problem's response, OpenAI's shape of it under /v1; its code noted for log and metrics."""
    scope["state"]["problem"] = problem.code
    if scope["path"].startswith(openai_errors.PREFIX):
        return _Document(openai_errors.document(problem), problem.status, headers=openai_errors.headers(problem))
    document = problem.document(scope["state"]["request_id"])
    return _Document(document, problem.status, headers=problem.headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Handlers for refusals, invalid fields, unknown routes and a database that is away."""

    @app.exception_handler(Problem)
    async def refused(request: Request, error: Problem) -> JSONResponse:
        return answer(error, request.scope)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(invalid_fields(error.errors()), request.scope)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if error.__cause__ is not None and is_full(error.__cause__):  # an upload that found no room beside the data
            return answer(_no_room(), request.scope)
        code = _BY_STATUS.get(error.status_code, "bad_request" if error.status_code < 500 else "internal")
        detail = "See /docs for the routes and what they take."
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework's own names the first route of the path only
            headers["Allow"] = allowed(request)
        problem = Problem(code, detail, headers=headers)
        return answer(problem, request.scope)

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> JSONResponse:
        if not is_full(error):
            raise error
        return answer(_no_room(), request.scope)

    @app.exception_handler(DBAPIError)
    async def database(request: Request, error: DBAPIError) -> JSONResponse:
        if isinstance(error, DataError):  # a NUL, or a number that no column holds: what a model let pass
            detail = "A name, text or number of the request is none that can be stored."
            return answer(Problem("invalid_request", detail), request.scope)
        if disk_is_full(error):
            return answer(_no_room(), request.scope)
        if not (error.connection_invalidated or type(error).__name__ in ("OperationalError", "InterfaceError")):
            raise error
        problem = Problem("database_unavailable", "Try again in a few seconds.", headers={"Retry-After": "5"})
        return answer(problem, request.scope)


def allowed(request: Request) -> str:
    """The methods of all routes that the path may mean."""
    found = set[str]()
    for route in request.app.router.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return ", ".join(sorted(found or {"GET", "HEAD"}))  # a folder of files has no route of its own


def _no_room() -> Problem:
    detail = (
        "Nothing was stored. Free some space on the disk of the data folder or of the database, then send it again."
    )
    return Problem("disk_full", detail, headers={"Retry-After": "60"})


def invalid_fields(errors: Any) -> Problem:
    """Which fields are wrong and how; never what was in them."""
    fields = [
        {
            "field": ".".join(str(p)[:80] for p in e["loc"][:8]) or "body",
            "reason": str(e["msg"]).removeprefix("Value error, ")[:200],
        }
        for e in list(errors)[:20]
    ]
    return Problem("invalid_request", "Correct the fields named in `errors`.", errors=fields)
