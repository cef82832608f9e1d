"""One run as a process group: started, read, stopped. Knows the run's contract (JSON lines on stdout, exit codes) and no database.

The run dies with this process: the kernel kills its leader when the supervisor dies (PR_SET_PDEATHSIG), and it is told whom to watch.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from service.events import LINE_MAX_BYTES, RunEvent, parse_run_event
from service.lifeline import PARENT_VARIABLE, die_with_parent
from service.settings import without_secrets

DONE, BAD_INPUT, STOPPED = 0, 2, 75


class Run:
    """A started run. `poll` reads its events; `stop` ends the whole group."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        threads: int,
        features: str = "off",
        inherit: Sequence[int] = (),
        fed: bool = False,
    ) -> None:
        """Start `command`. Its stderr goes to `log`, never into the service's own logs; `inherit` are files that it keeps open.

        `features`: the folder where it keeps image features, or `off`. `fed`: it is told on its standard input what to do (`tell`).
        """
        supervisor = os.getpid()
        environment = without_secrets()
        environment |= {PARENT_VARIABLE: str(supervisor), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["HSCR_FEATURE_CACHE"] = features
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if fed else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                process_group=0,
                pass_fds=inherit,
                preexec_fn=lambda: die_with_parent(supervisor),  # one C call: safe beside a store's idle thread
            )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._buffer, self._silent = b"", False
        self.pid = self._process.pid

    def poll(self) -> list[RunEvent]:
        """The events that arrived since the last call. Lines that are no event are dropped."""
        events: list[RunEvent] = []
        while True:
            try:
                chunk = os.read(self._pipe, 64 * 1024)
            except BlockingIOError:
                break
            if not chunk:
                self._silent = True
                break
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            if len(self._buffer) > LINE_MAX_BYTES:
                self._buffer = b"\x00"  # the rest of an endless line: no JSON, dropped when it ends
            events += [event for line in lines if (event := parse_run_event(line)) is not None]
            if len(events) >= 1000:
                break
        return events

    def tell(self, line: str) -> None:
        """Write a line to a run that is fed. One that has ended does not read it: `ended` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), f"{line}\n".encode())

    def wait(self, seconds: float) -> None:
        """Wait until it says something, at most so long."""
        if self._silent:
            time.sleep(seconds)
            return
        look = select.poll()
        look.register(self._pipe, select.POLLIN)
        look.poll(1000 * seconds)

    def ended(self) -> int | None:
        """The leader's exit status (negative: a signal), or None while it runs. Whatever it left running is killed."""
        if self._process.returncode is not None:
            return self._process.returncode
        # WNOWAIT leaves the leader a zombie, so that its number, which is the group's, cannot belong to anyone else yet.
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self._signal(signal.SIGKILL)
        return self._process.wait()

    def terminate(self) -> None:
        """Ask the group to stop: the run writes a checkpoint and exits with 75."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the group now and reap its leader."""
        if self._process.returncode is None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def drain(self, seconds: float = 2.0) -> list[RunEvent]:
        """What an ended run had still written."""
        events: list[RunEvent] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until and (more := self.poll()):
            events += more
        return events

    def close(self) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
