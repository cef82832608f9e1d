"""One frame of a DICOM file -> an RGB image: modality rescale, VOI LUT or window, MONOCHROME1, palettes, colour (PS3.3 C.7.6.3, C.11).

pydicom reads, pylibjpeg and its plugins unpack JPEG, JPEG-LS, JPEG 2000 and RLE; GDCM is never asked (CVE-2026-3650). What a header says
of the patient is not read here: hscr/dicom_header.py says what little is kept. Pixels are not resampled to square ones.
"""

from __future__ import annotations

import io
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hscr.image_limits import ImageError, ImageLimits, Note, check_size, grey
from hscr.image_view import View

if TYPE_CHECKING:
    from pydicom import Dataset

_DEFLATED = "1.2.840.10008.1.2.1.99"
_EXPLICIT = "1.2.840.10008.1.2.1"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def read_dicom(data: bytes, limits: ImageLimits, view: View) -> tuple[Image.Image, Note]:
    """The frame that the view names. Raises ImageError, and whatever pydicom raises on damaged data."""
    from hscr.dicom_header import note  # after open_dicom's own check would be too late: it imports pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's remarks quote values of the header
        dataset = open_dicom(data, limits)
        if view.plane is not None or view.slice is not None:
            raise ImageError("plane and slice are for NIfTI volumes; choose a DICOM file's frame")
        if not any(name in dataset for name in _PIXELS) or "Rows" not in dataset or "Columns" not in dataset:
            raise ImageError("the DICOM file holds no image")
        check_size(int(dataset.Columns), int(dataset.Rows), limits)
        frames, frame = int(dataset.get("NumberOfFrames") or 1), view.frame or 0
        if not 1 <= frames <= limits.frames:
            raise ImageError(f"the DICOM file has no frame or more than {limits.frames}")
        if frame >= frames:
            raise ImageError(f"frame: the file has fewer, {frames} of them, numbered from 0")
        return Image.fromarray(_shown(dataset, frame, view)).convert("RGB"), note(dataset)


def open_dicom(data: bytes, limits: ImageLimits) -> Dataset:
    """The data set of a DICOM file in memory. A deflated one is unpacked up to limits.volume_bytes only. Raises ImageError."""
    try:
        from pydicom import dcmread
    except ImportError:
        raise ImageError("DICOM files need more packages: pip install 'hscr[medical]'") from None
    return dcmread(io.BytesIO(_inflated(data, limits.volume_bytes)), force=True)


def _inflated(data: bytes, limit: int) -> bytes:
    """A deflated file as an explicit little-endian one; any other as it is. pydicom itself would unpack without a limit."""
    from pydicom.filereader import read_dataset
    from pydicom.filewriter import write_file_meta_info

    if data[128:132] != b"DICM":
        return data
    file = io.BytesIO(data)
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if str(meta.get("TransferSyntaxUID", "")).strip("\0 ") != _DEFLATED:
        return data
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    content = unpacker.decompress(data[file.tell() :], limit + 1)
    if len(content) > limit:
        raise ImageError(f"the DICOM file unpacks to more than {limit} bytes")
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.uid import UID

    plain = FileMetaDataset(meta)
    plain.TransferSyntaxUID = UID(_EXPLICIT)
    out = DicomBytesIO()
    out.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(out, plain, enforce_standard=False)
    return out.getvalue() + content


def _shown(dataset: Dataset, frame: int, view: View) -> NDArray[np.uint8]:
    """uint8 [rows, columns] of grey values, [rows, columns, 3] of colours."""
    from pydicom.pixels import apply_color_lut

    kind = str(dataset.get("PhotometricInterpretation", "")).strip().upper()
    values = _frame(dataset, frame)
    if values.ndim == 2 and kind != "PALETTE COLOR":
        one = _monochrome(dataset, values, frame, view)
        return 255 - one if kind == "MONOCHROME1" else one
    if view.window is not None:
        raise ImageError("a window is for grey values; this DICOM image has colours")
    if values.ndim == 2:
        values = apply_color_lut(values, dataset)
        top = 255 if values.dtype == np.uint8 else 65535
    else:
        top = 255 if values.dtype == np.uint8 else 2 ** int(dataset.get("BitsStored", 16)) - 1
    if values.dtype != np.uint8:
        values = grey(values, 0, top)
    if values.ndim != 3 or values.shape[2] < 3:
        raise ImageError("the DICOM image's colours are of a kind that is not read here")
    return np.ascontiguousarray(values[..., :3])


