"""What is kept of a DICOM header: what the pixels need and a few words of a fixed list. Everything else, private tags first, is dropped.

`cleaned` writes a file of these attributes only, its UIDs remapped by a keyed hash: files of one study stay together, and nobody without
the key finds the study they came from. This is no de-identification by PS3.15: what is burned into the pixels stays, so it is flagged.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import warnings
from collections.abc import MutableSequence
from typing import TYPE_CHECKING

from hscr.dicom import open_dicom
from hscr.image_limits import ImageLimits, Note
from hscr.jpeg_segments import blank_texts

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset
    from pydicom.uid import UID

# Numbers and tables that turn stored values into grey or colour.
_PIXEL_ATTRIBUTES = frozenset(
    "SamplesPerPixel PlanarConfiguration NumberOfFrames Rows Columns PixelSpacing ImagerPixelSpacing PixelAspectRatio BitsAllocated "
    "BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit RescaleIntercept RescaleSlope WindowCenter "
    "WindowWidth LUTDescriptor LUTData RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor "
    "BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData GreenPaletteColorLookupTableData "
    "BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData "
    "SegmentedBluePaletteColorLookupTableData SmallestImagePixelValue LargestImagePixelValue PixelData FloatPixelData "
    "DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths".split()
)
_SEQUENCES = frozenset(
    "ModalityLUTSequence VOILUTSequence SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence FrameVOILUTSequence "
    "PixelValueTransformationSequence".split()
)
_UIDS = frozenset("SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID".split())
# Code strings are free text to a careless tool: only these values of them are kept.
_WORDS = {
    "PhotometricInterpretation": r"MONOCHROME[12]|PALETTE COLOR|RGB|HSV|ARGB|CMYK|YBR_(FULL|FULL_422|PARTIAL_42[02]|ICT|RCT)",
    "VOILUTFunction": r"LINEAR|LINEAR_EXACT|SIGMOID",
    "PresentationLUTShape": r"IDENTITY|INVERSE",
    "BurnedInAnnotation": r"YES|NO",
    "RecognizableVisualFeatures": r"YES|NO",
    "LossyImageCompression": r"0[01]",
    "ConversionType": r"DV|DI|DF|WSD|SD|SI|DRW|SYN",
    "Modality": r"AR|AU|BDUS|BI|BMD|CR|CT|DG|DMS|DX|ECG|ES|FA|FS|GM|IO|IVOCT|IVUS|LS|MG|MR|NM|OAM|OCT|OP|OPM|OPT|OPTBSV|OPTENF|OPV|OSS|OT|"
    r"PT|PX|RF|RG|RTDOSE|RTIMAGE|SEG|SM|SMR|TG|US|VA|XA|XC",
}
_SOP_CLASS = re.compile(r"1\.2\.840\.10008(\.\d{1,8}){1,8}")
_ULTRASOUND = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(3\.1|6\.[123])")
_SECONDARY = "1.2.840.10008.5.1.4.1.1.7"


def note(dataset: Dataset) -> Note:
    """The modality where it is a known one, and the flags."""
    kind, modality = str(dataset.get("SOPClassUID", "")), _word(dataset, "Modality")
    flags = {
        "burned_in_annotation": _word(dataset, "BurnedInAnnotation") == "YES",
        "recognizable_features": _word(dataset, "RecognizableVisualFeatures") == "YES",
        "ultrasound": modality in ("US", "IVUS", "BDUS") or _ULTRASOUND.fullmatch(kind) is not None,
        "secondary_capture": kind == _SECONDARY or kind.startswith(_SECONDARY + ".") or "ConversionType" in dataset,
    }
    return Note("dicom", modality, tuple(name for name, there in flags.items() if there))


def cleaned(data: bytes, key: bytes, limits: ImageLimits = ImageLimits()) -> bytes:
    """A DICOM file of the same pixels with nothing but the attributes above. Raises ImageError, and what pydicom raises on damaged data."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset, write_file_meta_info
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = open_dicom(data, limits)
        kept = _kept(dataset, key, 0)
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if syntax is None:
            implicit, little = dataset.original_encoding
            syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        if "PixelData" in kept:
            kept.PixelData = _pixels(dataset, UID(syntax))
        kept.file_meta = FileMetaDataset()
        kept.file_meta.TransferSyntaxUID = syntax
        if "SOPClassUID" in kept:
            kept.file_meta.MediaStorageSOPClassUID = kept.SOPClassUID
        if "SOPInstanceUID" in kept:
            kept.file_meta.MediaStorageSOPInstanceUID = kept.SOPInstanceUID
        out = DicomBytesIO()
        out.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(out, kept.file_meta, enforce_standard=False)
        out.is_implicit_VR, out.is_little_endian = syntax.is_implicit_VR, syntax.is_little_endian
        write_dataset(out, kept)
        return out.getvalue()


