"""What surrounds every request: its id, a log line of ids and numbers, metrics, the limit of its body, and the last net for exceptions.

Plain ASGI, so that streams pass through unbuffered. Logs hold no question, file name or query string; of an unexpected exception they hold
its type and where it was raised, not its text.
"""

from __future__ import annotations

import logging
import re
import time
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs, tracing
from service.errors import Problem
from service.metrics import Metrics
from service.problems import answer
from service.settings import Settings

log = logging.getLogger("hscr.http")
_ADAPTER_UPLOAD = re.compile(r"^/adapters/[^/]+/versions/?$")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # a label: callers may send any word
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._\-]{1,64}$")


class Edge:
    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.match(given) else f"req_{uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        s = self.settings
        limit = s.upload_max_bytes if scope["path"] == "/datasets" else s.body_max_bytes
        if scope["method"] == "POST" and _ADAPTER_UPLOAD.match(scope["path"]):
            limit = s.adapter_max_bytes + 2**20
        guard = _Guard(receive, send, request_id, limit)
        with logs.bound(request_id=request_id), tracing.span("request", headers, request_id=request_id) as span:
            begin = time.perf_counter()
            await self._served(scope, receive, guard, headers.get(b"content-length", b"0"))
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(method, route, str(guard.status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            told = {"method": method, "route": route, "status": guard.status}
            if (code := scope["state"].get("problem")) is not None:
                self.metrics.refusals.labels(code).inc()
                told["problem"] = code
            span.set(**told)
            log.info("request", extra=told | {"ms": round(seconds * 1000, 1)})

    async def _served(self, scope: Scope, receive: Receive, guard: _Guard, declared: bytes) -> None:
        """The application's response, or the refusal of a body above the limit, or of what it raised a problem without its text."""
        try:
            if declared.isdigit() and int(declared[:20]) > guard.limit:
                guard.too_large = True
            else:
                await self.app(scope, guard.receive, guard.send)
        except _TooLarge:
            pass
        except Exception as error:
            where = logs.place(error.__traceback__)
            log.error("request %s: %s", guard.request_id, type(error).__name__, extra={"where": where})
            if guard.status is None:
                problem = Problem("internal", "This is a fault of the service; its log has the request id.")
                await answer(problem, scope)(scope, receive, guard.send_through)
        if guard.too_large and guard.status is None:
            detail = f"At most {guard.limit} bytes are read here."
            problem = Problem("body_too_large", detail, headers={"Connection": "close"})
            await answer(problem, scope)(scope, receive, guard.send_through)


class _TooLarge(Exception):
    pass


class _Guard:
    """Counts a request's body, stamps its response, and remembers whether one was begun."""

    def __init__(self, receive: Receive, send: Send, request_id: str, limit: int) -> None:
        self._receive, self._send, self._left = receive, send, limit
        self.request_id, self.limit = request_id, limit
        self.status: int | None = None
        self.too_large = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                self.too_large = True
                raise _TooLarge
        return message

    async def send(self, message: Message) -> None:
        if self.too_large and self.status is None:
            return  # whatever the application makes of its cut body: the refusal is ours
        await self.send_through(message)

    async def send_through(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            stamp = [(b"x-request-id", self.request_id.encode()), (b"x-content-type-options", b"nosniff")]
            message["headers"] = [*message.get("headers", []), *stamp]
        await self._send(message)
