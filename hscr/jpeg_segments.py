"""JPEG streams without comments and application segments: whole files (ITU-T T.81 B.1), and in place where they lie inside other files."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hscr.image_limits import ImageError

_NEXT = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in coded data: a marker that is no stuffing and no restart
_EOI, _SOS, _COM, _COM_2000, _SOT = 0xD9, 0xDA, 0xFE, 0x64, 0x90
_KEPT = {*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD}  # frames, tables, scans
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE


def plain_jpeg(data: bytes, exif: bytes) -> bytes:
    """The same picture with nothing but what decodes it, and `exif` (a TIFF structure) where there is any. Raises ImageError."""
    out = bytearray(data[:2])
    if exif:
        out += _segment(_APP1, b"Exif\0\0" + exif)
    position = 2
    while True:
        marker, start, end = _at(data, position)
        if marker == _EOI:
            return bytes(out) + b"\xff\xd9"
        body = data[start + 2 : end]
        if marker in _KEPT:
            out += _segment(marker, body)
        elif marker == _APP0 and body[:5] == b"JFIF\0":
            out += _segment(marker, body[:12].ljust(12, b"\0") + b"\0\0")  # without its small picture
        elif marker == _APP14 and body[:5] == b"Adobe":
            out += _segment(marker, body[:12])  # which says how colours are coded
        position = end
        if marker == _SOS:
            found = _NEXT.search(data, end)
            if found is None:
                raise ImageError("the image is damaged")
            out += data[end : found.start()]
            position = found.start()


def blank_texts(stream: bytearray, start: int, end: int) -> None:
    """Zero the texts of a stream's header in place: comments and application segments, of JPEG, JPEG-LS and JPEG 2000 alike."""
    for marker, begin, stop in _header(stream, start, end):
        adobe = marker == _APP14 and stream[begin + 2 : begin + 7] == b"Adobe"
        if marker in (_COM, _COM_2000) or (0xE0 <= marker <= 0xEF and not adobe):
            stream[begin + 2 : stop] = bytes(stop - begin - 2)


def _header(stream: bytearray, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    if stream[start : start + 2] not in (b"\xff\xd8", b"\xff\x4f"):
        return
    position = start + 2
    while position < end:
        try:
            marker, begin, stop = _at(stream, position)
        except ImageError:
            return  # what a decoder makes of it shows when it is decoded
        if marker in (_EOI, _SOS, _SOT) or stop > end:
            return
        yield marker, begin, stop
        position = stop


def _at(data: bytes | bytearray, position: int) -> tuple[int, int, int]:
    """(marker, start, end) of the segment at a position: `start` is where its length stands. Raises ImageError."""
    if data[position : position + 1] != b"\xff":
        raise ImageError("the image is damaged")
    while data[position : position + 1] == b"\xff":
        position += 1
    marker, start = int.from_bytes(data[position : position + 1], "big"), position + 1
    if marker == _EOI:
        return marker, start, start
    length = int.from_bytes(data[start : start + 2], "big")
    if length < 2 or start + length > len(data):
        raise ImageError("the image is damaged")
    return marker, start, start + length


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
