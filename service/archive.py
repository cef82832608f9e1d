"""Unpacking an uploaded zip of a data set: everything is checked before the first byte is written, and counted while it is.

Refused: too many or too large entries, links, encrypted entries, paths that leave the folder or carry control characters, two of one name.
Only files of labels and images are written; whatever else lies in the archive (a README, a .DS_Store) is left out.
"""

from __future__ import annotations

import shutil
import stat
import unicodedata
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from service.errors import Problem

_KEPT = {
    ".jsonl",
    ".json",
    ".csv",
    ".parquet",
    ".pkl",
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".nii",
    ".gz",
    ".dcm",
    ".dicom",
    ".ima",
    "",  # scanners name DICOM files by numbers
}
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENTRY, _ENTRY_BYTES = (
    b"PK\x01\x02",
    46 + 400 + 100,
)  # of the list of entries: the longest name, and what zip64 and times add
_LIST_BYTES = 48 * 2**20  # zipfile holds the list three times; 200,000 entries of usual names take half of this
_RATIO_MAX = 200  # deflate reaches 1032; text of real records stays far below this, a bomb does not


@dataclass(frozen=True)
class ArchiveLimits:
    unpacked_bytes: int
    entries: int
    entry_bytes: int = 512 * 2**20


def unpack(file: IO[bytes], target: Path, limits: ArchiveLimits, kept: Collection[str] = _KEPT) -> None:
    """Write the archive's files of the `kept` suffixes (records and images) below `target`. Raises Problem."""
    try:
        with zipfile.ZipFile(_Counted(file, limits.entries)) as archive:
            entries = _checked(archive, limits, kept)
            left = limits.unpacked_bytes
            for entry, path in entries:
                left -= _write(archive, entry, target / path, min(left, limits.entry_bytes))
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, UnicodeDecodeError):
        raise _refusal("The file is not a whole zip archive.") from None
    except RuntimeError as error:  # zipfile's word for an encrypted entry
        raise _refusal("The archive has encrypted entries.") from error
    except Exception as error:
        if type(error).__name__ == "error":  # zlib.error: a damaged stream
            raise _refusal("The archive is damaged.") from None
        raise


class _Counted:
    """The file as zipfile reads it: the list of entries, which it reads at once and keeps, is counted before it makes objects of it.

    An entry takes 47 bytes of a file and a kilobyte of memory.
    """

    def __init__(self, file: IO[bytes], entries: int) -> None:
        self._file, self._entries = file, entries

    def read(self, size: int = -1) -> bytes:
        if size > min(_ENTRY_BYTES * self._entries + 2**20, _LIST_BYTES):
            raise _refusal("The archive's list of entries is too long.")
        data = self._file.read(size)
        if len(data) > len(_ENTRY) * self._entries and data.count(_ENTRY) > self._entries:
            raise _refusal(f"The archive has more than {self._entries} entries.")
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _checked(
    archive: zipfile.ZipFile, limits: ArchiveLimits, suffixes: Collection[str]
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    infos = archive.infolist()
    if len(infos) > limits.entries:
        raise _refusal(f"The archive has more than {limits.entries} entries.")
    if sum(i.file_size for i in infos) > limits.unpacked_bytes:
        raise _refusal(f"The archive unpacks to more than {limits.unpacked_bytes} bytes.")
    kept: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    seen: set[str] = set()
    for info in infos:
        path = _safe_path(info)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise _refusal("The archive has links.")
        if info.flag_bits & 1:
            raise _refusal("The archive has encrypted entries.")
        if info.is_dir():
            continue
        if info.compress_type not in _METHODS:
            raise _refusal("The archive uses a compression other than deflate.")
        if info.file_size > limits.entry_bytes or (
            info.file_size > 2**20 and info.file_size > _RATIO_MAX * info.compress_size
        ):
            raise _refusal("An entry of the archive is too large or unpacks to far more than it holds.")
        key = unicodedata.normalize("NFC", str(path)).casefold()
        if key in seen:
            raise _refusal("The archive has two entries of one name.")
        seen.add(key)
        if path.suffix.lower() in suffixes and not path.parts[0].startswith("__MACOSX"):
            kept.append((info, path))
    return kept


def _safe_path(info: zipfile.ZipInfo) -> PurePosixPath:
    name = info.orig_filename  # zipfile cuts `filename` at a NUL
    path = PurePosixPath(name)
    odd = any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in name) or "\\" in name or ":" in name
    if odd or path.is_absolute() or ".." in path.parts or not path.parts or len(name.encode("utf-8", "replace")) > 400:
        raise _refusal("An entry of the archive has a name that is not a plain path inside it.")
    if any(len(part.encode("utf-8", "replace")) > 200 for part in path.parts) or len(path.parts) > 16:
        raise _refusal("An entry of the archive has a name that is not a plain path inside it.")
    return path


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, limit: int) -> int:
    """Write one entry; its size. The header may lie about it, so the bytes are counted."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = 0
        with archive.open(entry) as source, path.open("xb") as out:
            while chunk := source.read(2**20):
                written += len(chunk)
                if written > limit:
                    raise _refusal("The archive unpacks to more than it says or may.")
                out.write(chunk)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise _refusal("The archive has an entry where another one needs a folder.") from None
    return written


def flatten(target: Path) -> Path:
    """The folder that holds the records: `target`, or the one folder in it (people zip the folder rather than its content)."""
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _refusal(detail: str) -> Problem:
    return Problem("invalid_archive", detail)
