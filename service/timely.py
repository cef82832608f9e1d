"""The HTTP/1.1 protocol of the API's server: uvicorn's on httptools, with limits of what a client may send before it says something.

Bare, that parser keeps an endless header (150 MB in 160 s of copying, measured, without any key), every request of a pipeline and every
line after a chunked body, and waits for ever. So bytes that make neither a head nor a body are counted, and a head has its time. uvicorn's
other parser, h11, bounds bytes by itself and is Python: /healthz took 3.3 ms with it and 2.0 without (docs/decisions/0083).
It also calls a head broken whose method it has not heard of; that is for the routes to say (405, and what is allowed).
A head is sent with the first bytes of its body: uvloop sends at once whatever it is given, and each sending wakes the client.
uvicorn's own limit of connections (limit_concurrency) refuses probes too, in words of its own, and takes connections that say nothing.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.edge import CROWDED, METHODS

SPARE = (
    32  # connections beyond the limit on which probes are answered and others refused; further ones are closed unread
)
UNREAD_MAX_BYTES = 64 * 1024  # that have become no head and no body; what one look at the socket brings comes on top
_HEAD = b"HTTP/1.1 "
_METHOD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}) ")  # a token (RFC 9110, section 9.1)
PIPELINE_MAX = 16  # requests that wait for the answer to one before them


class _Refused(Exception):
    """Raised in a callback of the parser: uvicorn answers 400 and closes."""


class _Joined:
    """A transport that holds a response's head back until more is written, or until the loop's next turn."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD):  # so may a body that says so itself: it is sent no later than the next turn
            self._head = data
            self._loop.call_soon(self._next_turn)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _next_turn(self) -> None:
        if not self._transport.is_closing():  # the client may have gone in between
            self._flush()

    def _flush(self) -> None:
        if self._head:
            self.write(b"")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def timely(head_max_s: float, connections_max: int | None = None) -> type[asyncio.Protocol]:
    """The protocol class with these limits."""

    class Timely(HttpToolsProtocol):
        _late: asyncio.TimerHandle | None = None
        _unread = 0
        _read = False  # did these bytes end a head, or make some of a body?
        _in_head = _in_body = False
        _method: str | None = None  # of the head that comes, where the parser is shown another

        def connection_made(self, transport: Any) -> None:
            super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]
            self._late = self.loop.call_later(head_max_s, self.transport.close)
            if connections_max is not None and len(self.connections) > connections_max:
                self.app_state = {**self.app_state, CROWDED: True}
                if len(self.connections) > connections_max + SPARE:
                    self.transport.close()

        def data_received(self, data: bytes) -> None:
            self._read = False
            super().data_received(self._shown(data))
            self._unread = 0 if self._read else self._unread + len(data)
            if self._unread > UNREAD_MAX_BYTES and not self.transport.is_closing():
                self.send_400_response("Invalid HTTP request received.")
            if not self._waits():
                self._in_time()
            elif self._late is None:
                self._late = self.loop.call_later(head_max_s, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._in_time()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            self._in_head = True
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._in_head:  # what comes after a chunked body looks like headers too, and nobody may read it as such
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            hosts = sum(name == b"host" for name, _ in self.headers)
            if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):  # RFC 9112, section 3.2
                raise _Refused
            if len(self.pipeline) >= PIPELINE_MAX:
                raise _Refused
            super().on_headers_complete()
            self._in_head, self._in_body, self._read = False, True, True
            if self._method is not None:
                self.scope["method"], self._method = self._method, None  # the application has not begun
            if self.parser.should_upgrade():  # to nothing that is spoken here, and the parser drops what follows
                self.cycle.keep_alive = False

        def on_body(self, body: bytes) -> None:
            self._read = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._in_body, self._read = False, True
            super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            if self.cycle is None or self.cycle.response_complete:
                super().send_400_response(msg)
            else:  # not into the midst of an answer
                self.transport.close()

        def _shown(self, data: bytes) -> bytes:
            """What the parser gets: a head that begins with these bytes and has an unusual method as GET, which frames it the same way.

            In a pipeline, or where the word itself comes in pieces, such a head is broken as ever.
            """
            found = None if self._in_head or self._in_body else _METHOD.match(data)
            if found is None or found[1].decode("ascii") in METHODS:
                return data
            self._method = found[1].decode("ascii")
            return b"GET" + data[found.end(1) :]

        def _waits(self) -> bool:
            """For the rest of a head, or of a body whose answer has been given."""
            if self._in_body:
                return bool(self.cycle.response_complete)
            return self._in_head or not self._read

        def _in_time(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Timely
