"""A run directory: locked by one process, with a manifest that says which stage is whole for which inputs.

A stage is skipped when its inputs' digest and its outputs' digests match the manifest. Partial outputs are append-only JSONL files that a
resumed stage cuts back to whole batches, so that it goes on with the very batches of the uninterrupted run.
"""

from __future__ import annotations

import fcntl
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from hscr.artifacts import file_digest, verify_manifest, write_json
from hscr.records import to_json


class RunDir:
    """DIR with manifest.json: {stage: {"inputs": digest, "outputs": {name: digest} or absent while unfinished}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold DIR/.lock; ValueError where another process works here. The kernel frees it when the process dies, however it dies."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"run directory {self.path.name!r}: another run is working in it") from None
            yield

    def _manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def is_done(self, stage: str, inputs: str) -> bool:
        """True where the stage was finished with these inputs and its outputs are still what they were."""
        entry = self._manifest().get(stage, {})
        if entry.get("inputs") != inputs or "outputs" not in entry:
            return False
        return all(self._digest(name) == digest for name, digest in entry["outputs"].items())

    def start(self, stage: str, inputs: str) -> bool:
        """Note that the stage begins; True where it goes on from a killed attempt with the same inputs."""
        manifest = self._manifest()
        resumed = manifest.get(stage, {}).get("inputs") == inputs
        manifest[stage] = {"inputs": inputs}
        write_json(self.path / "manifest.json", manifest)
        return resumed

    def finish(self, stage: str, outputs: Iterable[str]) -> None:
        manifest = self._manifest()
        manifest[stage]["outputs"] = {name: self._digest(name) for name in outputs}
        write_json(self.path / "manifest.json", manifest)

    def _digest(self, name: str) -> str | None:
        path = self.path / name
        if path.is_dir():
            try:
                return verify_manifest(path)
            except ValueError:
                return None
        return file_digest(path) if path.is_file() else None


class PartialFile:
    """An append-only JSONL file of a stage under way; `rename` makes it the stage's output."""

    def __init__(self, path: Path, batches: Sequence[int], *, resume: bool) -> None:
        """Keep the whole batches of an earlier attempt where `resume`; `batches` are their sizes in lines, `done` how many stayed."""
        self.path = path
        self.done = 0
        lines: list[bytes] = []
        if resume and path.is_file():
            lines = path.read_bytes().splitlines(keepends=True)
            whole = len(lines) - (1 if lines and not lines[-1].endswith(b"\n") else 0)
            sums = list(accumulate(batches))
            self.done = bisect_right(sums, whole)
            lines = lines[: sums[self.done - 1] if self.done else 0]
        path.write_bytes(b"".join(lines))

    def append(self, values: Iterable[Any]) -> None:
        """Write records and hand them to the kernel, so that a killed process loses nothing written here."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(to_json(value), ensure_ascii=False) + "\n" for value in values)

    def append_lines(self, lines: Iterable[bytes]) -> None:
        """The same with lines as another process wrote them."""
        with self.path.open("ab") as file:
            file.writelines(lines)

    def rename(self, final: Path) -> None:
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
        self.path.replace(final)
