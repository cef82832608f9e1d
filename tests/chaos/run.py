"""The run program of the rig: the stand-in, or for the data set that CHAOS_REAL names the real `hscr align` (tests/chaos/real_runs.py).

It holds a lock of the witness's own while it works, and leaves a note where another run of its job holds it: two runs of one job at once
are what the lock of the run's folder is there to prevent. A stand-in run whose seed is LONG can outlive its supervisor's lease. With
--generate it is a helper's: any number of those may work beside the run.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TextIO

LONG, SHARED = 1, 2  # seeds


def main() -> int:
    helps = "--generate" in sys.argv
    lock = None if helps else witnessed()
    if any(os.environ.get("CHAOS_REAL", "-") in argument for argument in sys.argv[1:3]):
        return real(helps)
    seed = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())["seed"]
    os.environ["STAND_IN"] = os.environ[{LONG: "CHAOS_LONG", SHARED: "CHAOS_SHARED"}.get(seed, "CHAOS_SHORT")]
    from tests.worker import stand_in

    try:
        return stand_in.run()
    finally:
        if lock is not None:
            lock.close()


def witnessed() -> TextIO:
    """The witness's lock, held until this process and its children are gone."""
    job = Path(sys.argv[sys.argv.index("--out") + 1]).parent.name
    witness = Path(os.environ["CHAOS_WITNESS"])
    lock = (witness / f"{job}.lock").open("w")
    os.set_inheritable(lock.fileno(), True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (witness / f"{job}.overlap").touch()
    return lock


def real(helps: bool) -> int:
    """Have the server fork a run with all of this process's files, and end as it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run is in this process's group and gets it too
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["CHAOS_REAL_SOCKET"])
        held = [n for n in range(64) if n != server.fileno() and Path(f"/proc/self/fd/{n}").exists()]
        told = {
            "argv": ["generate", *sys.argv[2:]] if helps else ["align", *sys.argv[1:]],
            "env": dict(os.environ),
            "group": os.getpgrp(),
            "files": held,
        }
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", held))]
        server.sendmsg([json.dumps(told).encode() + b"\n"], ancillary)
        answer = server.recv(16)
    return int(answer) if answer else 1


if __name__ == "__main__":
    sys.exit(main())
