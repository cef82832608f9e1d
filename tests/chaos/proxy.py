"""A fault proxy: TCP links from each part of the service to each server, whose network can be made bad one by one.

A link passes bytes, or is for a bounded time `slow` (every piece is late), `reset` (connections are torn down by RST, new ones too),
`silent` (connections are accepted and nothing is ever answered) or `half` (the server's side says goodbye, the client's stays open).
Knows bytes only: neither PostgreSQL nor Valkey. It lives in a thread with an event loop of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any

MODES = ("slow", "reset", "silent", "half")
SLOW_S = 0.25
_RST = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close() sends RST


class Link:
    """One listening port that leads to another. `mode` is what its network does now."""

    def __init__(self, target: int) -> None:
        self.target, self.port, self.mode = target, 0, "pass"
        self._healed = asyncio.Event()
        self._healed.set()
        self._epoch = 0
        self._open: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.server: asyncio.Server | None = None

    async def listen(self) -> None:
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def spoil(self, mode: str, seconds: float) -> None:
        """Bad for so long. A later call takes the place of an earlier one."""
        self._epoch += 1
        self.mode = mode
        self._healed.clear() if mode == "silent" else self._healed.set()
        for client, _ in list(self._open):
            if mode == "reset":
                _tear(client)
            elif mode == "half":
                _half_close(client)
        asyncio.get_running_loop().call_later(seconds, self._heal, self._epoch)

    def _heal(self, epoch: int) -> None:
        if epoch == self._epoch:
            self.mode = "pass"
            self._healed.set()

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self.mode == "silent":
            await self._healed.wait()
            _tear(client)  # whoever asked into the silence is never answered
            return
        if self.mode == "reset":
            _tear(client)
            return
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _tear(client)
            return
        pair = (client, server)
        self._open.add(pair)
        try:
            await asyncio.gather(self._pump(reader, server), self._pump(answers, client))
        finally:
            self._open.discard(pair)
            for writer in pair:
                _tear(writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while data := await reader.read(64 * 1024):
                if self.mode == "slow":
                    await asyncio.sleep(random.uniform(0, SLOW_S))
                await self._healed.wait()  # while it is silent
                if not writer.is_closing() and not getattr(writer, "said_goodbye", False):
                    writer.write(data)
                    await writer.drain()
        _half_close(writer)


class Proxy:
    """All links, by the names of who connects and to what."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="fault-proxy")
        self._thread.start()
        self.links: dict[tuple[str, str], Link] = {}

    def link(self, client: str, server: str, target: int) -> int:
        """Open a link; the port on which `client` finds `server`."""

        async def opened() -> Link:
            made = Link(target)
            await made.listen()
            return made

        made = self.links[client, server] = self._call(opened())
        return made.port

    def spoil(self, name: tuple[str, str], mode: str, seconds: float) -> None:
        self._call(self.links[name].spoil(mode, seconds))

    def heal(self) -> None:
        for name in self.links:
            self.spoil(name, "pass", 0)

    def close(self) -> None:
        async def end() -> None:
            for made in self.links.values():
                assert made.server is not None
                made.server.close()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


def _tear(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    writer.transport.abort()


def _half_close(writer: asyncio.StreamWriter) -> None:
    writer.said_goodbye = True  # type: ignore[attr-defined]
    with contextlib.suppress(OSError, RuntimeError):
        if writer.can_write_eof():
            writer.write_eof()
