"""Small DICOM and NIfTI files whose pixels are known, for tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import ExplicitVRLittleEndian

CT = "1.2.840.10008.5.1.4.1.1.2"


def dicom(values: Any, syntax: str = ExplicitVRLittleEndian, **attributes: Any) -> bytes:
    """A file of stored values: uint16 or int16 [rows, columns] or [frames, rows, columns], uint8 too."""
    values = np.asarray(values)
    d = Dataset()
    d.SOPClassUID, d.SOPInstanceUID, d.StudyInstanceUID = CT, "1.2.3.4", "1.2.3"
    d.Modality = "CT"
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    if values.ndim == 3:
        d.NumberOfFrames = len(values)
    d.Rows, d.Columns = values.shape[-2:]
    bits = values.dtype.itemsize * 8
    d.BitsAllocated, d.BitsStored, d.HighBit = bits, bits, bits - 1
    d.PixelRepresentation = int(values.dtype.kind == "i")
    d.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    for name, value in attributes.items():
        setattr(d, name, value)
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    dcmwrite(out, d, enforce_file_format=True)
    return out.getvalue()


def nifti(values: Any, affine: Any = None) -> bytes:
    import nibabel

    return nibabel.Nifti1Image(np.asarray(values), np.eye(4) if affine is None else affine).to_bytes()