def _frame(dataset: Dataset, frame: int) -> NDArray[Any]:
    """The stored values of one frame, [rows, columns] or [rows, columns, 3] in RGB."""
    from pydicom.pixels import pixel_array
    from pydicom.uid import UID

    if (
        "TransferSyntaxUID" not in dataset.file_meta
    ):  # a file without its first group: pydicom has found the encoding out
        implicit, little = dataset.original_encoding
        syntax = "1.2.840.10008.1.2" if implicit else _EXPLICIT if little else "1.2.840.10008.1.2.2"
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
    plugin = "pylibjpeg" if dataset.file_meta.TransferSyntaxUID.is_compressed else ""
    try:
        return pixel_array(dataset, index=frame, decoding_plugin=plugin)
    except RecursionError:
        raise
    except NotImplementedError:
        raise ImageError("the DICOM image is in a transfer syntax that is not read here") from None
    except RuntimeError:  # no plugin could unpack it
        raise ImageError("the DICOM image's compressed data are damaged, or not as their standard wants them") from None


def _monochrome(dataset: Dataset, values: NDArray[Any], frame: int, view: View) -> NDArray[np.uint8]:
    """uint8 of values [rows, columns]: the modality's transformation, then the window of the view or of the file, else the range."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    if "ModalityLUTSequence" in dataset:
        values = apply_modality_lut(values, dataset)
    else:
        rescale = _group(dataset, frame, "PixelValueTransformationSequence")
        slope, intercept = _number(rescale, "RescaleSlope", 1.0), _number(rescale, "RescaleIntercept", 0.0)
        if (slope, intercept) != (1.0, 0.0):
            values = values.astype(np.float64) * slope + intercept
    if view.window is not None:
        return _windowed(values, *view.window, "LINEAR")
    voi = _group(dataset, frame, "FrameVOILUTSequence")
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return grey(apply_voi_lut(np.rint(values).astype(np.int64), dataset, prefer_lut=True), 0, 2**bits - 1)
    width = _number(voi, "WindowWidth", 0.0)
    if width >= 1e-6:
        function = str(voi.get("VOILUTFunction", "") or "LINEAR").upper()
        return _windowed(values, _number(voi, "WindowCenter", 0.0), width, function)
    return _by_range(dataset, values)


def _windowed(values: NDArray[Any], centre: float, width: float, function: str) -> NDArray[np.uint8]:
    """PS3.3 C.11.2.1.2.1 (LINEAR: from c − 0.5 − (w − 1)/2 to c − 0.5 + (w − 1)/2), C.11.2.1.3.1 (SIGMOID), .2 (LINEAR_EXACT)."""
    if function == "SIGMOID":
        return grey(1 / (1 + np.exp(np.clip(-4 * (values.astype(np.float64) - centre) / width, -700, 700))), 0, 1)
    if function == "LINEAR_EXACT" or width <= 1:
        return grey(values, centre - width / 2, centre + width / 2)
    return grey(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)


def _by_range(dataset: Dataset, values: NDArray[Any]) -> NDArray[np.uint8]:
    """From the least to the greatest value, without the padding around a scan's circle, which would take the whole range."""
    padding = dataset.get("PixelPaddingValue")
    if isinstance(padding, int) and "ModalityLUTSequence" not in dataset:
        slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
        inside = values[values != padding * slope + intercept]
        if inside.size:
            return grey(values, float(inside.min()), float(inside.max()))
    return grey(values)


def _group(dataset: Dataset, frame: int, macro: str) -> Dataset:
    """Where a frame's values of a functional group stand: its own group, the shared one, else the data set itself (PS3.3 C.7.6.16)."""
    own, shared = dataset.get("PerFrameFunctionalGroupsSequence") or [], dataset.get("SharedFunctionalGroupsSequence")
    for group in ([own[frame]] if frame < len(own) else []) + list(shared or [])[:1]:
        if found := group.get(macro):
            return found[0]
    return dataset


def _number(dataset: Dataset, name: str, otherwise: float) -> float:
    """The first finite value of an attribute."""
    value = dataset.get(name)
    if value is not None and not isinstance(value, (str, bytes)) and hasattr(value, "__len__"):
        value = value[0] if len(value) else None
    try:
        number = float(value) if value is not None else otherwise
    except (TypeError, ValueError):
        return otherwise
    return number if np.isfinite(number) else otherwise
