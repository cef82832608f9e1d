"""Data sets: an uploaded archive becomes a stored folder named by its content's digest, and rows that can be browsed.

Bad rows are reported with their line and reason and left out of the stored copy, so that a run reads only what was counted. Whatever
is refused leaves nothing behind. No torch and no web framework here.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from hscr.artifacts import file_digest, json_digest, write_manifest
from hscr.data_set import PREFERENCES, checked_preferences, given_preferences
from hscr.image_limits import ImageError
from hscr.image_view import View
from hscr.records import (
    RejectedRow,
    VQARecord,
    read_records,
    records_file,
    to_json,
    write_jsonl,
)
from service import artifact_store, audit
from service.archive import ArchiveLimits, discard, flatten, unpack
from service.artifact_store import Artifact, ArtifactStore
from service.db import Database
from service.decoding import Decoders, DecodersBusy
from service.errors import Problem
from service.foreign import Reading, convert, is_ours
from service.models import Dataset, DatasetRecord, new_id
from service.retention import artifacts_held

REJECTED_KEPT = 1000


@dataclass(frozen=True)
class Content:
    """What an archive held: good records, rejected rows, and the digest of the stored folder."""

    records: list[VQARecord]
    rejected: list[dict[str, Any]]  # line, reason, and of a foreign layout the file
    images: dict[str, str]  # path -> digest
    digest: str
    format: str = "hscr"
    given: Path | None = None  # the file of preference records that a preference set brings along


def folder(data_dir: Path, digest: str) -> Path:
    """Where a data set lies in the default store and in a backup."""
    return artifact_store.LocalStore.below(data_dir).folder(artifact_store.data_set(digest, None))


def artifact(session: Session, digest: str) -> Artifact:
    """The stored folder of every data set with this digest."""
    noted = select(Dataset.files_digest).where(Dataset.digest == digest, Dataset.files_digest.is_not(None))
    return artifact_store.data_set(digest, session.scalars(noted.limit(1)).first())


def import_upload(
    database: Database,
    data_dir: Path,
    file: IO[bytes],
    name: str,
    limits: ArchiveLimits,
    rows_max: int,
    reading: Reading = Reading(),
    actor: str = "local",
    decoders: Decoders | None = None,
    store: ArtifactStore | None = None,
) -> tuple[Dataset, bool]:
    """Check, unpack and register a zip or a parquet file; the data set and whether it is new (equal content under one name is not).

    `store`: where it is kept; the data folder's own where None. Raises Problem.
    """
    store = store or artifact_store.LocalStore.below(data_dir)
    incoming = data_dir / "datasets" / f".incoming-{uuid4().hex}"
    upload, imported = incoming / "upload", incoming / "imported"
    upload.mkdir(parents=True)
    try:
        if file.read(4) == b"PAR1":  # a parquet file holds its images itself
            file.seek(0)
            with (upload / "data.parquet").open("wb") as out:
                shutil.copyfileobj(file, out, 2**20)
        else:
            file.seek(0)
            unpack(file, upload, limits)
        source = flatten(upload)
        if reading.layout == "hscr" or (reading.layout == "auto" and is_ours(source)):
            content = _read(source, rows_max, decoders)
        else:
            report = convert(source, imported, reading, rows_max, limits.unpacked_bytes)
            source = imported
            content = _imported(_read(source, rows_max, decoders), report)
        whole = _assemble(source, content, incoming / "whole")
        with artifacts_held(data_dir, database):
            files = store.put(artifact_store.data_set(content.digest, None), whole, give=True)
            with database.write() as session:
                dataset, new = _register(session, name, content, files)
                if new:
                    audit.record(session, actor, "dataset.create", dataset.id, digest=dataset.digest)
                return dataset, new
    finally:
        discard(incoming)


def _imported(content: Content, report: dict[str, Any]) -> Content:
    """An imported data set as our own reading found it, with the rows that the import left out."""
    rows = [{**row, "reason": row["reason"][:300]} for row in report["rejected"]] + content.rejected
    return replace(content, rejected=rows, format=report["source"]["format"])


def _read(source: Path, rows_max: int, given_decoders: Decoders | None) -> Content:
    decoders = given_decoders or Decoders(1, 2 * 2**30, 20)
    try:
        return _read_with(decoders, source, rows_max)
    finally:
        if given_decoders is None:
            decoders.close()


def _read_with(decoders: Decoders, source: Path, rows_max: int) -> Content:
    try:
        path = records_file(source)
    except ValueError:
        raise Problem(
            "invalid_archive", "Put one records.jsonl (or one other .jsonl file) at the top of the archive."
        ) from None
    records, rejected = read_records(path)
    if len(records) + len(rejected) > rows_max:
        raise Problem("invalid_archive", f"The data set has more than {rows_max} rows.")
    images: dict[str, str] = {}
    bad: dict[tuple[str, View], str] = {}
    good: set[tuple[str, View]] = set()
    kept: list[VQARecord] = []
    for line, record in zip(_lines_of(path, {r.line for r in rejected}), records, strict=True):
        for image, view in record.shown:
            if (image, view) not in good and (image, view) not in bad:
                try:
                    if decoders.check(source / image, view=view).format == "dicom":  # whatever its name says
                        raise ImageError("a DICOM file's header may name the patient: send its frames as PNG files")
                    if image not in images:
                        images[image] = file_digest(source / image)
                    good.add((image, view))
                except DecodersBusy:
                    detail = "Send it again in a few seconds."
                    raise Problem("decoders_busy", detail, headers={"Retry-After": "5"}) from None
                except (ImageError, OSError) as error:
                    bad[image, view] = str(error) if isinstance(error, ImageError) else "the image file is missing"
        reason = next((bad[shown] for shown in record.shown if shown in bad), None)
        if reason is not None:
            rejected.append(RejectedRow(line, f"image: {reason}"))
        else:
            kept.append(record)
    rejected.sort(key=lambda row: row.line)
    if not kept:
        raise Problem(
            "dataset_empty",
            "Every row was rejected; `rejected` says why.",
            rejected=[asdict(row) for row in rejected[:20]],
        )
    used = {image for record in kept for image in record.images}  # a good image beside a bad one has no record left
    images = {image: digest for image, digest in images.items() if image in used}
    told = [asdict(row) for row in rejected]
    digest, given = json_digest([[to_json(r) for r in kept], sorted(images.items())]), given_preferences(path)
    if given is not None:
        told += _odd_preferences(given, records, set() if given != path else {row.line for row in rejected})
        digest = json_digest([digest, file_digest(given)])
    return Content(kept, told, images, digest, given=given)


def _odd_preferences(given: Path, records: list[VQARecord], told: set[int]) -> list[dict[str, Any]]:
    """The lines of a data set's preference records that fit none of its records; `told` are lines whose record was rejected already."""
    n, odd = 0, []
    for row in checked_preferences(given, records):
        n += 1
        if isinstance(row, RejectedRow):
            odd.append({"file": given.name, **asdict(row)})
    if len(odd) == n:
        raise Problem(
            "dataset_empty", f"No line of {given.name} fits a record; `rejected` says why.", rejected=odd[:20]
        )
    return [row for row in odd if row["line"] not in told]


