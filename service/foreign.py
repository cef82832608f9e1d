"""Foreign layouts at the door of the API: told from our own, and converted in a child process (service/import_child.py).

Its refusals become fixed sentences here: the import's own messages name files and quote them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hscr.data_url import is_data_url
from hscr.readers import LAYOUTS
from hscr.readers.rows import first_object, label_files
from hscr.records import is_preference
from service.errors import Problem
from service.lifeline import PARENT_VARIABLE

_OURS = {"id", "question", "answer"}
_REFUSALS = {
    "layout": "Its layout (or the split asked for) is not there. Read are records.jsonl with its images, and: "
    + "; ".join(f"{layout.name}: {layout.looks_like}" for layout in LAYOUTS.values())
    + ".",
    "large": "It has more rows, or images of more bytes, than this service takes.",
    "memory": "Reading its labels needs more memory than an import gets (HSCR_IMPORT_MEMORY_MAX_BYTES). Send it in parts.",
    "damaged": "A file of labels is damaged, larger than 512 MiB, a pickle of more than plain data, or has no such split.",
}


@dataclass(frozen=True)
class Reading:
    """How an upload is to be read, and what the child process may use."""

    layout: str = "auto"
    split: str | None = None
    languages: tuple[str, ...] = ("en",)
    memory_bytes: int = 4 * 2**30
    seconds: float = 3600


def is_ours(source: Path) -> bool:
    """Whether a folder looks like our own layout: records.jsonl, or a .jsonl of rows with our fields or of preference records."""
    return (source / "records.jsonl").is_file() or any(
        (row.keys() >= _OURS and row.keys() & {"image", "images"} and not is_data_url(row.get("image")))
        or is_preference(row)
        for row in map(first_object, label_files(source, ".jsonl"))
    )


def convert(source: Path, out: Path, reading: Reading, rows_max: int, bytes_max: int) -> dict[str, Any]:
    """Import `source` into the new folder `out`; what its import.json says. Raises Problem."""
    order = {
        "source": str(source.resolve()),
        "out": str(out.resolve()),
        "layout": reading.layout,
        "split": reading.split,
        "languages": reading.languages,
        "memory_bytes": reading.memory_bytes,
        "rows_max": rows_max,
        "bytes_max": bytes_max,
    }
    names = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "HOME", "TMPDIR")  # no key, no database address
    environment = {k: os.environ[k] for k in names if k in os.environ} | {PARENT_VARIABLE: str(os.getpid())}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "service.import_child", json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a traceback may quote a file
            env=environment,
            timeout=reading.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Problem("invalid_archive", "Importing it takes too long (HSCR_IMPORT_MAX_S). Send it in parts.") from None
    # A library that is refused memory may end the process rather than raise.
    said = json.loads(done.stdout) if done.returncode == 0 else {"refused": "memory"}
    if said.get("refused") == "empty":
        raise Problem("dataset_empty", "Every row was rejected; `rejected` says why.", rejected=said["rejected"])
    if said:
        raise Problem("invalid_archive", _REFUSALS[said["refused"]])
    report: dict[str, Any] = json.loads((out / "import.json").read_text(encoding="utf-8"))
    return report
