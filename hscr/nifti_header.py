"""A NIfTI file without its texts: descrip, aux_file, intent_name, db_name, data_type and extensions are zero, offsets and values as before.

Of a gzipped file the header goes too, which may hold its name and time. Knows the two header layouts by their offsets (nifti1.h, nifti2.h).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from hscr.image_limits import ImageError, ImageLimits
from hscr.nifti import unpacked


@dataclass(frozen=True)
class _Layout:
    """Where things lie: (offset, length) of texts, (offset, dtype) of numbers."""

    length: int
    texts: tuple[tuple[int, int], ...]
    offset: tuple[int, str]
    shape: tuple[int, str]
    bits: tuple[int, str]


_ONE = _Layout(348, ((4, 10), (14, 18), (148, 80), (228, 24), (328, 16)), (108, "f4"), (40, "i2"), (72, "i2"))
_TWO = _Layout(540, ((240, 80), (320, 24), (508, 16), (525, 15)), (168, "i8"), (16, "i8"), (14, "i2"))


def without_texts(data: bytes, limits: ImageLimits) -> bytes:
    """The same volume. Raises ImageError."""
    if data[:2] != b"\x1f\x8b":
        return _blanked(data)
    volume = unpacked(data, limits.volume_bytes)
    blank = _blanked(volume)
    plain = data[3] == 0 and data[4:8] == b"\0\0\0\0" and _ends(data)
    return data if plain and blank == volume else _packed(blank)


def _blanked(data: bytes) -> bytes:
    layout = _TWO if data[4:7] == b"n+2" else _ONE
    little = int.from_bytes(data[:4], "little") == layout.length
    out = bytearray(data)
    for start, length in layout.texts:
        out[start : start + length] = bytes(length)
    begin = max(int(_numbers(data, layout.offset, little, 1)[0]), layout.length + 4)
    out[layout.length : begin] = bytes(min(begin, len(out)) - layout.length)
    dimensions = [int(n) for n in _numbers(data, layout.shape, little, 8)]
    size = (
        math.prod(dimensions[1 : 1 + max(0, min(7, dimensions[0]))])
        * int(_numbers(data, layout.bits, little, 1)[0])
        // 8
    )
    if not 0 < size <= len(data) - begin:
        raise ImageError("the image is damaged")
    return bytes(out[: begin + size])  # nothing behind the last value


def _numbers(data: bytes, field: tuple[int, str], little: bool, n: int) -> np.ndarray:
    offset, kind = field
    return np.frombuffer(data, ("<" if little else ">") + kind, n, offset)


def _ends(data: bytes) -> bool:
    """Whether a gzip file is one member with nothing behind it."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    while data and not unpacker.eof:
        unpacker.decompress(data, 2**20)
        data = unpacker.unconsumed_tail
    return unpacker.eof and not unpacker.unused_data


def _packed(volume: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS | 16)  # a header without name and time
    return packer.compress(volume) + packer.flush()
