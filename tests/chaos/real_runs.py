"""`python -m tests.chaos.real_runs SOCKET ARGUMENTS…`: forks real `hscr` runs for tests/chaos/run.py, with torch imported once.

ARGUMENTS are those of a run that is done first, so that all that libraries load late is there too.
A run is the command line's very own: model, data, run directory, all stages. Left out: the estimate before it and the report's figures,
which cost more than such a tiny run. It is in the process group of whoever asked, holds the same files, and dies with it.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import hscr.align
import hscr.cli
import hscr.cli_model
import hscr.plan
import hscr.report
from service.lifeline import die_with_parent

MESSAGE_MAX = 256 * 1024


def serve(path: str, first: list[str]) -> None:
    hscr.cli_model.planned = lambda *_: None
    hscr.report._figures = lambda *_: {}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: no zombies
    here = os.getpid()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(16)
        sys.argv = ["hscr", "align", *first]
        with contextlib.suppress(SystemExit):
            hscr.cli.main()
        print("ready", flush=True)
        while True:
            asking, _ = listening.accept()
            with asking:
                told, files = _receive(asking)
                if told is not None and os.fork() == 0:
                    listening.close()
                    _run(asking, told, files, here)
            for file in files:
                os.close(file)


def _receive(asking: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """What is asked for and the asker's files; None where it died over it."""
    files = array.array("i")
    data, ancillary, _, _ = asking.recvmsg(MESSAGE_MAX, socket.CMSG_SPACE(64 * files.itemsize))
    for _, _, content in ancillary:
        files.frombytes(content[: len(content) // files.itemsize * files.itemsize])
    while data and not data.endswith(b"\n"):
        more = asking.recv(MESSAGE_MAX)
        data = data + more if more else b""
    return (json.loads(data) if data else None), files.tolist()


def _run(asking: socket.socket, told: dict[str, Any], files: list[int], server: int) -> None:
    code = 1
    try:
        die_with_parent(server)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, told["group"])
        for file, number in zip(files, told["files"], strict=True):
            if number in (0, 1, 2):
                os.dup2(file, number)  # the others are locks: to hold them is enough
        os.environ.clear()
        os.environ.update(told["env"] | {"HSCR_PARENT_PID": str(server)})
        threading.Thread(target=_die_with, args=(asking,), daemon=True).start()
        sys.argv = ["hscr", *told["argv"]]
        hscr.cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        asking.sendall(str(code).encode())
        os._exit(code)


def _die_with(asking: socket.socket) -> None:
    if asking.recv(1) == b"":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
