"""One slice of a NIfTI-1 or -2 volume -> an RGB image, as a radiologist holds it: the patient's right is left, front or head is up.

nibabel reads the header and only the slice asked for. A gzipped file is unpacked up to a limit. Voxels are not resampled to square ones.
"""

from __future__ import annotations

import io
import warnings
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hscr.image_limits import ImageError, ImageLimits, Note, check_size, grey
from hscr.image_view import View

_FIXED = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis of (right, front, head) along which slices lie


def read_nifti(data: bytes, limits: ImageLimits, view: View) -> tuple[Image.Image, Note]:
    """The slice that the view names; the axial one in the middle where it names none. Raises ImageError, and what nibabel raises."""
    try:
        import nibabel
    except ImportError:
        raise ImageError("NIfTI files need more packages: pip install 'hscr[medical]'") from None
    if data[:2] == b"\x1f\x8b":
        data = unpacked(data, limits.volume_bytes)
    if data[344:347] == b"ni1" or data[4:7] == b"ni2":
        raise ImageError("this NIfTI header has its data in another file; send one .nii or .nii.gz")
    if data[344:347] != b"n+1" and data[4:7] != b"n+2":
        raise ImageError("the gzipped data is not a NIfTI volume")
    kind = nibabel.Nifti2Image if data[4:7] == b"n+2" else nibabel.Nifti1Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = kind.from_stream(io.BytesIO(data))
        return Image.fromarray(_shown(volume, len(data), limits, view)).convert("RGB"), Note("nifti")


def unpacked(data: bytes, limit: int) -> bytes:
    """What a gzip file holds. Raises ImageError above `limit` bytes."""
    out = bytearray()
    while data[:2] == b"\x1f\x8b":  # a gzip file may have several members
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
        out += unpacker.decompress(data, limit + 1 - len(out))
        if len(out) > limit:
            raise ImageError(f"the NIfTI file unpacks to more than {limit} bytes")
        if not unpacker.eof:
            raise ImageError("the image is damaged")
        data = unpacker.unused_data
    return bytes(out)


def _shown(volume: Any, size: int, limits: ImageLimits, view: View) -> NDArray[np.uint8]:
    """uint8 [rows, columns] of grey values, [rows, columns, 3] of colours."""
    from nibabel.orientations import io_orientation

    shape = tuple(int(n) for n in volume.shape)
    if any(n != 1 for n in shape[4:]):
        raise ImageError("the NIfTI volume has more than four dimensions")
    if any(n < 1 for n in shape) or len(shape) < 2:
        raise ImageError("the NIfTI file holds no image")
    if np.prod(shape, dtype=object) * volume.header.get_data_dtype().itemsize > size:
        raise ImageError("the image is damaged")  # its header promises more than there is
    shape, times = (*shape, 1)[:3], (shape[3] if len(shape) > 3 else 1)
    if (view.frame or 0) >= times:
        raise ImageError(f"frame: the file has fewer, {times} of them, numbered from 0")
    axes = io_orientation(volume.affine)
    if np.isnan(axes).any():
        axes = np.array([[0, 1], [1, 1], [2, 1]])  # a damaged orientation: as stored
    fixed = _FIXED[view.plane or "axial"]
    stored = {
        int(target): (axis, int(sign)) for axis, (target, sign) in enumerate(axes)
    }  # patient's axis -> (file's, sign)
    axis, sign = stored[fixed]
    n = shape[axis]
    index = n // 2 if view.slice is None else view.slice
    if index >= n:
        raise ImageError(f"slice: the volume has fewer in this plane, {n} of them, numbered from 0")
    across, up = (1, 2) if fixed == 0 else (0, 3 - fixed)
    check_size(shape[stored[across][0]], shape[stored[up][0]], limits)
    where: list[Any] = [slice(None)] * 3
    where[axis] = index if sign > 0 else n - 1 - index
    further = [view.frame or 0, *[0] * (len(volume.shape) - 4)][: max(0, len(volume.shape) - 3)]
    values = np.asarray(volume.dataobj[(*where[: len(volume.shape)], *further)])
    rest = [a for a in range(3) if a != axis]
    values = values.reshape([shape[a] for a in rest])
    (columns, to_right), (rows, to_head) = stored[across], stored[up]
    if rest[0] == columns:
        values = values.T
    assert (rest[0], rest[1]) in ((rows, columns), (columns, rows))
    values = values[:: -1 if to_head > 0 else 1, :: -1 if to_right > 0 else 1]
    return _grey_or_colour(values, volume.header, view)


def _grey_or_colour(values: NDArray[Any], header: Any, view: View) -> NDArray[np.uint8]:
    if values.dtype.names:  # (R, G, B) of bytes
        if view.window is not None:
            raise ImageError("a window is for grey values; this volume has colours")
        return np.ascontiguousarray(
            np.stack([values[name] for name in values.dtype.names[:3]], axis=-1), dtype=np.uint8
        )
    if np.iscomplexobj(values):
        raise ImageError("the NIfTI volume holds complex numbers, which are no picture")
    low, high = float(header["cal_min"]), float(header["cal_max"])
    if view.window is not None:
        centre, width = view.window
        low, high = centre - width / 2, centre + width / 2
    elif not (np.isfinite([low, high]).all() and high > low):  # the file says no range to show
        return grey(values)
    return grey(values, low, high)
