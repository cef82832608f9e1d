"""The end of the API's server: what was taken is answered, and until then probes are, and further questions are sent away."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

from service.app import create_app
from service.serve import Server
from service.settings import Settings
from tests.conftest import wait_for
from tests.service.test_vqa import Echo, body

pytestmark = pytest.mark.either_database


@pytest.fixture
def engine(settings: Settings) -> Iterator[Echo]:
    made = Echo(settings)
    yield made
    made.gate.set()


def test_the_port_stays_open_until_what_was_taken_is_answered(settings: Settings, engine: Echo) -> None:
    app, sock = create_app(settings, engine), socket.create_server(("127.0.0.1", 0))
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False), app.state.hscr)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"

    def get(path: str) -> httpx.Response:
        """On a connection of its own, as a probe's are."""
        return httpx.get(address + path, trust_env=False, timeout=5)

    wait_for(lambda: server.started and get("/readyz").status_code == 200, 20, "it is ready")
    engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(httpx.post, f"{address}/vqa", json=body(), trust_env=False, timeout=20)
        wait_for(lambda: engine.asked, 10, "the engine works on it")
        server.handle_exit(signal.SIGTERM, None)  # what the signal calls
        wait_for(lambda: not server.started or get("/readyz").status_code == 503, 5, "it is not ready")
        threading.Event().wait(0.5)  # uvicorn looks for its end ten times a second
        assert (get("/healthz").status_code, get("/readyz").json()["draining"]) == (200, True)
        late = httpx.post(f"{address}/vqa", json=body(), trust_env=False, timeout=5)
        assert (late.status_code, late.json()["code"], late.headers["retry-after"]) == (503, "draining", "5")
        engine.gate.set()
        assert taken.result(10).status_code == 200
    thread.join(10)
    assert not thread.is_alive()
    sock.close()
    with pytest.raises(httpx.ConnectError):
        get("/healthz")
