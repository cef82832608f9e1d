"""DICOM and NIfTI: the pixels by hand, frame, slice and window, bounded unpacking, headers that say nothing of the patient."""

from __future__ import annotations

import gzip
import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from hscr.clean_image import clean_image
from hscr.dicom_header import cleaned, remapped
from hscr.image_limits import ImageLimits
from hscr.images import ImageError, View, decode_image, read_image
from tests.hscr.medical import dicom, nifti

TEST_FILES = sorted(
    p for p in (Path(pydicom.__file__).parent / "data").rglob("*") if p.is_file() and "py" not in p.suffix
)
KEY = b"k" * 32


def row(image: Any, channel: int = 0) -> list[int]:
    return np.asarray(image)[0, :, channel].tolist()


@pytest.mark.parametrize("file", TEST_FILES, ids=lambda p: p.name)
def test_every_file_that_pydicom_ships_gives_an_image_or_a_clear_refusal(file: Path) -> None:
    data = file.read_bytes()
    try:
        decoded = read_image(file)
    except ImageError as error:
        assert str(error) in (  # noqa: PT017
            "the DICOM file holds no image",
            "the DICOM image is in a transfer syntax that is not read here",
            "the DICOM image's compressed data are damaged, or not as their standard wants them",
            "the image is damaged",
            "the gzipped data is not a NIfTI volume",
            "the data is not a PNG, JPEG, WebP, TIFF, BMP, GIF, DICOM or NIfTI image",
        )
        return
    assert decoded.image.mode == "RGB"
    stored, _ = clean_image(data, KEY)  # raises where it shows something else
    assert clean_image(stored, KEY)[0] == stored


def test_most_of_them_are_images() -> None:
    def reads(file: Path) -> bool:
        try:
            decode_image(file)
        except ImageError:
            return False
        return True

    assert sum(map(reads, TEST_FILES)) >= 98


def test_rescale_and_the_files_window() -> None:
    """Stored 0, 1024, 1064, 2000 → −1024, 0, 40, 976 HU; window 40.5/81: from 0 to 80 (C.11.2.1.2.1) → 0, 0, 127, 255."""
    values = np.array([[0, 1024, 1064, 2000]], np.uint16)
    data = dicom(values, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40.5, WindowWidth=81)
    assert row(decode_image(data)) == [0, 0, 127, 255]
    assert row(decode_image(data, view=View(window=(976.5, 3)))) == [0, 0, 0, 127]


def test_without_a_window_the_range_without_the_padding() -> None:
    values = np.array([[-2000, 0, 50, 100]], np.int16)
    assert row(decode_image(dicom(values, PixelPaddingValue=-2000))) == [0, 0, 127, 255]
    assert row(decode_image(dicom(values))) == [0, 242, 248, 255]


def test_monochrome1_is_inverted() -> None:
    assert row(decode_image(dicom(np.array([[0, 255]], np.uint8), PhotometricInterpretation="MONOCHROME1"))) == [255, 0]


def test_exact_and_sigmoid_windows() -> None:
    values = np.array([[0, 50, 100]], np.uint16)
    assert row(decode_image(dicom(values, WindowCenter=50, WindowWidth=100, VOILUTFunction="LINEAR_EXACT"))) == [
        0,
        127,
        255,
    ]
    sigmoid = row(decode_image(dicom(values, WindowCenter=50, WindowWidth=100, VOILUTFunction="SIGMOID")))
    assert sigmoid == [30, 127, 224]  # 255/(1 + e^2), 255/2, 255/(1 + e^-2)


def item(**attributes: Any) -> Dataset:
    made = Dataset()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def table(*entries: int) -> Dataset:
    """Of stored values from 0."""
    return item(LUTDescriptor=[len(entries), 0, 16], LUTData=np.array(entries, np.uint16).tobytes())


def test_look_up_tables_of_modality_and_display() -> None:
    """Stored 0…3; the display's table goes before the file's window, and the asker's window before both."""
    values = np.array([[0, 1, 2, 3]], np.uint8)
    display = table(0, 65535, 32768, 16384)
    windowed = {"WindowCenter": 1, "WindowWidth": 1}
    shown = dicom(values, VOILUTSequence=[display], **windowed)
    assert row(decode_image(shown)) == [0, 255, 127, 63]
    assert row(decode_image(shown, view=View(window=(2, 3)))) == [0, 63, 191, 255]  # from 0.5 to 2.5
    assert row(decode_image(dicom(values, ModalityLUTSequence=[table(0, 3000, 1000, 2000)]))) == [0, 255, 85, 170]


