"""What tests of serving share: a real uvicorn server in a thread, and adapter versions in a registry. Not a test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from service import artifact_store
from service.db import Database
from service.models import Adapter, AdapterVersion, Alias
from tests.conftest import wait_for


@contextmanager
def served(app: Any, sock: socket.socket | None = None) -> Iterator[str]:
    """The address of a server that runs the app."""
    own = sock or socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=1, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([own],), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started, what="the server starts")
        yield f"http://127.0.0.1:{own.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        own.close()


def put_version(database: Database, data_dir: Path, folder: Path, name: str, number: int, model: str) -> str:
    """Store an adapter folder as a version, as an upload does; its digest."""
    from hscr.artifacts import write_manifest

    digest = write_manifest(folder)
    artifact_store.LocalStore.below(data_dir).put(artifact_store.adapter(digest), folder)
    with database.write() as session:
        if number == 1:
            session.add(Adapter(name=name, last_version=0))
            session.flush()
        session.get_one(Adapter, name).last_version = number
        session.add(
            AdapterVersion(
                adapter_name=name, version=number, digest=digest, model=model, source="upload", config={}, metrics={}
            )
        )
    return digest


def put_alias(database: Database, name: str, alias: str, number: int) -> None:
    with database.write() as session:
        session.add(Alias(adapter_name=name, alias=alias, version=number))
