"""What surrounds every request: its id, a log line of ids and numbers, metrics, the limits of its body, and the last net for exceptions.

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
from service.body import Body, BodyLimits, BodyRefused
from service.errors import Problem
from service.metrics import Metrics
from service.problems import answer
from service.settings import Settings

log = logging.getLogger("hscr.http")
_UPLOADS = ("/datasets", "/v1/files")
_ADAPTER_UPLOAD = re.compile(r"^/adapters/[^/]+/versions/?$")
CROWDED = "crowded"  # in the state of requests on connections beyond the limit (service/timely.py)
_PROBES = ("/healthz", "/readyz", "/metrics")  # whoever watches the service must see it when it is crowded
_LATER = {"Retry-After": "5", "Connection": "close"}
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # a label: callers may send any word
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
        body = Body(receive, headers, self._limits(scope, headers.get(b"content-type", b"")))
        guard = _Guard(body, send, request_id)
        with logs.bound(request_id=request_id), tracing.span("request", headers, request_id=request_id) as span:
            begin = time.perf_counter()
            await self._served(scope, receive, guard)
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(method, route, str(guard.status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            told = {"method": method, "route": route, "status": guard.status}
            if (code := scope["state"].get("problem")) is not None:
                self.metrics.refusals.labels(code).inc()
                told["problem"] = code
            span.set(**told)
            log.info("request", extra=told | {"ms": round(seconds * 1000, 1)})

    def _limits(self, scope: Scope, content_type: bytes) -> BodyLimits:
        s, upload, setting = self.settings, None, ""
        if scope["method"] == "POST" and content_type.lower().startswith(b"multipart/form-data"):
            if scope["path"].rstrip("/") in _UPLOADS:
                upload, setting = s.upload_max_bytes, "HSCR_UPLOAD_MAX_BYTES"
            elif _ADAPTER_UPLOAD.match(scope["path"]):
                upload, setting = s.adapter_max_bytes + 2**20, "HSCR_ADAPTER_MAX_BYTES"
        if upload is not None:
            return BodyLimits(upload, s.body_pause_max_s, None, setting)
        return BodyLimits(s.body_max_bytes, s.body_pause_max_s, s.body_max_s, "HSCR_BODY_MAX_BYTES")

    async def _served(self, scope: Scope, receive: Receive, guard: _Guard) -> None:
        """The application's response, or the refusal of a body, or of what it raised a problem without its text."""
        if CROWDED in scope["state"] and scope["path"] not in _PROBES:
            problem = Problem("too_many_connections", "Ask again in a few seconds.", headers=_LATER)
            await answer(problem, scope)(scope, receive, guard.send_through)
            return
        try:
            guard.body.check_headers()
            await self.app(scope, guard.body.receive, guard.send)
        except BodyRefused:
            pass
        except Exception as error:
            where = logs.place(error.__traceback__)
            log.error("request %s: %s", guard.request_id, type(error).__name__, extra={"where": where})
            if guard.status is None and guard.body.refused is None:
                problem = Problem("internal", "This is a fault of the service; its log has the request id.")
                await answer(problem, scope)(scope, receive, guard.send_through)
        if guard.body.refused is not None and guard.status is None:
            await answer(guard.body.refused, scope)(scope, receive, guard.send_through)


class _Guard:
    """Stamps a request's response, remembers whether one was begun, and lets none pass in place of the refusal of its body."""

    def __init__(self, body: Body, send: Send, request_id: str) -> None:
        self.body, self._send, self.request_id = body, send, request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if self.body.refused is not None and self.status is None:
            return  # whatever the application makes of its cut body: the refusal is ours
        await self.send_through(message)

    async def send_through(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            stamp = [(b"x-request-id", self.request_id.encode()), (b"x-content-type-options", b"nosniff")]
            message["headers"] = [*message.get("headers", []), *stamp]
        await self._send(message)
