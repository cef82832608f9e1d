"""Bytes or a file -> one RGB image, with limits that hold before anything is decoded.

PNG, JPEG, WebP, TIFF, BMP and GIF (its first frame) here; DICOM in hscr/dicom.py, NIfTI in hscr/nifti.py (`pip install 'hscr[medical]'`).
The content says which format it is, never a name. Messages are fixed texts: no path, no object, nothing of the content. No torch here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hscr.image_limits import ImageError, ImageLimits, Note, check_size, grey
from hscr.image_view import View

__all__ = [
    "Decoded",
    "ImageError",
    "ImageLimits",
    "Images",
    "View",
    "as_images",
    "decode_image",
    "decode_images",
    "read_image",
]

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
_ORIENTATION = 0x0112  # EXIF
_KNOWN = "PNG, JPEG, WebP, TIFF, BMP, GIF, DICOM or NIfTI image"
Images = Image.Image | Sequence[Image.Image]  # what a question is about: one image, or several in order


@dataclass(frozen=True)
class Decoded:
    """An RGB image and what is told of it."""

    image: Image.Image
    note: Note


def as_images(images: Images) -> tuple[Image.Image, ...]:
    """One or several images as several. Raises ValueError for none."""
    several = (images,) if isinstance(images, Image.Image) else tuple(images)
    if not several:
        raise ValueError("images: a question needs at least one image")
    return several


def decode_image(data: bytes | Path, limits: ImageLimits = ImageLimits(), view: View = View()) -> Image.Image:
    """The image of read_image alone. Raises ImageError."""
    return read_image(data, limits, view).image


def read_image(data: bytes | Path, limits: ImageLimits = ImageLimits(), view: View = View()) -> Decoded:
    """Decode to mode RGB, turned upright where the camera noted how it was held (EXIF).

    Grey values of more than 8 bits go through the view's window, else the file's own (DICOM, NIfTI), else their range. Transparency lies
    on black. Raises ImageError: too many bytes, unknown format, too many pixels or frames, nothing there to show, damaged.
    """
    head, data = _read(data, limits)
    try:
        if is_dicom(head):
            from hscr.dicom import read_dicom

            return Decoded(*read_dicom(data, limits, view))
        if is_nifti(head):
            from hscr.nifti import read_nifti

            return Decoded(*read_nifti(data, limits, view))
        return _read_picture(data, limits, view)
    except ImageError:
        raise
    except Exception:  # decoders raise nearly anything on damaged data
        raise ImageError("the image is damaged") from None


def decode_images(
    several: Sequence[bytes], limits: ImageLimits = ImageLimits(), views: Sequence[View] = ()
) -> tuple[Image.Image, ...]:
    """The images of read_images alone. Raises ImageError."""
    return tuple(d.image for d in read_images(several, limits, views))


def read_images(
    several: Sequence[bytes], limits: ImageLimits = ImageLimits(), views: Sequence[View] = ()
) -> tuple[Decoded, ...]:
    """The images of one question, which share the limit of pixels: together they cost no more memory than one may. Raises ImageError.

    `views` has one entry an image, or none.
    """
    read: list[Decoded] = []
    left = limits.pixels
    for number, data in enumerate(several, 1):
        try:
            read.append(read_image(data, replace(limits, pixels=left), views[number - 1] if views else View()))
        except ImageError as error:
            if len(several) == 1:
                raise
            raise ImageError(f"image {number}: {error} (all images together: {limits.pixels} pixels)") from None
        left -= read[-1].image.width * read[-1].image.height
    return tuple(read)


def read_limited(path: Path, limits: ImageLimits = ImageLimits()) -> bytes:
    """An image file's bytes. Raises ImageError where there are more than its format may have."""
    return _read(path, limits)[1]


def _read(data: bytes | Path, limits: ImageLimits) -> tuple[bytes, bytes]:
    """(the first bytes, all bytes), the latter only after the limit that the former's format has."""
    if isinstance(data, Path):
        if not data.is_file():
            raise ImageError("the image file is missing")
        size = data.stat().st_size
        with data.open("rb") as file:
            head = file.read(1024)
    else:
        size, head = len(data), data[:1024]
    if not size:
        raise ImageError("the image is empty")
    limit = limits.volume_bytes if is_dicom(head) or is_nifti(head) else limits.image_bytes
    if size > limit:
        raise ImageError(f"the image has more than {limit} bytes")
    return head, data.read_bytes() if isinstance(data, Path) else data


def is_dicom(head: bytes) -> bool:
    """DICOM's own mark, or (files from before it, and of careless tools) an element of group 2 or 8 in either byte order at the start."""
    return head[128:132] == b"DICM" or (
        (head[:2] in (b"\x02\0", b"\x08\0") or head[:2] == b"\0\x08") and len(head) > 132
    )


def is_nifti(head: bytes) -> bool:
    """The mark of NIfTI-1 or -2, or gzip: nothing else that is gzipped is read here."""
    return head[:2] == b"\x1f\x8b" or head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2")


def _read_picture(data: bytes, limits: ImageLimits, view: View) -> Decoded:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow only warns of a bomb; the limits below refuse it
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"the image has more than {limits.pixels} pixels") from None
    except Exception:  # Pillow's plugins raise nearly anything on a damaged header
        raise ImageError(f"the data is not a {_KNOWN}") from None
    if view.plane is not None or view.slice is not None:
        raise ImageError("plane and slice are for NIfTI volumes; this is a picture")
    check_size(*image.size, limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow thinks of odd tags
        if view.frame:
            _seek(image, view.frame, limits)
        image.load()
        return Decoded(_to_rgb(_upright(image), view), Note(str(image.format).lower()))


def _seek(image: Image.Image, frame: int, limits: ImageLimits) -> None:
    if image.format != "TIFF":
        raise ImageError("a frame can be chosen of DICOM, TIFF and NIfTI files; of this format the first is read")
    try:
        if frame >= limits.frames:
            raise EOFError
        image.seek(frame)
    except EOFError:
        raise ImageError("frame: the file has fewer") from None
    check_size(*image.size, limits)


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image  # exif_transpose would copy it
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF beside a good picture
        return image


def _to_rgb(image: Image.Image, view: View) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit: Pillow's own convert("RGB") would clip to white
        centre, width = view.window or (None, 0.0)
        bounds = (None, None) if centre is None else (centre - width / 2, centre + width / 2)
        image = Image.fromarray(grey(np.asarray(image), *bounds))
    elif view.window is not None:
        raise ImageError("a window is for grey values of more than 8 bits; this picture has none")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    image = image.convert("RGB")
    image.info = {}  # texts of the file, which may say who the patient is
    return image
