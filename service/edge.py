"""What surrounds every request: its id, a log line of ids and numbers, metrics, the limit of its body, and the last net for exceptions.

Plain ASGI, so that streams pass through unbuffered. Logs hold no question, file name or query string; of an unexpected exception they hold
its type and where it was raised, not its text.
"""

from __future__ import annotations

import logging
import re
import time
import traceback
from pathlib import Path
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Problem
from service.metrics import Metrics
from service.problems import problem_response
from service.settings import Settings

log = logging.getLogger("hscr.http")
_ADAPTER_UPLOAD = re.compile(r"^/adapters/[^/]+/versions/?$")
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
        begin = time.perf_counter()
        try:
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > limit:
                guard.too_large = True
            else:
                await self.app(scope, guard.receive, guard.send)
        except _TooLarge:
            pass
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
            log.error("request %s: %s raised at %s", request_id, type(error).__name__, where)
            if guard.status is None:
                problem = Problem("internal", "This is a fault of the service; its log has the request id.")
                await problem_response(problem, request_id, scope["path"])(scope, receive, guard.send_through)
        if guard.too_large and guard.status is None:
            problem = Problem(
                "body_too_large", f"At most {limit} bytes are read here.", headers={"Connection": "close"}
            )
            await problem_response(problem, request_id, scope["path"])(scope, receive, guard.send_through)
        seconds = time.perf_counter() - begin
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.requests.labels(scope["method"], route, str(guard.status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        log.info("%s %s %s %s %.1f ms", request_id, scope["method"], route, guard.status, seconds * 1000)


class _TooLarge(Exception):
    pass


class _Guard:
    """Counts a request's body, stamps its response, and remembers whether one was begun."""

    def __init__(self, receive: Receive, send: Send, request_id: str, limit: int) -> None:
        self._receive, self._send, self._request_id, self._left = receive, send, request_id, limit
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
            stamp = [(b"x-request-id", self._request_id.encode()), (b"x-content-type-options", b"nosniff")]
            message["headers"] = [*message.get("headers", []), *stamp]
        await self._send(message)
