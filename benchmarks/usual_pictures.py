"""Pictures as people ask about them, from files that installed packages ship: what is to be read beside noise.

Noise has the most bytes for its size, but is stored rather than packed: a picture takes longer to decode. Here are pydicom's CT slice, as
a viewer exports it and as a scanner stores it, and scikit-image's histology and fundus photograph. The slice is 128 × 128; of a scanner's
512 × 512 it is made by eight turned and mirrored tiles, for an enlarged slice has no noise of its own and packs too well.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def usual_pictures(n: int) -> dict[str, list[bytes]]:
    """By what they are, n files each, no two of the same pixels: each is shifted by a column more. Needs `hscr[medical,demo]`."""
    from skimage import data

    tissue, eye = data.immunohistochemistry(), data.retina()
    return {
        "CT 512 × 512, grey PNG": [_saved(_grey(_ct(i)), "PNG") for i in range(n)],
        "CT 512 × 512, DICOM of 16 bits": [_dicom(_ct(n + i)) for i in range(n)],
        "histology 512 × 512, PNG": [_saved(np.roll(tissue, i, 1), "PNG") for i in range(n)],
        "fundus 1411 × 1411, JPEG": [_saved(np.roll(eye, i, 1), "JPEG") for i in range(n)],
    }


def _file() -> Path:
    from pydicom.data import get_testdata_file

    return Path(str(get_testdata_file("CT_small.dcm", download=False)))


def _ct(shift: int) -> NDArray[np.int16]:
    """[512, 512]: equal tiles lie 256 rows apart, which is further than a PNG's compression looks back."""
    from pydicom import dcmread

    tile = dcmread(_file()).pixel_array.astype(np.int16)
    tiles = [np.rot90(way, turns) for way in (tile, tile.T) for turns in range(4)]
    return np.roll(np.block([[tiles[4 * (row % 2) + column] for column in range(4)] for row in range(4)]), shift, 1)


def _grey(values: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Of the slice's own range, 8 bits."""
    low, high = values.min(), values.max()
    return ((values - low) * (255.0 / (high - low))).astype(np.uint8)


def _dicom(values: NDArray[np.int16]) -> bytes:
    from pydicom import dcmread

    file = dcmread(_file())
    file.Rows, file.Columns = values.shape
    file.PixelData = values.tobytes()
    out = io.BytesIO()
    file.save_as(out)
    return out.getvalue()


def _saved(values: NDArray[np.uint8], kind: str) -> bytes:
    """As Pillow saves it unasked."""
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind)
    return out.getvalue()
