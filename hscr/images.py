"""Bytes or a file -> one RGB image, with limits that hold before anything is decoded.

PNG, JPEG and WebP. Messages are fixed texts: no path, no object, nothing of the content. No torch here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
Images = Image.Image | Sequence[Image.Image]  # what a question is about: one image, or several in order


@dataclass(frozen=True)
class ImageLimits:
    """Refused above these, by the header alone."""

    image_bytes: int = 20 * 2**20
    pixels: int = 40_000_000
    side: int = 20_000


class ImageError(ValueError):
    """The data is no image that this service reads."""


def as_images(images: Images) -> tuple[Image.Image, ...]:
    """One or several images as several. Raises ValueError for none."""
    several = (images,) if isinstance(images, Image.Image) else tuple(images)
    if not several:
        raise ValueError("images: a question needs at least one image")
    return several


def decode_image(data: bytes | Path, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """Decode to mode RGB, in the orientation stored. 16-bit greyscale is scaled to its own range, transparency lies on black.

    Raises ImageError: too many bytes, unknown format, too many pixels, damaged.
    """
    if isinstance(data, Path):
        if not data.is_file():
            raise ImageError("the image file is missing")
        if data.stat().st_size > limits.image_bytes:
            raise ImageError(f"the image has more than {limits.image_bytes} bytes")
        data = data.read_bytes()
    if len(data) > limits.image_bytes:
        raise ImageError(f"the image has more than {limits.image_bytes} bytes")
    if not data:
        raise ImageError("the image is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow only warns of a bomb; the limits below refuse it
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"the image has more than {limits.pixels} pixels") from None
    except Exception:  # Pillow's plugins raise nearly anything on a damaged header
        raise ImageError("the data is not a PNG, JPEG or WebP image") from None
    width, height = image.size
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise ImageError(f"the image has more than {limits.pixels} pixels or a side above {limits.side}")
    try:
        image.load()
        return _to_rgb(image)
    except Exception:
        raise ImageError("the image is damaged") from None


def decode_images(several: Sequence[bytes], limits: ImageLimits = ImageLimits()) -> tuple[Image.Image, ...]:
    """The images of one question, which share the limit of pixels: together they cost no more memory than one may. Raises ImageError."""
    images: list[Image.Image] = []
    left = limits.pixels
    for number, data in enumerate(several, 1):
        try:
            images.append(decode_image(data, replace(limits, pixels=left)))
        except ImageError as error:
            if len(several) == 1:
                raise
            raise ImageError(f"image {number}: {error} (all images together: {limits.pixels} pixels)") from None
        left -= images[-1].width * images[-1].height
    return tuple(images)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit: Pillow's own convert("RGB") would clip to white
        values = np.asarray(image, dtype=np.float32)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return image.convert("RGB")
