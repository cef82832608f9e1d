"""A job's preference records as the API gives them: pages to look at, and the exports of hscr/export.py sent while they are made.

The records stay where the run wrote them. An attempt's folder may give way to the next one at any moment, so the file is opened first and
read through that descriptor, which outlives the folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from hscr.export import export_lines
from hscr.records import PreferenceRecord, preference_records
from service import run_folders
from service.bundle import CHUNK_BYTES, blocks, zipped
from service.errors import Problem

FILE, REVIEWED = "preferences.jsonl", "reviewed.jsonl"


def opened(data_dir: Path, job_id: str, names: tuple[str, ...] = (FILE,)) -> IO[bytes]:
    """The whole file of the job's newest attempt (a run renames it there when it has all records). Raises Problem where there is none.

    Of several `names` the first that an attempt has: (REVIEWED, FILE) is what the job learns from.
    """
    place = run_folders.folder(data_dir, job_id)
    while True:
        found = run_folders.attempts(place)
        for attempt in reversed(found):
            for name in names:
                try:
                    return (attempt / name).open("rb")
                except FileNotFoundError:
                    continue
        if run_folders.attempts(place) == found:  # else another attempt took over while this one was looked at
            raise Problem("preferences_not_found", "A job has its preference records when generation has ended.")


def some(file: IO[bytes], after: int, limit: int) -> list[tuple[int, PreferenceRecord]]:
    """Up to `limit` records after number `after`, with their numbers, from 1. The lines before are skipped, not parsed."""
    lines = itertools.islice(file, after, after + limit)
    return list(enumerate(preference_records(lines), after + 1))


def as_lines(file: IO[bytes], form: str) -> Iterator[bytes]:
    """The export's JSON lines, as `hscr export` writes them, in blocks."""
    with file:
        lines = (line.encode() for line in export_lines(preference_records(file), form))
        yield from _joined(lines)


def as_zip(file: IO[bytes], form: str, data: Path) -> Iterator[bytes]:
    """A zip of the export and the images it names, so that a trainer runs in the unpacked folder.

    The form `hscr` has records.jsonl beside it: the unpacked folder is a data set that brings its levels along.
    """
    with file:
        yield from zipped(_entries(file, form, data))


def _entries(file: IO[bytes], form: str, data: Path) -> Iterator[tuple[str, Iterable[bytes]]]:
    images: dict[str, None] = {}  # names only, in order: half a million of them are some tens of megabytes

    def noted() -> Iterator[PreferenceRecord]:
        for preference in preference_records(file):
            if preference.levels or form == "hscr":  # a record without a level has no row elsewhere
                images.update(dict.fromkeys(preference.record.images))
            yield preference

    yield FILE, (line.encode() for line in export_lines(noted(), form))
    if form == "hscr":
        yield "records.jsonl", blocks(data / "records.jsonl")
    for image in images:
        yield image, blocks(data / image)


def _joined(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines gathered to blocks, for each block sent costs a change of threads."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= CHUNK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)
