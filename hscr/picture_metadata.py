"""Pictures without metadata: PNG, JPEG, WebP, GIF, BMP here, TIFF in hscr/tiff_metadata.py. Pixels are not coded anew.

Texts, EXIF, XMP, ICC profiles, comments, thumbnails, times and whatever lies behind the picture go. How a camera was held stays, in an
EXIF block of that one tag, for it decides what is seen.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image

from hscr.image_limits import ImageError
from hscr.jpeg_segments import plain_jpeg
from hscr.tiff_metadata import plain_tiff

_PNG = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs"}
_WEBP = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
_WEBP_EXIF, _WEBP_TEXTS = 0x08, 0x08 | 0x04 | 0x20  # flags of VP8X: EXIF; that, XMP and ICC
_SAYING = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG that may say how it is to be turned
_ORIENTATION = 0x0112


def without_metadata(data: bytes) -> bytes:
    """The same picture. Raises ImageError, and struct.error or IndexError on damaged data."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data, _exif(data) if any(kind in data for kind in _SAYING) else b"")
    if data[:2] == b"\xff\xd8":
        return plain_jpeg(data, _exif(data))
    if data[:4] == b"RIFF":
        return _webp(data, _exif(data))
    if data[:3] == b"GIF":
        return _gif(data)
    if data[:2] == b"BM":
        return _bmp(data)
    return plain_tiff(data)


def _exif(data: bytes) -> bytes:
    """A TIFF structure that says how the picture is to be turned, and nothing else; empty where it stands upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        if image.format == "PNG":  # whose EXIF may stand behind its pixels
            image.load()
        try:
            turned = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # damaged EXIF beside a good picture, as hscr/images.py takes it
            return b""
    if turned not in range(2, 9):
        return b""
    return b"II*\0" + struct.pack("<IHHHII I", 8, 1, _ORIENTATION, 3, 1, int(turned), 0)


def _png(data: bytes, exif: bytes) -> bytes:
    out = bytearray(data[:8])
    position = 8
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            raise ImageError("the image is damaged")
        if kind == b"IDAT" and exif:
            out += struct.pack(">I4s", len(exif), b"eXIf") + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
            exif = b""
        if kind in _PNG:
            out += data[position : position + 12 + length]
        position += 12 + length
        if kind == b"IEND":
            return bytes(out)
    raise ImageError("the image is damaged")


def _chunks(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of a RIFF's chunks."""
    while start + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, start)
        if start + 8 + length > end:
            raise ImageError("the image is damaged")
        yield kind, data[start + 8 : start + 8 + length]
        start += 8 + length + length % 2


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack("<4sI", kind, len(body)) + body + b"\0" * (len(body) % 2)


def _webp(data: bytes, exif: bytes) -> bytes:
    out = bytearray(b"WEBP")
    for kind, body in _chunks(data, 12, min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])):
        if kind == b"VP8X":
            body = bytes([body[0] & ~_WEBP_TEXTS | (_WEBP_EXIF if exif else 0)]) + b"\0\0\0" + body[4:10]
        elif kind == b"ANMF":
            inside = [_chunk(k, b) for k, b in _chunks(body, 16, len(body)) if k in (b"ALPH", b"VP8 ", b"VP8L")]
            body = body[:16] + b"".join(inside)
        if kind in _WEBP:
            out += _chunk(kind, body)
    out += _chunk(b"EXIF", exif) if exif else b""
    return b"RIFF" + struct.pack("<I", len(out)) + bytes(out)


def _gif(data: bytes) -> bytes:
    """Header, colours, frames and their controls; no comment, text or application block, and nothing behind the trailer."""
    position = 13 + _colours(data[10])
    out = bytearray(data[:position])
    while position < len(data):
        kind = data[position]
        if kind == 0x3B:
            return bytes(out) + b";"
        if kind == 0x21:
            end = _blocks_end(data, position + 2)
            kept = data[position + 1] == 0xF9
        elif kind == 0x2C:
            end = _blocks_end(data, position + 11 + _colours(data[position + 9]))
            kept = True
        else:
            break
        out += data[position:end] if kept else b""
        position = end
    raise ImageError("the image is damaged")


def _colours(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks_end(data: bytes, position: int) -> int:
    while data[position]:
        position += data[position] + 1
    return position + 1


def _bmp(data: bytes) -> bytes:
    """The two headers, the colours and the rows; the reserved field, a profile and all gaps are zero."""
    start, header = struct.unpack_from("<II", data, 10)
    if header < 40:  # OS/2's
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        coding, size, used, colour = 0, 0, 0, 3
    else:
        width, height, _, bits, coding, size = struct.unpack_from("<iiHHII", data, 18)
        used, colour = struct.unpack_from("<I", data, 46)[0], 4
    rows = (width * bits + 31) // 32 * 4 * abs(height)
    end = start + (size or len(data) - start if coding in (1, 2) else rows)  # 1 and 2: run lengths
    said = 14 + header + (12 if header == 40 and coding == 3 else 0)
    said += colour * (used or 2**bits) if bits <= 8 else 0
    if not said <= start <= end <= len(data):
        raise ImageError("the image is damaged")
    out = bytearray(data[:end])
    out[2:10] = struct.pack("<I", end) + bytes(4)
    out[said:start] = bytes(start - said)
    if header >= 124:
        out[70:74] = b"BGRs"  # sRGB, in place of a profile behind the rows
        out[126:134] = bytes(8)
    return bytes(out)
