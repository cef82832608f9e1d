"""A zip made while it is sent: no more of it than one block is ever in memory, and none on disk.

Entries are deflated, even images: the size of an entry stands behind it in a zip that is not seekable, and unpackers that read such a zip
as a stream find the end of deflated entries only.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

CHUNK_BYTES = 256 * 1024
_LEVEL = 1  # images do not get smaller, and text gets small enough


def zipped(entries: Iterable[tuple[str, Iterable[bytes]]]) -> Iterator[bytes]:
    """The zip's bytes in blocks. `entries` are (name, content), each taken only when the one before is written.

    An error of theirs ends the zip without its directory, so that the receiver sees that it is not whole.
    """
    sink = _Sink()
    archive = zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL)
    for name, content in entries:
        with archive.open(name, "w", force_zip64=True) as out:  # dated 1980: equal content makes an equal zip
            for block in content:
                out.write(block)
                if len(sink.held) >= CHUNK_BYTES:
                    yield sink.take()
    archive.close()
    yield sink.take()


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, a block at a time."""
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            yield block


class _Sink:
    """What zipfile writes to: it can neither seek nor tell, so zipfile never goes back."""

    def __init__(self) -> None:
        self.held = bytearray()

    def write(self, data: bytes) -> int:
        self.held += data
        return len(data)

    def flush(self) -> None:
        """zipfile calls it; nothing is held back."""

    def close(self) -> None:
        """Part of what zipfile may call."""

    def take(self) -> bytes:
        data = bytes(self.held)
        self.held.clear()
        return data