def _pixels(dataset: Dataset, syntax: UID) -> bytes:
    """Pixel data with nothing behind the last value; compressed streams without their comments."""
    from pydicom.pixels.utils import get_expected_length

    data: bytes = dataset.PixelData
    if not syntax.is_encapsulated:
        expected = get_expected_length(dataset)
        return data[: expected + expected % 2]
    out, position = bytearray(data), 0
    while position + 8 <= len(out):
        start = position + 8
        position = start + int.from_bytes(out[position + 4 : start], "little")
        blank_texts(out, start, min(position, len(out)))
    return bytes(out)


def remapped(uid: str, key: bytes) -> str:
    """Another UID for a UID, always the same one under a key (PS3.5 B.2: 2.25 and 128 bits). One that was made under this key stays.

    96 bits are the UID's keyed hash, 32 the hash of those, by which ours are known again: a cleaned file cleaned again is the same file.
    """
    number = int(uid[5:]) if re.fullmatch(r"2\.25\.[0-9]{1,39}", uid) else 0
    if 0 < number < 2**128:
        ours = number.to_bytes(16, "big")
        if hmac.compare_digest(_hash(key, b"ours", ours[:12])[:4], ours[12:]):
            return uid
    head = _hash(key, b"uid", uid.encode("utf-8", "replace"))[:12]
    return f"2.25.{int.from_bytes(head + _hash(key, b'ours', head)[:4], 'big')}"


def _hash(key: bytes, what: bytes, value: bytes) -> bytes:
    return hmac.new(key, what + b":" + value, hashlib.sha256).digest()


def _kept(dataset: Dataset, key: bytes, depth: int) -> Dataset:
    from pydicom import Dataset

    out = Dataset()
    for element in dataset:
        name = element.keyword
        if element.tag.is_private or not name:
            continue
        if name in _PIXEL_ATTRIBUTES:
            if _is_number(element):
                out.add(element)
        elif name in _SEQUENCES and depth < 3:
            setattr(out, name, [_kept(item, key, depth + 1) for item in element.value])
        elif name in _UIDS and element.value:
            setattr(out, name, remapped(str(element.value), key))
        elif name in _WORDS and (word := _word(dataset, name)) is not None:
            setattr(out, name, word)
        elif name == "SOPClassUID" and _SOP_CLASS.fullmatch(str(element.value)):
            setattr(out, name, str(element.value))
    encoding = dataset.original_encoding if depth == 0 else (None, None)
    if encoding[0] is not None:
        out.set_original_encoding(*encoding, dataset.original_character_set)
    return out


def _is_number(element: DataElement) -> bool:
    """Whether it is of the dictionary's type, whatever the file says, and a number where that is a decimal string, for any text fits."""
    from pydicom.datadict import dictionary_VR

    values = element.value if isinstance(element.value, MutableSequence) else [element.value]
    numbers = element.VR not in ("DS", "IS") or all(isinstance(v, (int, float)) for v in values if v is not None)
    return element.VR in dictionary_VR(element.tag).split(" or ") and numbers


def _word(dataset: Dataset, name: str) -> str | None:
    value = str(dataset.get(name, "") or "").strip()
    return value if re.fullmatch(_WORDS[name], value) else None
