"""A file of the same pixels without what else it says: who, when, where, with what. The door to one cleaner a format.

Kept is what decoding needs, from lists of what may stay; everything else goes, whatever it is called. What is burned into the pixels stays:
flags tell where that is likely (hscr/image_limits.py). A file that holds nothing more stays as it is, byte for byte.
"""

from __future__ import annotations

from hscr.image_limits import ImageError, ImageLimits, Note
from hscr.image_view import View
from hscr.images import is_dicom, is_nifti, read_image

OTHER_PIXELS = "the image shows something else without its header's texts, so it is not kept"


def clean_image(
    data: bytes, key: bytes, limits: ImageLimits = ImageLimits(), view: View = View()
) -> tuple[bytes, Note]:
    """The cleaned file and what is told of the image; `key` remaps a DICOM file's UIDs.

    Raises ImageError, also where the pixels of the view would be others.
    """
    before = read_image(data, limits, view)
    try:
        after = _cleaned(data, key, limits)
    except ImageError:
        raise
    except Exception:  # a header that a decoder bears and a cleaner does not
        raise ImageError("the image is damaged") from None
    if after != data and read_image(after, limits, view).image.tobytes() != before.image.tobytes():
        raise ImageError(OTHER_PIXELS)
    return after, before.note


def _cleaned(data: bytes, key: bytes, limits: ImageLimits) -> bytes:
    head = data[:1024]
    if is_dicom(head):
        from hscr.dicom_header import cleaned

        return cleaned(data, key, limits)
    if is_nifti(head):
        from hscr.nifti_header import without_texts

        return without_texts(data, limits)
    from hscr.picture_metadata import without_metadata

    return without_metadata(data)
