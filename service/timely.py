"""The HTTP/1.1 protocol of the API's server: uvicorn's on h11, with a limit of time for a request's line and headers, and of connections.

h11, because it bounds their size: with uvicorn's other parser an endless header took all memory and, by its copying, minutes of the event
loop (measured: 150 MB in 160 s), without any key. Neither gives up on a client that sends its headers a byte a minute. uvicorn's own limit
(limit_concurrency) refuses probes too, in words of its own, and takes connections that say nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.edge import CROWDED

SPARE = (
    32  # connections beyond the limit on which probes are answered and others refused; further ones are closed unread
)


def timely(head_max_s: float, connections_max: int | None = None) -> type[asyncio.Protocol]:
    """The protocol class with these limits."""

    class Timely(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._late = self.loop.call_later(head_max_s, self.transport.close)
            if connections_max is not None and len(self.connections) > connections_max:
                self.app_state = {**self.app_state, CROWDED: True}
                if len(self.connections) > connections_max + SPARE:
                    self.transport.close()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waits = self.conn.their_state is h11.IDLE  # for the rest of a request's head
            if not waits:
                self._in_time()
            elif self._late is None:
                self._late = self.loop.call_later(head_max_s, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._in_time()
            super().connection_lost(exc)

        def _in_time(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Timely
