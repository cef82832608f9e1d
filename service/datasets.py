"""Data sets: an uploaded archive becomes a stored folder named by its content's digest, and rows that can be browsed.

Bad rows are reported with their line and reason and left out of the stored copy, so that a run reads only what was counted. Whatever
is refused leaves nothing behind. No torch and no web framework here.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from hscr.artifacts import file_digest, json_digest, write_manifest
from hscr.data_set import PREFERENCES, checked_preferences, given_preferences, repeated
from hscr.image_limits import ImageError
from hscr.image_view import View
from hscr.records import (
    RejectedRow,
    VQARecord,
    numbered_records,
    records_file,
    to_json,
    write_jsonl,
)
from hscr.repeats import summary
from service import artifact_store, audit
from service.archive import ArchiveLimits, discard, flatten, unpack
from service.artifact_store import Artifact, ArtifactStore
from service.db import Database
from service.decoding import Cleaned, Decoders, DecodersBusy
from service.errors import Problem
from service.foreign import Reading, convert, is_ours
from service.models import AdapterVersion, Dataset, DatasetRecord, Evaluation, Job, new_id
from service.retention import artifacts_held
from service.uid_key import of_folder

REJECTED_KEPT = 1000
_TEXT = {b"{": "data.jsonl", b"[": "data.json"}  # a file of text by its first letter, and its name while it is read


@dataclass(frozen=True)
class Content:
    """What an archive held: good records, rejected rows, and the digest of the stored folder."""

    records: list[VQARecord]
    rejected: list[dict[str, Any]]  # line, reason, and of a foreign layout the file
    images: dict[str, str]  # path -> digest
    digest: str
    format: str = "hscr"
    pictures: dict[str, Any] = field(default_factory=dict)
    repeats: dict[str, Any] = field(default_factory=dict)  # contradictions and duplicates by line (hscr/repeats.py)
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
    key: bytes | None = None,
) -> tuple[Dataset, bool]:
    """Check, unpack and register a zip, parquet, JSONL or JSON file; the data set and whether it is new. Raises Problem.

    Equal content under one name is not new: what is told of the file (rejected rows, repeats, pictures) is this one's, not the first one's.
    Files of images are cleaned on the way (hscr/clean_image.py). `store`: where it is kept;
    `key`: what UIDs are remapped under; the data folder's own where None.
    """
    key = key or of_folder(data_dir)
    store = store or artifact_store.LocalStore.below(data_dir)
    incoming = data_dir / "datasets" / f".incoming-{uuid4().hex}"
    upload, imported = incoming / "upload", incoming / "imported"
    upload.mkdir(parents=True)
    try:
        head = file.read(4096)
        file.seek(0)
        alone = "data.parquet" if head[:4] == b"PAR1" else _TEXT.get(head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1])
        if alone is not None:
            with (upload / alone).open("wb") as out:
                shutil.copyfileobj(file, out, 2**20)
        else:
            try:
                unpack(file, upload, limits)
            except Problem as refusal:
                if refusal.code != "invalid_archive" or head[:2] == b"PK":
                    raise
                detail = "The file is not a whole zip archive, and no parquet, JSON or JSONL file begins like it."
                raise Problem("invalid_archive", detail) from None
        source = flatten(upload)
        if reading.layout == "hscr" or (reading.layout == "auto" and is_ours(source)):
            content = _read(source, rows_max, key, decoders)
        else:
            report = convert(source, imported, reading, rows_max, limits.unpacked_bytes)
            source = imported
            content = _imported(_read(source, rows_max, key, decoders), report)
        whole = _assemble(source, content, incoming / "whole")
        n_bytes = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        with artifacts_held(data_dir, database):
            files = store.put(artifact_store.data_set(content.digest, None), whole, give=True)
            with database.write() as session:
                dataset, new = _register(session, name, content, files, n_bytes)
                if new:
                    audit.record(session, actor, "dataset.create", dataset.id, digest=dataset.digest)
            if not new:
                _tell(dataset, content)
            return dataset, new
    finally:
        discard(incoming)


def delete(session: Session, dataset_id: str, actor: str) -> None:
    """Forget a data set that nothing points at; retention.collect frees its folder. Raises Problem.

    What a version learnt from, or was measured on, stays for as long as the version can be asked about it.
    """
    dataset = session.get(Dataset, dataset_id, with_for_update=True)
    if dataset is None:
        raise _unknown()
    for column in (Job.dataset_id, Job.evaluation_dataset_id, AdapterVersion.dataset_id, Evaluation.dataset_id):
        if session.scalar(select(column).where(column == dataset_id).limit(1)) is not None:
            raise Problem(
                "dataset_in_use",
                "A job used it, so that versions and the audit lead to it; GET /datasets/{id}/lineage lists them.",
            )
    session.delete(dataset)
    session.flush()
    audit.record(session, actor, "dataset.delete", dataset_id, digest=dataset.digest)


def _imported(content: Content, report: dict[str, Any]) -> Content:
    """An imported data set as our own reading found it, with the rows that the import left out and the lines that it read."""
    rows = [{**row, "reason": row["reason"][:300]} for row in report["rejected"]] + content.rejected
    groups = ([e["records"] for e in report[kind]] for kind in ("contradictions", "duplicates"))
    repeats = summary(*([[{"file": p["file"], "line": p["line"]} for p in places] for places in g] for g in groups))
    return replace(content, rejected=rows, repeats=repeats, format=report["source"]["format"])


def _read(source: Path, rows_max: int, key: bytes, given_decoders: Decoders | None) -> Content:
    decoders = given_decoders or Decoders(1, 2 * 2**30, 20)
    try:
        return _read_with(decoders, source, rows_max, key)
    finally:
        if given_decoders is None:
            decoders.close()


def _read_with(decoders: Decoders, source: Path, rows_max: int, key: bytes) -> Content:
    try:
        path = records_file(source)
    except ValueError:
        raise Problem(
            "invalid_archive", "Put one records.jsonl (or one other .jsonl file) at the top of the archive."
        ) from None
    numbered, rejected = numbered_records(path)
    records = [record for _, record in numbered]
    if len(records) + len(rejected) > rows_max:
        raise Problem("invalid_archive", f"The data set has more than {rows_max} rows.")
    images: dict[str, str] = {}
    told_of: dict[str, Cleaned] = {}
    bad: dict[tuple[str, View], str] = {}
    good: set[tuple[str, View]] = set()
    kept: list[tuple[int, VQARecord]] = []
    for line, record in numbered:
        for image, view in record.shown:
            if (image, view) not in good and (image, view) not in bad:
                try:
                    if image in images:
                        decoders.check(source / image, view=view)
                    else:
                        told_of[image] = _clean(decoders, source / image, key, view)
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
            kept.append((line, record))
    rejected.sort(key=lambda row: row.line)
    if not kept:
        raise Problem(
            "dataset_empty",
            "Every row was rejected; `rejected` says why.",
            rejected=[asdict(row) for row in rejected[:20]],
        )
    lines, good_records = [line for line, _ in kept], [record for _, record in kept]
    used = {
        image for record in good_records for image in record.images
    }  # a good image beside a bad one has no record left
    images = {image: digest for image, digest in images.items() if image in used}
    told = [asdict(row) for row in rejected]
    digest, given = json_digest([[to_json(r) for r in good_records], sorted(images.items())]), given_preferences(path)
    if given is not None:
        told += _odd_preferences(given, records, set() if given != path else {row.line for row in rejected})
        digest = json_digest([digest, file_digest(given)])
    return Content(
        good_records,
        told,
        images,
        digest,
        given=given,
        pictures=_pictures([told_of[image] for image in images]),
        repeats=repeated(lines, good_records, images),
    )


def _clean(decoders: Decoders, path: Path, key: bytes, view: View) -> Cleaned:
    """Put what may be stored of a file in its place, before anything else looks at it. Raises ImageError, DecodersBusy."""
    cleaned = decoders.clean(path, key, view=view)
    if cleaned.data is None:
        return cleaned
    fresh = path.with_name(f".cleaned-{uuid4().hex}")  # not over the file itself: other names may be links to it
    fresh.write_bytes(cleaned.data)
    fresh.replace(path)
    return replace(cleaned, data=b"")


def _pictures(told: list[Cleaned]) -> dict[str, Any]:
    """What an upload's answer says of its pictures: counts of formats and flags, and how many files held more than a picture."""
    formats, flags = Counter(c.note.format for c in told), Counter(flag for c in told for flag in c.note.flags)
    return {"formats": formats, "flags": flags, "cleaned": sum(c.data is not None for c in told)}


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


