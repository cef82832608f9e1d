"""`python -m service.serve`: the API under uvicorn, with an orderly end.

At SIGTERM it says that it is not ready, streams end, and no further question is taken. Its port stays open until those that were taken are
answered: a probe meanwhile finds a process that lives, and a client one that tells it to come again.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from service import logs
from service.app import create_app
from service.engine import LocalEngine
from service.freed_memory import keep_freed_memory
from service.lifeline import watch_parent
from service.settings import Settings, settings_or_exit
from service.state import State
from service.timely import timely

DRAIN_S = 15  # for all that was taken when the signal came


class Server(uvicorn.Server):
    """uvicorn's server that tells the application at once when a signal asks for the end, and closes its port last."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the inherited one: it raises the signal again after the orderly end, and the exit status would say "killed".
        self._state.draining.set()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own begins with closing the port."""
        until = time.monotonic() + DRAIN_S
        while self._state.asked and not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self.config.timeout_graceful_shutdown = max(1, round(until - time.monotonic()))
        await super().shutdown(sockets)


def main(make_engine: Callable[[Settings], LocalEngine] | None = None) -> int:
    """Serve until a signal. `make_engine` is for tests."""
    watch_parent()
    keep_freed_memory()
    settings = settings_or_exit()
    logs.configure("api", settings.log)
    try:
        app = create_app(settings, make_engine(settings) if make_engine else None)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,  # service/logs.py
        access_log=False,  # it would log whole paths; service/edge.py logs routes
        server_header=False,
        http=timely(settings.head_max_s, settings.connections_max),
        ws="none",
        timeout_keep_alive=15,
    )
    gc.collect()
    gc.freeze()  # what lives as long as the process need not be looked through again and again while all requests wait
    gc.set_threshold(20_000, 20, 50)  # a request makes thousands of objects and leaves no cycles
    server = Server(config, app.state.hscr)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
