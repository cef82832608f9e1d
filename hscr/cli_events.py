"""A run on the command line: its events printed as lines or drawn as bars, and signals that stop it after a checkpoint."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.markup import escape

from hscr.cli_options import console
from hscr.events import Error, Event, Stopped, to_line
from hscr.progress import draw

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped after a checkpoint, the same command goes on


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """SIGTERM and the first Ctrl-C ask the run to stop after its next checkpoint; the second Ctrl-C stops it at once.

    A run that a supervisor started (HSCR_PARENT_PID) dies with it: a killed supervisor's run must never write beside the next attempt.
    """
    stop = threading.Event()

    def ask(signum: int, frame: object) -> None:
        if stop.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        console.print("stopping after a checkpoint…")

    before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    parent = int(os.environ.get("HSCR_PARENT_PID", "0"))
    if parent:

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(EXIT_STOPPED)

        threading.Thread(target=watch, daemon=True).start()
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def refuse(code: str, message: str) -> None:
    """Say why the command ends, in the form that it prints in."""
    if "--events=json" in sys.argv or "--events json" in " ".join(sys.argv):
        sys.stdout.write(to_line(Error(code, message)) + "\n")
        sys.stdout.flush()
    else:
        console.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)


def lines(stop: threading.Event) -> Iterator[str]:
    """Lines of standard input that say something, until it ends. Raises Stopped where the run is asked to stop before the next."""
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as file:
        while not stop.is_set():
            if not select.select([file], [], [], 0.5)[0]:  # nothing of a further line lies in a buffer
                continue
            if not (line := file.readline()):
                return
            if line := line.strip():
                yield line.decode("utf-8", "replace")
    raise Stopped("generating")


def show(events: Iterable[Event], mode: str) -> None:
    """Print events as JSON lines, or draw them as progress bars."""
    if mode == "json":
        for event in events:
            sys.stdout.write(to_line(event) + "\n")
            sys.stdout.flush()
    elif mode == "progress":
        draw(events, console)
    else:
        raise ValueError("--events: must be progress or json")
