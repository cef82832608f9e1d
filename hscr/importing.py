"""The door: a source in a known layout (hscr/readers) becomes a data set of ours, with a report of everything that was left out or odd.

OUT holds records.jsonl, images/, import.json and, for a preference set, preferences.jsonl with the given levels. Every image is decoded
once. Files are hard-linked where the file system allows, else copied; bytes from inside a file are written under their digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hscr.artifacts import appearing_folder, bytes_digest, file_digest, json_digest, link_or_copy, write_json
from hscr.images import ImageError, decode_image
from hscr.readers import Found, detect
from hscr.readers.rows import Part
from hscr.records import Level, PreferenceRecord, RejectedRow, VQARecord, write_jsonl
from hscr.repeats import Asked, find_repeats
from hscr.similarity import token_f1
from hscr.words import wording

_SUFFIXES = {
    b"\x89P": ".png",
    b"\xff\xd8": ".jpg",
    b"RI": ".webp",
    b"II": ".tif",
    b"MM": ".tif",
    b"BM": ".bmp",
    b"GI": ".gif",
    b"\x1f\x8b": ".nii.gz",
}


@dataclass(frozen=True)
class Place:
    """Where a record came from."""

    id: str
    file: str
    line: int
    answer: str


@dataclass(frozen=True)
class ImportLimits:
    """Most rows read, and most bytes of images written."""

    rows: int
    image_bytes: int


class TooLarge(ValueError):
    """The source is beyond the limits that the import was given."""


class NoUsableRow(ValueError):
    """Every row was rejected; `rejected` says why."""

    def __init__(self, message: str, rejected: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rejected = rejected


@dataclass
class ImportReport:
    """What import.json says. `rejected`: file, line, reason. `contradictions` and `duplicates`: the places of records with one image and
    question that have different answers, or the same one; both are kept in the data set."""

    source: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    contradictions: list[dict[str, Any]] = field(default_factory=list)
    duplicates: list[dict[str, Any]] = field(default_factory=list)


def import_data(
    source: Path,
    out: Path,
    *,
    layout: str = "auto",
    split: str | None = None,
    languages: Sequence[str] = ("en",),
    limits: ImportLimits | None = None,
) -> ImportReport:
    """Read SOURCE and write the data set OUT, whole or not at all.

    `split` keeps only the parts of that split (train, valid, test), `languages` the rows that say one of these or none.
    Raises ValueError: OUT is not empty, the layout is not recognised or has no such split, a file is damaged, no row is usable
    (NoUsableRow), the source is beyond `limits` (TooLarge).
    """
    with appearing_folder(out) as partial:
        kind, parts = detect(source, layout)
        if split is not None:
            there = sorted({p.split or "(unnamed)" for p in parts})
            parts = [p for p in parts if p.split == split]
            if not parts:
                raise ValueError(f"--split {split}: {source.name} has only {', '.join(there)}")
        taken = _Taken(partial, tuple(languages), limits)
        for part in parts:
            taken.take(part, kind.rows(part))
        if not taken.records:
            reasons = "; ".join(f"{r['file']} {r['line']}: {r['reason']}" for r in taken.rejected[:3])
            raise NoUsableRow(f"{source.name}: no usable row" + (f" ({reasons})" if reasons else ""), taken.rejected)
        report = taken.report({"name": source.name, "format": kind.name, "split": split}, parts)
        write_json(partial / "import.json", asdict(report))
    return report


class _Taken:
    """What was taken so far, row by row."""

    def __init__(self, folder: Path, languages: tuple[str, ...], limits: ImportLimits | None) -> None:
        self.folder, self.languages, self.limits = folder, languages, limits
        self.image_bytes = 0
        self.records: dict[str, VQARecord] = {}
        self.levels: dict[str, list[str]] = {}  # by record id, for a preference set
        self.rejected: list[dict[str, Any]] = []
        self.rows = 0
        self._asked: list[Asked[Place]] = []
        self._pairs: dict[tuple[str, str, str], str] = {}  # (image digest, question, chosen) -> record id
        self._digests: dict[str, str] = {}  # image path in the data set -> digest
        self._read: dict[Path, str | ValueError] = {}  # a file of the source -> its digest, or why it is no image

    def take(self, part: Part, rows: Iterable[Found | RejectedRow]) -> None:
        for row in rows:
            self.rows += 1
            if self.limits is not None and self.rows > self.limits.rows:
                raise TooLarge(f"has more than {self.limits.rows} rows")
            try:
                if isinstance(row, RejectedRow):
                    raise ValueError(row.reason)
                self._add(part, row)
            except TooLarge:
                raise
            except ValueError as error:
                self.rejected.append({"file": part.file.name, "line": row.line, "reason": str(error)})

    def _add(self, part: Part, row: Found) -> None:
        record = row.record
        language = record.meta.get("language")
        if language is not None and language not in self.languages:
            raise ValueError(f"language: is {str(language)[:20]}, wanted: {', '.join(self.languages)}")
        put = [self._image(image, record.image) for image in (row.image, *row.further)]
        digest = " ".join(of for _, of in put)
        record = replace(record, image=put[0][0], further_images=tuple(target for target, _ in put[1:]))
        if row.rejected is not None:
            if self._level(record, digest, row.rejected):
                return
        elif record.id in self.records:
            raise ValueError("id: used by an earlier row")
        self.records[record.id] = record
        place = Place(record.id, part.file.name, row.line, record.answer)
        self._asked.append(Asked(digest, record.question, record.answer, place))

    def _level(self, record: VQARecord, digest: str, rejected: str) -> bool:
        """Note a given level; True where it belongs to a record that is already there. Raises ValueError where it is no new pair."""
        if wording(rejected) == wording(record.answer):
            raise ValueError("rejected: is the chosen answer")
        known = self._pairs.setdefault((digest, record.question, record.answer), record.id)
        levels = self.levels.setdefault(known, [])
        if rejected in levels:
            raise ValueError("rejected: an earlier row has this pair")
        levels.append(rejected)
        return known != record.id

    def _image(self, image: Path | bytes, target: str) -> tuple[str, str]:
        """Put an image into the data set; its path there (`target` for a file) and its digest. Raises ValueError where it is none."""
        if isinstance(image, bytes):
            digest = bytes_digest(image)
            suffix = ".dcm" if image[128:132] == b"DICM" else _SUFFIXES.get(image[:2], ".png")
            target = f"images/{digest.removeprefix('sha256:')[:32]}{suffix}"
            if target not in self._digests:
                _check_image(image)
                self._count(len(image))
                (self.folder / "images").mkdir(exist_ok=True)
                (self.folder / target).write_bytes(image)
                self._digests[target] = digest
            return target, digest
        known = self._read.get(image)
        if known is None:
            try:
                _check_image(image)
                known = file_digest(image)
            except ValueError as error:
                known = error
            self._read[image] = known
        if isinstance(known, ValueError):
            raise known
        if self._digests.setdefault(target, known) != known:
            raise ValueError("image: another image of the source has this name")
        if not (self.folder / target).exists():
            self._count(image.stat().st_size)
        try:
            link_or_copy(image, self.folder / target)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):  # "a" and "a/b.png"
            raise ValueError("image: another image of the source has this name") from None
        return target, known

    def _count(self, n_bytes: int) -> None:
        self.image_bytes += n_bytes
        if self.limits is not None and self.image_bytes > self.limits.image_bytes:
            raise TooLarge(f"has images of more than {self.limits.image_bytes} bytes")

    def report(self, source: dict[str, Any], parts: list[Part]) -> ImportReport:
        """Write the records, and say what was found."""
        write_jsonl(self.folder / "records.jsonl", self.records.values())
        if self.levels:
            write_jsonl(self.folder / "preferences.jsonl", map(self._preference, self.records.values()))
        report = ImportReport(source, rejected=self.rejected)
        found = find_repeats(self._asked)
        for repeats, told in ((found.contradictions, report.contradictions), (found.duplicates, report.duplicates)):
            told += [{"question": r.question, "records": [asdict(p) for p in r.places]} for r in repeats]
        files = {str(p.file.name): file_digest(p.file) for p in parts}
        report.source |= {"files": files, "digest": json_digest([files, sorted(self._digests.values())])}
        report.counts = {
            "rows": self.rows,
            "records": len(self.records),
            "images": len(self._digests),
            "rejected": len(self.rejected),
            "contradictions": len(report.contradictions),
            "duplicates": len(report.duplicates),
        }
        return report

    def _preference(self, record: VQARecord) -> PreferenceRecord:
        levels = self.levels[record.id]
        similar = token_f1(record.answer, levels)
        return PreferenceRecord(record, tuple(map(Level, levels, similar)), (), {})


def _check_image(image: Path | bytes) -> None:
    try:
        decode_image(image)
    except ImageError as error:
        raise ValueError(f"image: {error}") from None