def test_a_palettes_colours_are_shown() -> None:
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in (("Red", [0, 65535, 0]), ("Green", [65535, 0, 0]), ("Blue", [0, 0, 32896])):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = np.array(entries, np.uint16).tobytes()
    image = decode_image(dicom(np.array([[0, 1, 2]], np.uint8), **palette))
    assert np.asarray(image)[0].tolist() == [[0, 255, 0], [255, 0, 0], [0, 0, 128]]


def test_each_frame_has_its_own_window_and_all_may_share_a_rescale() -> None:
    """PS3.3 C.7.6.16: stored 0, 50, 100 are −100, 0, 100; frame 0 is shown from −75 to 75, frame 1 from 0 to 50."""

    def own(centre: float, width: float) -> Dataset:
        return item(FrameVOILUTSequence=[item(WindowCenter=centre, WindowWidth=width)])

    rescale = item(RescaleSlope=2, RescaleIntercept=-100)
    data = dicom(
        np.array([[[0, 50, 100]]] * 2, np.uint8),
        SharedFunctionalGroupsSequence=[item(PixelValueTransformationSequence=[rescale])],
        PerFrameFunctionalGroupsSequence=[own(0.5, 151), own(25.5, 51)],
    )
    assert row(decode_image(data)) == [0, 127, 255]
    assert row(decode_image(data, view=View(frame=1))) == [0, 0, 255]


def test_a_frame_is_chosen() -> None:
    data = dicom(np.array([[[0, 9]], [[9, 0]]], np.uint8))
    assert row(decode_image(data)) == row(decode_image(data, view=View(frame=0))) == [0, 255]
    assert row(decode_image(data, view=View(frame=1))) == [255, 0]
    with pytest.raises(ImageError, match="frame: the file has fewer"):
        decode_image(data, view=View(frame=2))


def test_choices_that_the_format_does_not_have_are_refused() -> None:
    for view in (View(plane="axial"), View(slice=0)):
        with pytest.raises(ImageError, match="plane and slice are for NIfTI"):
            decode_image(dicom(np.zeros((2, 2), np.uint8)), view=view)


