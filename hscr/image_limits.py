"""What every decoder of this package keeps to: the limits, the error, and what is told of a decoded image. Knows no format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageLimits:
    """Refused above these, by the header alone or while a compressed file unpacks."""

    image_bytes: int = 20 * 2**20
    pixels: int = 40_000_000  # of the one picture that is decoded
    side: int = 20_000
    volume_bytes: int = 256 * 2**20  # of a DICOM or NIfTI file, as stored and unpacked
    frames: int = 100_000


class ImageError(ValueError):
    """The data is no image that this package reads. The message is a fixed text: no path, nothing of the content."""


@dataclass(frozen=True)
class Note:
    """What is told of an image: its format (png, dicom, nifti, …), a DICOM file's modality, and why its pixels may show who the patient is.

    Flags: burned_in_annotation, recognizable_features, ultrasound, secondary_capture.
    """

    format: str
    modality: str | None = None
    flags: tuple[str, ...] = ()


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Raises ImageError."""
    if width < 1 or height < 1:
        raise ImageError("the image has no pixels")
    if width * height > limits.pixels or max(width, height) > limits.side:
        raise ImageError(f"the image has more than {limits.pixels} pixels or a side above {limits.side}")


def grey(values: NDArray[np.generic], low: float | None = None, high: float | None = None) -> NDArray[np.uint8]:
    """Values [...] of any real type as 8 bits: low and below is 0, high and above 255. Without bounds: the finite values' own range.

    What is not finite is 0.
    """
    real: NDArray[Any] = np.asarray(values, dtype=np.float32 if values.dtype.itemsize <= 2 else np.float64)
    finite = np.isfinite(real)
    if low is None or high is None:
        inside = real if finite.all() else real[finite]
        low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0)
    real = (real - low) * (255 / max(high - low, 1e-6))
    return np.where(finite, real, 0).clip(0, 255).astype(np.uint8)
