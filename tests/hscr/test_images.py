"""Image decoding: formats, and limits that hold before a pixel is decoded."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hscr.images import ImageError, ImageLimits, View, decode_image, decode_images
from tests.hscr.tiny import picture


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_as_they_were(form: str, options: dict[str, object]) -> None:
    original = picture(1, (20, 30))
    image = decode_image(encoded(original, form, **options))
    assert image.mode == "RGB"
    assert image.tobytes() == original.tobytes()


def test_jpeg_is_read_also_in_grey_and_cmyk() -> None:
    for mode in ("RGB", "L", "CMYK"):
        assert decode_image(encoded(picture(1).convert(mode), "JPEG")).mode == "RGB"


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 12_000), (30_000, 1), (2**31 - 1, 2**31 - 1)])
def test_a_huge_size_in_the_header_is_refused_with_little_memory(size: tuple[int, int]) -> None:
    data = png_header(*size)
    tracemalloc.start()
    with pytest.raises(ImageError, match="pixels"):
        decode_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_limits_are_exact() -> None:
    data = encoded(Image.new("RGB", (10, 8)))
    assert decode_image(data, ImageLimits(len(data), 80, 10)).size == (10, 8)
    for limits in (ImageLimits(len(data) - 1, 80, 10), ImageLimits(len(data), 79, 10), ImageLimits(len(data), 80, 9)):
        with pytest.raises(ImageError):
            decode_image(data, limits)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_damaged(form: str) -> None:
    data = encoded(picture(1, (64, 64)), form)
    with pytest.raises(ImageError, match=r"damaged|not a PNG"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("form", ["BMP", "TIFF"])
def test_other_lossless_formats_are_read(form: str) -> None:
    assert decode_image(encoded(picture(1), form)).tobytes() == picture(1).tobytes()


@pytest.mark.parametrize("form", ["PPM", "ICNS", "TGA"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(ImageError, match="not a PNG, JPEG, WebP, TIFF"):
        decode_image(encoded(Image.new("RGB", (64, 64)), form))


def frames(form: str, n: int = 3) -> bytes:
    """Frame i is a plain grey of 100·i."""
    several = [Image.new("L", (4, 4), 100 * i) for i in range(n)]
    return encoded(several[0], form, save_all=True, append_images=several[1:])


def test_of_a_gif_the_first_frame_is_read_and_of_a_tiff_any_page() -> None:
    assert decode_image(frames("GIF")).getpixel((0, 0)) == (0, 0, 0)
    assert decode_image(frames("TIFF"), view=View(frame=2)).getpixel((0, 0)) == (200, 200, 200)
    with pytest.raises(ImageError, match="frame: the file has fewer"):
        decode_image(frames("TIFF"), view=View(frame=3))
    with pytest.raises(ImageError, match="of this format the first is read"):
        decode_image(frames("GIF"), view=View(frame=1))
    assert decode_image(frames("GIF"), view=View(frame=0)).size == (4, 4)


def test_a_camera_held_sideways_gives_an_upright_picture_and_no_texts() -> None:
    """Orientation 6: the camera was turned left, so the picture turns right: 3 × 2 becomes 2 × 3 and the first pixel goes to the right."""
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "patient name"
    turned = decode_image(encoded(image, "PNG", exif=exif))
    assert (turned.size, turned.getpixel((1, 0)), turned.info) == ((2, 3), (255, 0, 0), {})


def test_a_window_is_for_grey_values_of_more_than_eight_bits() -> None:
    """Window 2000 ± 500: 1500 and below is black, 2500 and above white."""
    data = encoded(Image.fromarray(np.array([[1000, 2000, 3000]], dtype=np.uint16)))
    assert np.asarray(decode_image(data, view=View(window=(2000, 1000))))[0, :, 0].tolist() == [0, 127, 255]
    with pytest.raises(ImageError, match="window"):
        decode_image(encoded(picture(1)), view=View(window=(100, 50)))
    with pytest.raises(ImageError, match="plane and slice"):
        decode_image(encoded(picture(1)), view=View(plane="axial"))


def test_no_data_no_file_and_no_image_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="empty"):
        decode_image(b"")
    with pytest.raises(ImageError, match="missing"):
        decode_image(tmp_path / "secret-name.png")
    with pytest.raises(ImageError, match="not a PNG") as error:
        decode_image(b"<svg>secret</svg>")
    assert "secret" not in str(error.value)


def test_a_big_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(10**12)  # sparse: reading it would take all memory
    with pytest.raises(ImageError, match="bytes"):
        decode_image(path)


def test_sixteen_bit_grey_is_scaled_to_its_own_range() -> None:
    """Values 1000, 2000, 3000 → 0, 127, 255 (127.5 cut); Pillow's own conversion would clip all to white."""
    values = np.array([[1000, 2000, 3000]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(values)))
    assert np.asarray(image)[0].tolist() == [[0, 0, 0], [127, 127, 127], [255, 255, 255]]


def test_transparency_lies_on_black() -> None:
    """Alpha 128 of 200: 200·128/255 = 100."""
    image = decode_image(encoded(Image.new("RGBA", (2, 2), (200, 100, 0, 128))))
    assert image.getpixel((0, 0)) == pytest.approx((100, 50, 0), abs=1)
    assert decode_image(encoded(Image.new("LA", (1, 1), (255, 0)))).getpixel((0, 0)) == (0, 0, 0)


def test_a_palettes_transparent_colour_lies_on_black() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    palette.putdata([0, 1])
    image = decode_image(encoded(palette, transparency=0))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (0, 255, 0)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_one_pixel_is_an_image(mode: str) -> None:
    assert decode_image(encoded(Image.new(mode, (1, 1)))).size == (1, 1)


def test_the_images_of_a_question_share_the_limit_of_pixels() -> None:
    """Two of 100 pixels fit into 200, the third does not; alone each would."""
    out = io.BytesIO()
    Image.new("RGB", (10, 10)).save(out, "PNG")
    data = out.getvalue()
    assert len(decode_images([data] * 2, ImageLimits(pixels=200))) == 2
    with pytest.raises(ImageError, match=r"image 3: .*all images together: 200 pixels"):
        decode_images([data] * 3, ImageLimits(pixels=200))
