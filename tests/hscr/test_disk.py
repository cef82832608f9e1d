"""A full disk is known as one, whichever library met it. A limit on the size of files stands in for it: it needs no rights."""

from __future__ import annotations

import subprocess
import sys

from hscr.disk import is_full

CODE = """
import pathlib, resource, shutil, sys
import numpy as np
from safetensors.numpy import save_file
from hscr.artifacts import write_json
from hscr.disk import is_full
here = pathlib.Path(sys.argv[1])
(here / "folder").mkdir()
(here / "folder" / "large").write_bytes(bytes(10_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
ways = {
    "plain": lambda: (here / "x").write_bytes(bytes(10_000)),
    "json": lambda: write_json(here / "x.json", ["x" * 10_000]),
    "folder": lambda: shutil.copytree(here / "folder", here / "copy"),
    "tensors": lambda: save_file({"a": np.zeros(10_000)}, here / "x.safetensors"),
    "small": lambda: (here / "y").write_bytes(b"1"),
    "missing": lambda: (here / "none" / "y").write_bytes(b"1"),
}
for name, write in ways.items():
    try:
        write()
    except Exception as error:
        print(name, is_full(error))
    else:
        print(name, "written")
"""


def test_every_library_s_word_for_a_full_disk_is_understood(tmp_path: object) -> None:
    out = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    expected = ["plain True", "json True", "folder True", "tensors True", "small written", "missing False"]
    assert out.splitlines() == expected


def test_other_errors_are_not_a_full_disk() -> None:
    assert not is_full(ValueError("error 28 of 100"))
    assert not is_full(OSError("[Errno 2] x"))
