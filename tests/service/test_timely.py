"""A response's head is sent with its body; alone only where nothing follows at once."""

from __future__ import annotations

import asyncio

from service.timely import _Joined


class Wire:
    """What a transport was given to send, in pieces."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def close(self) -> None:
        self.sent.append(b"closed")

    def is_closing(self) -> bool:
        return b"closed" in self.sent


def test_head_and_body_are_one_piece_and_a_head_alone_does_not_wait() -> None:
    async def answers() -> list[bytes]:
        wire = Wire()
        joined = _Joined(wire, asyncio.get_running_loop())
        joined.write(b"HTTP/1.1 200 OK\r\n\r\n")
        joined.write(b"body")
        joined.write(b"more")
        joined.write(b"HTTP/1.1 200 OK\r\n\r\n")  # of a stream whose first event comes later
        await asyncio.sleep(0)
        joined.write(b"event")
        joined.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert not joined.is_closing()
        joined.close()
        await asyncio.sleep(0)
        return wire.sent

    ok, bad = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"
    assert asyncio.run(answers()) == [ok + b"body", b"more", ok, b"event", bad, b"closed"]


def test_a_head_for_a_client_that_has_gone_is_dropped() -> None:
    async def answers() -> list[bytes]:
        wire = Wire()
        joined = _Joined(wire, asyncio.get_running_loop())
        joined.write(b"HTTP/1.1 200 OK\r\n\r\n")
        wire.close()  # by the other side
        await asyncio.sleep(0)
        return wire.sent

    assert asyncio.run(answers()) == [b"closed"]
