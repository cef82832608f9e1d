"""Parts of a generation that were made elsewhere: JSONL files, named by what they are, that a run takes up instead of making them.

A name holds the digest of what the part was made from, its records and the digest of its bytes. So whoever puts one there, late, twice or
half, can do no harm: what is torn, changed or made from something else is not taken. Knows no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hscr.artifacts import bytes_digest
from hscr.events import Warning_
from hscr.records import VQARecord, preference_record

_NAME = re.compile(r"^([0-9a-f]{64})\.(\d{1,9})-(\d{1,9})\.([0-9a-f]{64})\.jsonl$")
_DAMAGED = "a part of the preferences is damaged or not yet whole, and is made anew if it does not become whole in time"
_FOREIGN = "a part is left alone: its data, model, precision, device, preference settings, seed, parent or hscr are not this run's"


def part_name(inputs: str, start: int, stop: int, content: str) -> str:
    """The file name of records [start, stop) made from `inputs`; both digests as `sha256:…`."""
    return f"{inputs.removeprefix('sha256:')}.{start}-{stop}.{content.removeprefix('sha256:')}.jsonl"


def made_already(folder: Path, inputs: str, start: int, stop: int) -> bool:
    """Whether a part of these records is there and whole."""
    found = folder.glob(f"{inputs.removeprefix('sha256:')}.{start}-{stop}.*.jsonl")
    return any(path.name == part_name(inputs, start, stop, bytes_digest(path.read_bytes())) for path in found)


def shard_bounds(n: int, batch_size: int, part: int, of: int) -> tuple[int, int]:
    """Records [start, stop) of shard `part` (from 1) of `of`: whole batches, so that all shards in order are one worker's result.

    ValueError where there is no such shard.
    """
    if not 1 <= part <= of:
        raise ValueError(f"shard: must be 1/{of} to {of}/{of}")
    batches = -(-n // batch_size)
    start, stop = (batches * k // of * batch_size for k in (part - 1, part))
    return min(start, n), min(stop, n)


class Parts:
    """The parts in a folder, which may not be there and into which others write meanwhile."""

    def __init__(self, folder: Path, inputs: str, records: Sequence[VQARecord], batch_size: int) -> None:
        self._folder, self._inputs = folder, inputs.removeprefix("sha256:")
        self._records, self._batch_size = records, batch_size
        self._looked_at: dict[str, tuple[int, int]] = {}  # size and time of those that were no good
        self._odd: dict[str, Warning_] = {}
        self._told = 0

    def at(self, position: int) -> list[bytes]:
        """The lines of records `position`, `position` + 1 … as far as one part has them; none where no whole part does."""
        for path, start, stop in sorted(self._holding(position), key=lambda found: -found[2]):
            lines = self._lines(path, start, stop)
            if lines:
                return lines[position - start :]
        return []

    def warnings(self) -> Iterator[Warning_]:
        """What was found odd since the last call, once a file."""
        found = list(self._odd.values())
        yield from found[self._told :]
        self._told = len(found)

    def _holding(self, position: int) -> Iterator[tuple[Path, int, int]]:
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            name = _NAME.match(path.name)
            if name is None:
                continue
            if name[1] != self._inputs:
                self._odd.setdefault(path.name, Warning_("foreign_part", _FOREIGN))
            elif int(name[2]) <= position < int(name[3]):
                yield path, int(name[2]), int(name[3])

    def _lines(self, path: Path, start: int, stop: int) -> list[bytes]:
        """The part's lines, or none where it is not what its name says; such a one is read again once it has changed."""
        try:
            seen = path.stat()
            if self._looked_at.get(path.name) == (seen.st_size, seen.st_mtime_ns):
                return []
            data = path.read_bytes()
        except FileNotFoundError:  # taken away meanwhile
            return []
        lines = data.splitlines(keepends=True)
        if path.name == part_name(self._inputs, start, stop, bytes_digest(data)) and self._fits(lines, start, stop):
            return lines
        self._looked_at[path.name] = (seen.st_size, seen.st_mtime_ns)
        self._odd.setdefault(path.name, Warning_("damaged_part", _DAMAGED))
        return []

    def _fits(self, lines: list[bytes], start: int, stop: int) -> bool:
        """Whole batches, a line a record, and each the right record's."""
        n = len(self._records)
        if (
            start % self._batch_size
            or (stop % self._batch_size and stop != n)
            or stop > n
            or len(lines) != stop - start
        ):
            return False
        try:
            return all(
                line.endswith(b"\n") and preference_record(json.loads(line)).record == record
                for line, record in zip(lines, self._records[start:stop], strict=True)
            )
        except ValueError:
            return False