def test_limits_of_rows_and_frames_hold_by_the_header() -> None:
    huge = dicom(np.zeros((2, 2), np.uint8), Rows=60000, Columns=60000)
    with pytest.raises(ImageError, match="pixels"):
        decode_image(huge)
    with pytest.raises(ImageError, match="frame or more"):
        decode_image(dicom(np.zeros((2, 2), np.uint8), NumberOfFrames=10**6))


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_a_bomb_is_refused_while_it_unpacks(kind: str) -> None:
    """100 MB of zeros in about 100 KB: never more than the limit and a little is unpacked."""
    zeros = np.zeros((10_000, 10_000), np.uint8)
    data = dicom(zeros, DeflatedExplicitVRLittleEndian) if kind == "dicom" else gzip.compress(nifti(zeros[None]), 9)
    assert len(data) < 300_000
    limits = ImageLimits(volume_bytes=2**20)
    tracemalloc.start()
    with pytest.raises(ImageError, match="unpacks to more than 1048576 bytes"):
        decode_image(data, limits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20


def test_compressed_pixels_are_never_unpacked_by_gdcm(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2026-3650: where it is installed, pydicom would ask it too."""
    unpack, plugins = pydicom.pixels.pixel_array, set()

    def noted(*args: Any, **options: Any) -> Any:
        plugins.add(options["decoding_plugin"])
        return unpack(*args, **options)

    monkeypatch.setattr(pydicom.pixels, "pixel_array", noted)
    for name in ("JPEG2000.dcm", "MR_small_RLE.dcm"):
        (file,) = [p for p in TEST_FILES if p.name == name]
        decode_image(file)
    assert plugins == {"pylibjpeg"}


def test_a_deflated_file_is_read() -> None:
    values = np.array([[0, 255]], np.uint8)
    assert row(decode_image(dicom(values, DeflatedExplicitVRLittleEndian))) == [0, 255]


def test_planes_of_a_volume_are_shown_as_radiologists_hold_them() -> None:
    """Right, front, head ascend with the indices; value = 100·x + 10·y + z. Right is left, front or head is up."""
    x, y, z = np.meshgrid(np.arange(2), np.arange(3), np.arange(4), indexing="ij")
    volume = (100 * x + 10 * y + z).astype(np.int16)
    full = View(window=(127.5, 255))

    def shown(data: bytes, plane: str | None, index: int | None) -> list[list[int]]:
        return np.asarray(decode_image(data, view=View(plane=plane, slice=index, window=full.window)))[..., 0].tolist()

    axial, coronal = [[121, 21], [111, 11], [101, 1]], [[113, 13], [112, 12], [111, 11], [110, 10]]
    sagittal = [[23, 13, 3], [22, 12, 2], [21, 11, 1], [20, 10, 0]]
    flipped = nifti(volume[::-1, :, ::-1], np.diag([-1.0, 1, -1, 1]))  # the same patient, stored the other way round
    turned = nifti(volume.transpose(2, 0, 1), np.array([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]))
    for data in (nifti(volume), flipped, turned, gzip.compress(nifti(volume))):
        assert shown(data, "axial", 1) == axial
        assert shown(data, "coronal", 1) == coronal
        assert shown(data, "sagittal", 0) == sagittal
    assert shown(nifti(volume), None, None) == (np.array(axial) + 1).tolist()  # axial, the middle: 2 of 4
    with pytest.raises(ImageError, match="slice: the volume has fewer"):
        shown(nifti(volume), "axial", 4)


def test_the_range_that_a_volume_asks_to_be_shown_in() -> None:
    import nibabel

    volume = nibabel.Nifti1Image(np.array([[[0]], [[50]], [[200]]], np.int16), np.eye(4))
    volume.header["cal_min"], volume.header["cal_max"] = 0, 100
    assert row(decode_image(volume.to_bytes())) == [255, 127, 0]  # the patient's right is left
    assert row(decode_image(volume.to_bytes(), view=View(window=(100, 200)))) == [255, 63, 0]


def test_a_time_point_is_chosen_and_headers_without_data_are_damaged() -> None:
    volume = np.zeros((2, 2, 1, 2), np.int16)
    volume[..., 1] = [[[0], [5]], [[5], [5]]]
    assert np.asarray(decode_image(nifti(volume), view=View(frame=1)))[..., 0].tolist() == [[255, 255], [255, 0]]
    with pytest.raises(ImageError, match="damaged"):
        decode_image(nifti(np.zeros((64, 64, 64), np.int16))[:5000])


def test_a_cleaned_file_says_nothing_of_the_patient_and_keeps_its_study_together() -> None:
    values = np.array([[0, 9]], np.uint8)
    canary = {
        "PatientName": "Canary^Jane",
        "PatientID": "CANARY1",
        "InstitutionName": "canary",
        "BodyPartExamined": "CANARY",
        "StudyDescription": "canary",
        "WindowCenterWidthExplanation": "canary",
        "ImageType": ["CANARY"],
        "RescaleType": "CANARY",
    }

    def file(number: str, **changes: Any) -> bytes:
        made = pydicom.dcmread(io.BytesIO(dicom(values, **canary, **changes)))
        made.SOPInstanceUID = number
        block = made.private_block(0x0009, "CANARY CORP", create=True)
        block.add_new(1, "LO", "canary private")
        out = io.BytesIO()
        made.save_as(out)
        return b"canary".ljust(128, b"!") + out.getvalue()[128:]  # the preamble may hold anything

    first, second = cleaned(file("1.2.3.4"), KEY), cleaned(file("1.2.3.5", BurnedInAnnotation="YES"), KEY)
    for data in (first, second):
        assert b"canary" not in data.lower()
        assert row(decode_image(data)) == [0, 255]
    one, two = (pydicom.dcmread(io.BytesIO(d)) for d in (first, second))
    assert one.StudyInstanceUID == two.StudyInstanceUID == remapped("1.2.3", KEY) != remapped("1.2.3", b"other")
    assert one.SOPInstanceUID != two.SOPInstanceUID
    assert not any(e.tag.is_private for e in one)
    assert cleaned(file("1.2.3.4"), KEY) == first


@pytest.mark.parametrize(
    ("attributes", "flags"),
    [
        ({}, ()),
        ({"BurnedInAnnotation": "YES"}, ("burned_in_annotation",)),
        ({"BurnedInAnnotation": "NO"}, ()),
        ({"RecognizableVisualFeatures": "YES"}, ("recognizable_features",)),
        ({"Modality": "US"}, ("ultrasound",)),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}, ("ultrasound",)),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}, ("secondary_capture",)),
        ({"ConversionType": "WSD"}, ("secondary_capture",)),
        ({"Modality": "CANARY"}, ()),
    ],
)
def test_pixels_that_may_show_who_it_is_are_flagged(attributes: dict[str, str], flags: tuple[str, ...]) -> None:
    note = read_image(dicom(np.zeros((2, 2), np.uint8), **attributes)).note
    assert (note.flags, note.modality in (None, "CT", "US")) == (flags, True)
