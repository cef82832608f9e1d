"""Cleaned files: no canary in any byte, the same pixels bit for bit, and a file that says nothing stays as it is."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel.nifti1 import Nifti1Extension
from PIL import Image, ImageCms, ImageSequence, PngImagePlugin, TiffImagePlugin
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames

from hscr.clean_image import OTHER_PIXELS, clean_image
from hscr.images import ImageError, View, decode_image
from hscr.picture_metadata import without_metadata
from tests.hscr.medical import dicom

KEY = b"k" * 32
CANARY = "CANARY"


def clean(data: bytes) -> bytes:
    """Cleaned, with no canary in any byte, and cleaned again the same."""
    assert b"canary" in data.lower()
    after, _ = clean_image(data, KEY)
    assert b"canary" not in after.lower()
    assert decode_image(after).tobytes() == decode_image(data).tobytes()
    assert clean_image(after, KEY)[0] == after
    return after


# DICOM


def said_everywhere(values: np.ndarray, **changes: Any) -> bytes:
    """A file with a canary in every attribute that may hold text, in private ones, overlays, sequences, its meta group and its preamble."""
    texts = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
    kept = {
        "PhotometricInterpretation",
        "VOILUTFunction",
        "SpecificCharacterSet",
    }  # other values would make another file
    d = pydicom.dcmread(io.BytesIO(dicom(values, **changes)))
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        if vr in texts and keyword and keyword not in kept and tag >> 16 > 2 and not retired:
            d.add_new(tag, vr, CANARY)
    d.add_new(0x00101010, "AS", "077Y")
    d.StudyDate, d.StudyTime = "18991231", "235959"
    d.ReferencedSOPInstanceUID = "1.2.826.0.99999"
    inner = Dataset()
    inner.WindowCenterWidthExplanation, inner.WindowCenter, inner.WindowWidth = CANARY, "4", "8"
    shared = Dataset()
    shared.FrameVOILUTSequence, shared.PatientName = [inner], CANARY
    shared.ReferencedImageSequence = [Dataset()]
    shared.ReferencedImageSequence[0].PatientComments = CANARY
    d.SharedFunctionalGroupsSequence = d.RequestAttributesSequence = [shared]
    for group in (0x6000, 0x6002):
        d.add_new((group, 0x1500), "LO", CANARY)
        d.add_new((group, 0x3000), "OW", b"CANARYCANARY")
    d.add_new((0x5000, 0x2500), "LO", CANARY)
    block = d.private_block(0x0009, "CANARY CORP", create=True)
    block.add_new(1, "UN", b"CANARY")
    d.SpecificCharacterSet = "ISO_IR 100"
    d.add_new(0x00280030, "LO", CANARY)  # PixelSpacing, which is kept, in a type that carries any text
    d.PixelData = d.PixelData + b"canary"
    d.add_new(0xFFFCFFFC, "OB", b"canary")
    d.file_meta.ImplementationVersionName = d.file_meta.SourceApplicationEntityTitle = CANARY
    d.file_meta.PrivateInformationCreatorUID, d.file_meta.PrivateInformation = "1.2", b"CANARY"
    out = io.BytesIO()
    d.save_as(out)
    return b"canary".ljust(128, b"!") + out.getvalue()[128:].replace(b"ISO_IR 100", b"CANARY 100")


def test_no_text_of_a_dicom_file_is_kept_wherever_it_stands() -> None:
    values = np.arange(64, dtype=np.int16).reshape(8, 8) * 3 - 40
    before = said_everywhere(values)
    after = clean(before)
    d = pydicom.dcmread(io.BytesIO(after))
    assert np.array_equal(d.pixel_array, values)
    for lost in (b"077Y", b"18991231", b"235959", b"1.2.826.0.99999"):
        assert lost in before
        assert lost not in after
    assert len(before) > 20_000 > 1000 > len(after)


def test_a_number_that_is_text_is_dropped_by_its_type_and_by_its_value() -> None:
    d = pydicom.dcmread(io.BytesIO(dicom(np.array([[0, 9]], np.uint8))))
    d.add_new(0x00281050, "LO", CANARY)  # WindowCenter
    out = io.BytesIO()
    d.save_as(out)
    for vr in (b"LO", b"DS", b"IS", b"LT"):
        after = clean(out.getvalue().replace(b"\x28\0\x50\x10LO", b"\x28\0\x50\x10" + vr))
        assert "WindowCenter" not in pydicom.dcmread(io.BytesIO(after))
    binary = out.getvalue().replace(b"\x28\0\x50\x10LO\6\0", b"\x28\0\x50\x10OB\0\0\6\0\0\0")
    assert "WindowCenter" not in pydicom.dcmread(io.BytesIO(clean(binary)))


def test_comments_inside_a_compressed_frame_are_blank() -> None:
    """A JPEG frame with a comment, an application segment and EXIF before its tables."""
    path = Path(pydicom.__file__).parent / "data" / "test_files" / "SC_rgb_jpeg_dcmtk.dcm"
    d = pydicom.dcmread(path)
    said = b"".join(b"\xff" + bytes([m]) + struct.pack(">H", 8) + b"CANARY" for m in (0xFE, 0xE3))
    frames = [f[:2] + said + f[2:] for f in generate_frames(d.PixelData, number_of_frames=1)]
    d.PixelData = encapsulate(frames)
    out = io.BytesIO()
    d.save_as(out)
    after = clean(out.getvalue())
    assert np.array_equal(pydicom.dcmread(io.BytesIO(after)).pixel_array, pydicom.dcmread(path).pixel_array)


# NIfTI


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image], ids=["1", "2"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_volumes_texts_and_extensions_are_blank_and_its_values_the_same(kind: Any, order: str, packed: bool) -> None:
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6) * 7 - 100
    header = kind.header_class(endianness=order)
    volume = kind(values, np.diag([2.0, 3, 4, 1]), header)
    for name in ("descrip", "aux_file", "intent_name", "db_name", "data_type", "unused_str"):
        if name in volume.header.keys():  # noqa: SIM118 (a header is no dict)
            volume.header[name] = CANARY
    volume.header.extensions.append(Nifti1Extension("comment", b"CANARY " * 20))
    volume.header.set_slope_inter(2.0, 1.0)
    data = volume.to_bytes() + b"canary"
    if packed:
        out = io.BytesIO()
        with gzip.GzipFile("canary.nii", "wb", fileobj=out, mtime=77) as file:
            file.write(data)
        data = out.getvalue()
    after = clean(data)
    plain = gzip.decompress(after) if packed else after
    assert b"CANARY" not in plain
    read, was = kind.from_bytes(plain), kind.from_bytes(gzip.decompress(data) if packed else data)
    assert np.array_equal(read.dataobj.get_unscaled(), was.dataobj.get_unscaled())
    assert np.array_equal(read.get_fdata(), was.get_fdata())
    assert np.array_equal(read.affine, was.affine)
    assert not read.header.extensions


def test_a_gzipped_volume_without_texts_stays_unless_it_holds_more_than_the_volume() -> None:
    plain = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes()
    packed = gzip.compress(plain, mtime=0)
    assert clean_image(packed, KEY)[0] == packed
    for more in (gzip.compress(plain, mtime=9), packed + gzip.compress(b"canary", mtime=0)):
        assert gzip.decompress(clean_image(more, KEY)[0]) == plain


# Pictures

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"sRGB", b"CANA")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a>CANARY</a></x:xmpmeta>'


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112], made[0x013B], made[0x010E] = orientation, CANARY, CANARY
    made.get_ifd(0x8825)[0x001D] = "CANARY 2026"
    return made


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rgb() -> Image.Image:
    down, across = np.mgrid[0:24, 0:40]
    return Image.fromarray(np.stack([down * 10, across * 6, down * across % 251], axis=-1).astype(np.uint8))


def a_png(orientation: int) -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Author", CANARY)
    texts.add_text("Comment", CANARY, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
    texts.add(b"tIME", bytes([7, 106, 11, 26, 1, 1, 1]))
    texts.add(b"prVt", b"CANARY")
    data = saved(rgb(), "PNG", pnginfo=texts, exif=exif(orientation), icc_profile=ICC, dpi=(72, 72))
    return data + b"canary behind the picture"


def a_jpeg(orientation: int, **options: Any) -> bytes:
    data = saved(rgb(), "JPEG", exif=exif(orientation), icc_profile=ICC, xmp=XMP, comment=CANARY, quality=80, **options)
    photoshop = b"\xff\xed" + struct.pack(">H", 30) + b"Photoshop 3.0\0CANARY".ljust(28)
    return data[:2] + photoshop + data[2:] + b"canary"


def a_webp(orientation: int, **options: Any) -> bytes:
    return saved(rgb(), "WEBP", exif=exif(orientation), icc_profile=ICC, xmp=XMP, **options) + b"canary"


def a_tiff(orientation: int, pages: int = 1, **options: Any) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (269, 270, 271, 305, 306, 315, 316, 33432, 37724 - 1):
        tags[tag] = CANARY
    tags[274] = orientation
    tags[700] = XMP
    tags.tagtype[700] = 1
    more = [rgb().rotate(90 * n) for n in range(1, pages)]
    data = saved(rgb(), "TIFF", tiffinfo=tags, icc_profile=ICC, save_all=pages > 1, append_images=more, **options)
    return data + b"canary"


def a_gif() -> bytes:
    frames = [rgb().rotate(90 * n).convert("P") for n in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=CANARY.encode(), loop=0) + b"canary"


def a_bmp(image: Image.Image, gap: int = 8) -> bytes:
    data = bytearray(saved(image, "BMP"))
    (start,) = struct.unpack_from("<I", data, 10)
    data[start:start] = b"canary!!"[:gap]
    data[6:10] = b"cana"
    struct.pack_into("<I", data, 10, start + gap)
    return bytes(data) + b"canary"


PICTURES: dict[str, Callable[[], bytes]] = {
    "png": lambda: a_png(1),
    "png turned": lambda: a_png(6),
    "jpeg": lambda: a_jpeg(1),
    "jpeg turned": lambda: a_jpeg(8),
    "jpeg progressive": lambda: a_jpeg(3, progressive=True),
    "webp": lambda: a_webp(1),
    "webp turned": lambda: a_webp(5, lossless=True),
    "webp moving": lambda: a_webp(1, save_all=True, append_images=[rgb().rotate(180)]),
    "tiff": lambda: a_tiff(1),
    "tiff turned, lzw": lambda: a_tiff(6, compression="tiff_lzw"),
    "tiff, deflate": lambda: a_tiff(1, compression="tiff_adobe_deflate"),
    "tiff, jpeg": lambda: a_tiff(1, compression="jpeg"),
    "tiff, pages": lambda: a_tiff(1, pages=3),
    "bigtiff": lambda: a_tiff(1, big_tiff=True),
    "gif": a_gif,
    "bmp": lambda: a_bmp(rgb()),
    "bmp, grey": lambda: a_bmp(rgb().convert("L")),
}


TURNED = {"png turned": 6, "jpeg turned": 8, "jpeg progressive": 3, "webp turned": 5, "tiff turned, lzw": 6}
LOST = {"icc_profile", "xmp", "XML:com.adobe.xmp", "comment", "Author", "Comment", "photoshop"}


def frames(data: bytes) -> list[tuple[str, bytes]]:
    with Image.open(io.BytesIO(data)) as image:
        return [(frame.mode, frame.tobytes()) for frame in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_keeps_its_pixels_and_how_it_was_held_and_nothing_else(name: str) -> None:
    before = PICTURES[name]()
    after = clean(before)
    assert frames(after) == frames(before), "as stored, every frame"
    with Image.open(io.BytesIO(after)) as image:
        tags = dict(image.getexif())
        image.load()
        assert tags.get(0x0112, 1) == TURNED.get(name, 1)
        assert image.format == "TIFF" or set(tags) <= {0x0112}
        assert not set(tags) & {269, 270, 271, 305, 306, 315, 316, 700, 33432, 34675, 34665, 34853}
        assert not LOST & set(image.info)


def test_a_picture_that_says_nothing_stays_byte_for_byte() -> None:
    for data in (
        saved(rgb(), "PNG"),
        saved(rgb(), "JPEG"),
        saved(rgb(), "WEBP"),
        saved(rgb().convert("P"), "GIF"),
        saved(rgb(), "BMP"),
    ):
        assert clean_image(data, KEY)[0] == data


def test_a_lie_about_lengths_is_damage(tmp_path: Path) -> None:
    for data in (a_png(1)[:-60], a_jpeg(1)[:-2000], a_gif()[:-40]):
        with pytest.raises(ImageError):
            clean_image(data, KEY)
    endless = bytearray(a_tiff(1))
    (first,) = struct.unpack_from("<I", endless, 4)
    (n,) = struct.unpack_from("<H", endless, first)
    struct.pack_into("<I", endless, first + 2 + n * 12, first)  # the directory comes after itself
    with pytest.raises(ImageError, match="damaged"):
        without_metadata(bytes(endless))


def test_a_picture_that_would_be_seen_otherwise_is_not_kept() -> None:
    """Turned by XMP alone, in a TIFF: nothing that stays says so."""
    turn = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = turn
    tags.tagtype[700] = 1
    data = saved(rgb(), "TIFF", tiffinfo=tags)
    assert decode_image(data).size == (24, 40)
    with pytest.raises(ImageError, match=OTHER_PIXELS):
        clean_image(data, KEY)


def test_the_view_that_is_asked_for_is_the_one_that_is_compared() -> None:
    data = dicom(np.arange(32, dtype=np.uint16).reshape(2, 4, 4), PatientName=CANARY)
    after, note = clean_image(data, KEY, view=View(frame=1, window=(20, 10)))
    assert note.format == "dicom"
    assert decode_image(after, view=View(frame=1)).tobytes() == decode_image(data, view=View(frame=1)).tobytes()


def test_compressed_texts_are_gone_too() -> None:
    """A canary that no search finds: what is compressed, and what is compressed in a chunk of a known name."""
    hidden = zlib.compress(b"CANARY")
    data = saved(rgb(), "PNG")
    chunk = struct.pack(">I4s", len(hidden) + 3, b"zTXt") + b"a\0\0" + hidden
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    said = data[:33] + chunk + data[33:]
    assert clean_image(said, KEY)[0] == data