def _lines_of(path: Path, rejected: set[int]) -> Iterator[int]:
    """The line numbers of the good rows, in the order in which read_records returned them."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and number not in rejected:
                yield number


def _assemble(source: Path, content: Content, whole: Path) -> Path:
    """A folder of exactly the accepted records and their images, with its manifest. The images are moved, and their digests known."""
    whole.mkdir()
    for image in content.images:
        (whole / image).parent.mkdir(parents=True, exist_ok=True)
        (source / image).rename(whole / image)
    write_jsonl(whole / "records.jsonl", content.records)
    if content.given is not None:
        checked = checked_preferences(content.given, content.records)
        write_jsonl(whole / PREFERENCES, (row for row in checked if not isinstance(row, RejectedRow)))
    written = {path.name: file_digest(path) for path in whole.glob("*.jsonl")}
    write_manifest(whole, content.images | written)
    return whole


def _register(session: Session, name: str, content: Content, files: str) -> tuple[Dataset, bool]:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(name))))  # one version number at a time
    known = session.scalar(select(Dataset).where(Dataset.name == name, Dataset.digest == content.digest))
    if known is not None:
        return known, False
    latest = session.scalar(select(func.max(Dataset.version)).where(Dataset.name == name)) or 0
    dataset = Dataset(
        id=new_id("ds"),
        name=name,
        version=latest + 1,
        format=content.format,
        digest=content.digest,
        files_digest=files,
        n_records=len(content.records),
        n_images=len(content.images),
        n_rejected=len(content.rejected),
        rejected=content.rejected[:REJECTED_KEPT],
    )
    session.add(dataset)
    session.flush()
    rows = [
        {"dataset_id": dataset.id, "number": n, "record_id": r.id, "record": to_json(r)}
        for n, r in enumerate(content.records, 1)
    ]
    session.execute(insert(DatasetRecord), rows)
    return dataset, True


def get(session: Session, dataset_id: str) -> Dataset:
    dataset = session.get(Dataset, dataset_id)
    if dataset is None:
        raise Problem(
            "dataset_not_found", "No data set has this id; POST /datasets uploads one, GET /datasets lists them."
        )
    return dataset


def clear_leftovers(data_dir: Path, older_than_s: float = 3600) -> None:
    """Remove what an upload left behind whose process was killed."""
    for path in (data_dir / "datasets").glob(".incoming-*"):
        if time.time() - path.stat().st_mtime > older_than_s:
            shutil.rmtree(path, ignore_errors=True)
