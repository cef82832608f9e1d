"""More connections than the service keeps: refused in order, while who is connected and who watches the service go on."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx

from service.timely import SPARE
from tests.abuse.rig import CONNECTIONS, Rig
from tests.conftest import wait_for

ASK = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def test_beyond_the_limit_only_probes_are_answered_and_room_comes_back(
    rig: Rig, untouched: None, refused: Callable[..., Any]
) -> None:
    assert rig.http.get("/jobs").status_code == 200  # a connection that stays
    held: list[socket.socket] = []

    def connected() -> bytes:
        """What one more connection, which then stays open, is answered."""
        held.append(socket.create_connection(("127.0.0.1", rig.port), 20))
        with suppress(ConnectionError):
            held[-1].sendall(ASK)
            return held[-1].recv(65536)
        return b""

    with httpx.Client(base_url=str(rig.http.base_url), trust_env=False, timeout=20) as late:
        try:
            while len(held) < CONNECTIONS:
                assert b" 200 " in connected().splitlines()[0]
            for _ in range(3):  # each on a connection of its own, for a refused one is closed
                answer = late.get("/jobs")
                refused(answer, "too_many_connections")
                assert answer.headers["retry-after"] == "5"
            answer = late.post("/v1/chat/completions", json={"model": "x", "messages": []})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
            for path in ("/healthz", "/readyz", "/metrics"):
                assert late.get(path).status_code == 200
            assert rig.http.get("/jobs").status_code == 200
            while len(held) < CONNECTIONS + SPARE - 2:
                assert b" 200 " in connected().splitlines()[0]
            flood = [connected() for _ in range(40)]
            assert flood.count(b"") >= 38  # closed unread
        finally:
            for connection in held:
                connection.close()
        wait_for(lambda: late.get("/jobs").status_code == 200, 10)
