"""Server-sent events (WHATWG HTML 9.2) over HTTP: how one is written, and the response that sends them past proxies as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable
from typing import Any

from fastapi.responses import StreamingResponse

TYPE = "text/event-stream"


def event(name: str, data: Any, number: int | None = None) -> str:
    """One event with JSON data; `number` is its id, which a client names when it comes back."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data)}\n\n"


def event_stream(texts: AsyncIterable[str]) -> StreamingResponse:
    """Nothing on the way may keep or collect them: nginx would, without the second header."""
    return StreamingResponse(texts, media_type=TYPE, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
