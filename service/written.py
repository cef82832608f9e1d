"""Answers that are written where they are made, in few threads: for the routes that are read most.

FastAPI takes what a handler in a thread returns to a second thread, checks there that it is what it says it is, and writes it in the event
loop. A pydantic model was checked when it was made. The route's description (OpenAPI) goes by its `response_model`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from cachetools import TTLCache, cached
from fastapi import Response
from pydantic import BaseModel

# A read is mostly Python: more of them at once wait for the interpreter's lock, and keep the event loop waiting for it (decision 0083).
READERS = 3
_LIMITER: RunVar[CapacityLimiter | None] = RunVar("readers")
P = ParamSpec("P")
KEPT_S = 60  # what a caller deletes or replaces is not remembered for longer


def written(handler: Callable[P, BaseModel | str]) -> Callable[P, Awaitable[Response]]:
    """The handler with its model, or the JSON that it wrote itself, as a response. Not for handlers that set a status or headers."""

    @wraps(handler)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
        def made() -> Response:
            found = handler(*args, **kwargs)
            text = found if isinstance(found, str) else found.model_dump_json(by_alias=True)
            return Response(text, media_type="application/json")

        return await to_thread.run_sync(made, limiter=_readers())

    return answer


def kept(max_bytes: int) -> Callable[[Callable[..., str]], Any]:
    """A text is made once for equal arguments within a minute; of all texts the last ones, so many bytes in all. Thread-safe."""
    # A text's arguments are the row that it was made of: as long again.
    cache: TTLCache[Any, str] = TTLCache(max_bytes, KEPT_S, getsizeof=lambda text: 2 * len(text) + 1000)
    return cached(cache, lock=Lock(), info=True)


def _readers() -> CapacityLimiter:
    """One an event loop."""
    found = _LIMITER.get(None)
    if found is None:
        _LIMITER.set(found := CapacityLimiter(READERS))
    return found
