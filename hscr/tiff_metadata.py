"""A TIFF file without metadata: of every directory only the tags that decode its picture stay, and whatever nothing points at is zero.

Offsets do not move, so that strips and tiles stay where they lie. TIFF 6.0 and BigTIFF, both byte orders; EXIF, GPS and sub-directories go.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hscr.image_limits import ImageError
from hscr.jpeg_segments import blank_texts

# Size, coding, colours, where the data lies, how it is held, resolution.
_KEPT = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 282, 283, 284, 292, 293, 296, 317, 320, 322, 323),
    *(324, 325, 332, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}  # fmt: skip
_SIZES = {
    1: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}  # no texts (2)
_COMPRESSION, _TABLES, _OLD_JPEG, _OLD_LENGTH = 259, 347, 513, 514
_DATA = {273: 279, 324: 325}  # offsets of strips and tiles -> their lengths
_DIRECTORIES_MAX = 10_000


@dataclass(frozen=True)
class _Form:
    """How numbers are written: byte order, and the layouts of count, entry and pointer of the plain or the big kind."""

    order: str
    big: bool

    @property
    def pointer(self) -> str:
        return self.order + ("Q" if self.big else "I")

    @property
    def count(self) -> str:
        return self.order + ("Q" if self.big else "H")

    @property
    def entry(self) -> str:
        return self.order + ("HHQ" if self.big else "HHI")

    @property
    def inline(self) -> int:
        return 8 if self.big else 4


def plain_tiff(data: bytes) -> bytes:
    """The same pictures. Raises ImageError, and struct.error on damaged data."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ImageError("the image is damaged")
    form = _Form(order, struct.unpack_from(order + "H", data, 2)[0] == 43)
    head = 16 if form.big else 8
    out = bytearray(len(data))
    out[:head] = data[:head]
    (position,) = struct.unpack_from(form.pointer, data, head - form.inline)
    seen: set[int] = set()
    while position:
        if position in seen or len(seen) > _DIRECTORIES_MAX:
            raise ImageError("the image is damaged")
        seen.add(position)
        position = _directory(data, out, position, form)
    return bytes(out)


def _directory(data: bytes, out: bytearray, position: int, form: _Form) -> int:
    """Copy what stays of one directory; where the next one lies (0: none)."""
    (n,) = struct.unpack_from(form.count, data, position)
    first, step = position + struct.calcsize(form.count), struct.calcsize(form.entry) + form.inline
    if first + n * step + form.inline > len(data):
        raise ImageError("the image is damaged")
    entries, values = [], {}
    for at in range(first, first + n * step, step):
        tag, kind, count = struct.unpack_from(form.entry, data, at)
        if tag not in _KEPT or kind not in _SIZES:
            continue
        size, place = _SIZES[kind] * count, at + step - form.inline
        entry = bytearray(data[at : at + step])
        if size > form.inline:
            (place,) = struct.unpack_from(form.pointer, data, place)
            _copy(data, out, place, size)
            if tag == _TABLES:
                blank_texts(out, place, place + size)
        else:
            entry[step - form.inline + size :] = bytes(form.inline - size)
        entries.append(bytes(entry))
        values[tag] = _integers(data, place, kind, count, form.order)
    _pixels(data, out, values)
    following = struct.unpack_from(form.pointer, data, first + n * step)[0]
    table = struct.pack(form.count, len(entries)) + b"".join(entries) + struct.pack(form.pointer, following)
    out[position : position + len(table)] = table
    return int(following)


def _pixels(data: bytes, out: bytearray, values: dict[int, tuple[int, ...]]) -> None:
    """Copy strips and tiles; JPEG streams among them lose their texts."""
    jpeg = values.get(_COMPRESSION, (1,))[:1] in ((6,), (7,))
    ranges = [
        r
        for where, how_long in _DATA.items()
        for r in zip(values.get(where, ()), values.get(how_long, ()), strict=False)
    ]
    ranges += zip(values.get(_OLD_JPEG, ()), values.get(_OLD_LENGTH, ()), strict=False)
    for start, length in ranges:
        _copy(data, out, start, length)
        if jpeg:
            blank_texts(out, start, start + length)


def _copy(data: bytes, out: bytearray, start: int, length: int) -> None:
    if start + length > len(data):
        raise ImageError("the image is damaged")
    out[start : start + length] = data[start : start + length]


def _integers(data: bytes, place: int, kind: int, count: int, order: str) -> tuple[int, ...]:
    """The values of a tag of whole numbers; of others none."""
    letter = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
    return struct.unpack_from(f"{order}{count}{letter}", data, place) if letter else ()
