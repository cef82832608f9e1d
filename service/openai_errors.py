"""Refusals in OpenAI's shape, for every path under /v1: {error: {message, type, param, code}}, as its clients expect them.

The code is the problem's own (service/errors.py), and so is the status. Knows no web framework.
"""

from __future__ import annotations

import re
from typing import Any

from service.errors import TABLE, Problem

PREFIX = "/v1/"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PARTS = ("body", "query", "path", "header")  # where a field stood: OpenAI names the field only
_KIND = re.compile(
    r"\.(int|float|constrained-float|literal\[.*)$"
)  # which kind of value a field that takes several was read as
SHOWN = 3

# For the OpenAPI document of routes under /v1.
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": "string", "description": "Stable; switch on this."},
            },
        }
    },
}
_RESPONSE: dict[str, Any] = {"description": "OpenAI's error", "content": {"application/json": {"schema": _SCHEMA}}}
RESPONSES: dict[int | str, dict[str, Any]] = {"default": _RESPONSE, 422: _RESPONSE}


def document(problem: Problem) -> dict[str, Any]:
    """The body. What a problem lists (fields, rows) stands in the message too, for that is what a client shows."""
    fields = [_field(e["field"]) for e in problem.extra.get("errors", ())]
    listed = [f"{f}: {e['reason']}" for f, e in zip(fields, problem.extra.get("errors", ()), strict=True)]
    listed += [f"line {row['line']}: {row['reason']}" for row in problem.extra.get("rejected", ())]
    detail = problem.detail + (f" ({'; '.join(listed[:SHOWN])})" if listed else "")
    kind = _TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    more = {"rejected": problem.extra["rejected"]} if "rejected" in problem.extra else {}
    param = problem.extra.get("param", fields[0] if fields else None)
    message = f"{TABLE[problem.code][1]}. {detail}"
    return {"error": {"message": message, "type": kind, "param": param, "code": problem.code, **more}}


def headers(problem: Problem) -> dict[str, str]:
    """OpenAI's clients send again after any 409; of ours only a request in flight is worth that."""
    again = problem.status != 409 or "Retry-After" in problem.headers
    return problem.headers | ({} if again else {"x-should-retry": "false"})


def _field(name: str) -> str:
    first, _, rest = name.partition(".")
    return _KIND.sub("", rest if first in _PARTS and rest else name)
