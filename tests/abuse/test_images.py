"""Images against the real server: bombs of every format, odd ones, and what is several formats at once. A refusal or an answer, in bounded
memory and time, and the next question is answered as ever.
"""

from __future__ import annotations

import base64
import gzip
import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from pydicom.uid import DeflatedExplicitVRLittleEndian

from tests.abuse.rig import Rig
from tests.conftest import png
from tests.hscr.medical import dicom, nifti


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_of(width: int, height: int, *, bits: int = 1, data: bytes | None = None) -> bytes:
    """A grey PNG whose header says this size; by default with all its pixels, which are white and deflate to nearly nothing."""
    if data is None:
        packer = zlib.compressobj(9)
        row = b"\0" + b"\xff" * ((width * bits + 7) // 8)
        data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def plain(width: int = 8, height: int = 8, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 1 if mode in ("1", "P") else None)


def gif_of(frames: int) -> bytes:
    images = [Image.new("P", (4, 4), i % 2) for i in range(2)]
    whole = saved(images[0], "GIF", save_all=True, append_images=[images[1]], duration=10)
    begin = whole.index(b"\x21\xf9")
    return whole[:-1] + whole[begin:-1] * (frames // 2) + b"\x3b"


def with_profile(size: int) -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return saved(plain(), "PNG", icc_profile=profile + b"\0" * size)


def with_texts(n: int, size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    for i in range(n):
        info.add_text(f"key{i}", "a" * size, zip=True)
    return saved(plain(), "PNG", pnginfo=info)


def with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a" * 60_000
    return saved(plain(), "JPEG", exif=exif)


@cache
def bombs() -> dict[str, bytes]:
    """Small files that would be large."""
    zeros = gzip.compress(bytes(2**20) * 64)
    whole = dicom(np.zeros((64, 64), np.uint16))
    return {
        "png of 169 Mpx": png_of(13_000, 13_000),
        "png whose header lies": png_of(30_000, 30_000, data=zlib.compress(b"")),
        "png of texts": with_texts(70, 2**20),
        "gif of 60,000 x 60,000": b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + saved(plain(mode="P"), "GIF")[10:],
        "bmp of 50,000 x 50,000": saved(plain(), "BMP")[:18]
        + struct.pack("<ii", 50_000, 50_000)
        + saved(plain(), "BMP")[26:],
        "tiff of 40,000 x 40,000": tiff_of(40_000),
        "nifti of a gigabyte": gzip.compress(nifti_of(1024)) + zeros,
        "gzip in gzip": gzip.compress(zeros),
        "dicom with a length beyond its end": whole[:-100],
        "dicom that unpacks to 300 MB": deflated_dicom(300),
        "dicom of 60,000 x 60,000": dicom(np.zeros((2, 2), np.uint8), Rows=60_000, Columns=60_000),
        "dicom of a million frames": dicom(np.zeros((2, 2), np.uint8), NumberOfFrames=10**6),
    }


def deflated_dicom(mb: int) -> bytes:
    """A small image, and behind it so much padding (PS3.10: Data Set Trailing Padding), which deflates to nearly nothing."""
    small = dicom(np.zeros((64, 64), np.uint16), DeflatedExplicitVRLittleEndian)
    begin = 144 + int.from_bytes(small[140:144], "little")  # behind group 2, whose first element is its length
    content = zlib.decompress(small[begin:], -zlib.MAX_WBITS)
    head = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    out = head.compress(content + b"\xfc\xff\xfc\xffOB\0\0" + struct.pack("<I", mb * 2**20)) + head.flush(
        zlib.Z_FULL_FLUSH
    )
    block = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)  # needs nothing before it, so it may be repeated
    return small[:begin] + out + (block.compress(bytes(2**20)) + block.flush(zlib.Z_FULL_FLUSH)) * mb + block.flush()


def nifti_of(side: int) -> bytes:
    """The header of a volume of side³ bytes."""
    small = bytearray(nifti(np.zeros((4, 4, 4), np.uint8)))
    small[40:56] = struct.pack("<8h", 3, side, side, side, 1, 1, 1, 1)
    return bytes(small)


def tiff_of(side: int) -> bytes:
    whole = bytearray(saved(plain(mode="L"), "TIFF"))
    for tag in (256, 257):
        at = (
            whole.index(struct.pack("<HH", tag, 4))
            if struct.pack("<HH", tag, 4) in whole
            else whole.index(struct.pack("<HH", tag, 3))
        )
        whole[at + 2 : at + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(whole)


@cache
def odd() -> dict[str, tuple[bytes, bool]]:
    """Bytes, and whether they are an image."""
    grey16 = Image.fromarray((np.arange(64, dtype=np.uint16) * 900).reshape(8, 8))
    palette = plain(mode="P")
    palette.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    jpeg, zipped = saved(plain(64, 64), "JPEG"), b"PK\x03\x04" + b"\0" * 26
    return {
        "1x1": (png_of(1, 1), True),
        "1x20,000": (png_of(1, 20_000), True),
        "20,000x1": (png_of(20_000, 1), True),
        "20,001x1": (png_of(20_001, 1), False),
        "0x0": (png_of(0, 0), False),
        "grey of 16 bits": (saved(grey16, "PNG"), True),
        "CMYK": (saved(plain(mode="CMYK"), "JPEG"), True),
        "palette with alpha": (saved(palette, "PNG", transparency=bytes(range(256))), True),
        "gif of 10,000 frames": (gif_of(10_000), True),
        "apng": (saved(plain(), "PNG", save_all=True, append_images=[plain()] * 50), True),
        "cut off": (jpeg[: len(jpeg) // 2], False),
        "png without pixels": (png_of(8, 8, data=zlib.compress(b"")), False),
        "jpeg and zip": (jpeg + zipped, True),
        "png and html": (png() + b"<script>alert(1)</script>", True),
        "pdf before png": (b"%PDF-1.7\n" + png(), False),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', False),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", False),
        "profile of half a megabyte": (with_profile(2**19), True),
        "profile of more than a megabyte": (with_profile(2**20), False),  # Pillow's limit
        "nifti with zeros behind": (
            gzip.compress(nifti(np.zeros((4, 4, 4), np.uint8))) + gzip.compress(bytes(2**24)),
            True,
        ),
        "a profile that is none": (saved(plain(), "PNG", icc_profile=b"\xff" * 200_000), True),
        "huge exif": (with_exif(), True),
        "twelve bytes": (b"RIFF\0\0\0\0WEBP", False),
        "gif without a frame": (b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b"\x3b", False),
        "dicom of fewer than no frames": (dicom(np.zeros((2, 2), np.uint8), NumberOfFrames=-1), False),
        "dicom of 0 x 0": (dicom(np.zeros((2, 2), np.uint8), Rows=0, Columns=0), False),
        "nothing": (b"", False),
        "noise": (np.random.default_rng(0).bytes(100_000), False),
    }


def ask(rig: Rig, data: bytes) -> Any:
    return rig.http.post("/vqa", files={"image": ("scan.png", data)}, data={"question": "Where is the lesion?"})


@pytest.mark.parametrize("kind", bombs())
def test_a_bomb_is_refused_in_little_memory(rig: Rig, untouched: None, refused: Callable[..., Any], kind: str) -> None:
    data = bombs()[kind]
    assert len(data) < 400_000, "small to send"
    refused(ask(rig, data), "invalid_image", "scan.png")
    assert ask(rig, png()).status_code == 200


@pytest.mark.parametrize("kind", odd())
def test_an_odd_image_is_shown_or_refused(rig: Rig, untouched: None, refused: Callable[..., Any], kind: str) -> None:
    data, fine = odd()[kind]
    answer = ask(rig, data)
    if fine:
        assert answer.status_code == 200, answer.text
    else:
        refused(answer, "invalid_image", "scan.png")


def test_the_largest_image_that_is_taken_costs_its_pixels_once(rig: Rig) -> None:
    """40 Mpx as RGB are 114 MB in the API and the same in one decoder."""
    with rig.bounded(350):
        assert ask(rig, png_of(8000, 5000)).status_code == 200
    assert (
        rig.http.post("/vqa", files=[("images", ("a", png_of(8000, 5000)))] * 2, data={"question": "a"}).status_code
        == 422
    )


def test_base64_that_is_none_and_addresses_in_its_place(rig: Rig, untouched: None, refused: Callable[..., Any]) -> None:
    for text in (
        "!!!!",
        "a",
        "data:image/png;base64,AAAA",
        "http://127.0.0.1/",
        "file:///etc/passwd",
        "AAAA=AAAA",
        "é" * 10,
    ):
        refused(
            rig.http.post("/vqa", json={"image": {"base64": text}, "question": "a"}),
            "invalid_image",
            *[text] * (len(text) > 4),
        )
    half = base64.b64encode(png()).decode()[:-40]
    refused(rig.http.post("/vqa", json={"image": {"base64": half}, "question": "a"}), "invalid_image")