def _register(session: Session, name: str, content: Content, files: str, n_bytes: int) -> tuple[Dataset, bool]:
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
        n_bytes=n_bytes,
    )
    _tell(dataset, content)
    session.add(dataset)
    session.flush()
    rows = [
        {"dataset_id": dataset.id, "number": n, "record_id": r.id, "record": to_json(r)}
        for n, r in enumerate(content.records, 1)
    ]
    session.execute(insert(DatasetRecord), rows)
    return dataset, True


def _tell(dataset: Dataset, content: Content) -> None:
    """What is said of the file that was sent, beside what was kept of it."""
    dataset.n_rejected, dataset.rejected = len(content.rejected), content.rejected[:REJECTED_KEPT]
    dataset.pictures, dataset.repeats = content.pictures, content.repeats


def get(session: Session, dataset_id: str, *, hold: bool = False) -> Dataset:
    """The data set; with `hold` nobody deletes it before this transaction ends. Raises Problem."""
    dataset = session.get(Dataset, dataset_id, with_for_update={"read": True, "key_share": True} if hold else None)
    if dataset is None:
        raise _unknown()
    return dataset


def usable(session: Session, dataset_id: str, field: str) -> Dataset:
    """A data set to work on, held as `get` holds it. Raises Problem, which carries `field`, the request's name for it."""
    dataset = session.get(Dataset, dataset_id, with_for_update={"read": True, "key_share": True})
    if dataset is None:
        raise _unknown(param=field)
    if dataset.n_records == 0:
        raise Problem("dataset_empty", f"The data set named by `{field}` has no record.", param=field)
    return dataset


def _unknown(**where: Any) -> Problem:
    detail = "No data set has this id; POST /datasets uploads one, GET /datasets lists them."
    return Problem("dataset_not_found", detail, **where)


@dataclass(frozen=True)
class Facts:
    """What of a data set never changes."""

    digest: str
    n_records: int


_FACTS: dict[str, Facts] = {}
_FACTS_MAX = 10_000


def facts(session: Session, dataset_id: str) -> Facts:
    """The digest and size of a data set that is there: asked for with every job that anybody looks at, so remembered by the process."""
    known = _FACTS.get(dataset_id)
    if known is None:
        row = session.execute(select(Dataset.digest, Dataset.n_records).where(Dataset.id == dataset_id)).one()
        if len(_FACTS) >= _FACTS_MAX:
            _FACTS.clear()
        known = _FACTS[dataset_id] = Facts(*row)
    return known


def clear_leftovers(data_dir: Path, older_than_s: float = 3600) -> None:
    """Remove what an upload left behind whose process was killed."""
    for path in (data_dir / "datasets").glob(".incoming-*"):
        if time.time() - path.stat().st_mtime > older_than_s:
            shutil.rmtree(path, ignore_errors=True)
