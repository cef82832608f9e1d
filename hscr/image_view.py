"""Which two dimensions of a file are the image: the frame, plane and slice, and the window of grey values. Knows no format."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class View:
    """What to show of a file that holds more than one picture. All counts are from 0; None is the file's own choice or the usual one.

    `frame`: of a multi-frame DICOM file, a TIFF file of several pages, or the time point of a four-dimensional NIfTI file; usually 0.
    `plane`, `slice`: of a NIfTI volume; axial and the middle. Slices count from the right, the back and the feet.
    `window`: (centre, width) of the grey values shown, in the file's own units (Hounsfield for CT).
    """

    frame: int | None = None
    plane: str | None = None
    slice: int | None = None
    window: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are set."""
        return {k: list(v) if k == "window" else v for k, v in asdict(self).items() if v is not None}


def parsed_view(value: Any, name: str = "view") -> View:
    """A view from JSON. Raises ValueError, which names the field."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be an object")
    if unknown := set(value) - {"frame", "plane", "slice", "window"}:
        raise ValueError(f"{name}: has {len(unknown)} unknown fields; known are frame, plane, slice and window")
    for field in ("frame", "slice"):
        number = value.get(field)
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1_000_000
        ):
            raise ValueError(f"{name}.{field}: must be a whole number from 0 to 999999")
    if value.get("plane") not in (None, *PLANES):
        raise ValueError(f"{name}.plane: must be {', '.join(PLANES[:-1])} or {PLANES[-1]}")
    return View(value.get("frame"), value.get("plane"), value.get("slice"), _window(value.get("window"), name))


def _window(value: Any, name: str) -> tuple[float, float] | None:
    if value is None:
        return None
    fits = isinstance(value, (list, tuple)) and len(value) == 2
    if not (fits and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)):
        raise ValueError(f"{name}.window: must be [centre, width]")
    if not all(-1e9 < v < 1e9 and math.isfinite(v) for v in value) or value[1] < 1e-6:
        raise ValueError(f"{name}.window: must be [centre, width] below 1e9, the width above 0")
    return float(value[0]), float(value[1])
