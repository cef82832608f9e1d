"""Uploads: what is stored, what is reported, and every abuse refused with nothing left behind."""

from __future__ import annotations

import io
import json
import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import SecretStr

from hscr.data_set import DataSet
from hscr.images import decode_image
from hscr.records import read_preferences
from service import datasets, retention
from service.db import Database
from service.settings import Settings
from tests.conftest import dataset_zip, png, record, zip_of
from tests.hscr.medical import dicom


def send(client: TestClient, data: bytes, **form: str) -> Any:
    return client.post("/datasets", files={"file": ("canary.zip", data, "application/zip")}, data=form)


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def leftovers(settings: Settings) -> list[Path]:
    return [p for p in (settings.data_dir / "datasets").rglob("*") if p.is_file()]


def scan(number: int, **attributes: Any) -> bytes:
    said = {"PatientName": "Canary^Bird", "PatientID": "CANARY7", "StudyInstanceUID": "1.2.826.777"} | attributes
    return dicom(np.arange(64, dtype=np.uint16).reshape(8, 8) + number, SOPInstanceUID=f"1.2.826.777.{number}", **said)


def scans() -> bytes:
    """Two DICOM files (one under a picture's name, one without an ending), a NIfTI volume, a photograph with words, a clean picture."""
    photograph = io.BytesIO()
    held = Image.Exif()
    held[0x0112], held[0x013B] = 6, "Canary"
    Image.new("RGB", (8, 8), (9, 9, 9)).save(photograph, "JPEG", exif=held, comment="canary")
    volume = nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4))
    volume.header["descrip"] = "canary"
    files = {
        "images/scan.png": scan(1),
        "IM0001": scan(2, Modality="US", BurnedInAnnotation="YES"),
        "a.nii": volume.to_bytes(),
        "b.jpg": photograph.getvalue(),
        "images/0.png": png(),
    }
    rows = lines(*(record(n, image=name) for n, name in enumerate(files)))
    return zip_of({"records.jsonl": rows, **files})


def test_files_of_pictures_are_stored_without_what_they_say_of_the_patient(
    client: TestClient, settings: Settings
) -> None:
    sent = scans()
    body = send(client, sent, name="scans").json()
    assert (body["n_records"], body["n_rejected"]) == (5, 0)
    assert body["pictures"] == {
        "formats": {"dicom": 2, "nifti": 1, "jpeg": 1, "png": 1},
        "flags": {"burned_in_annotation": 1, "ultrasound": 1},
        "cleaned": 4,
    }
    for path in settings.data_dir.rglob("*"):
        assert not path.is_file() or not re.search(rb"canary|1\.2\.826", path.read_bytes(), re.IGNORECASE), path.name
    stored = settings.data_dir / "datasets" / body["digest"].replace(":", "-")
    one, two = (pydicom.dcmread(stored / name) for name in ("images/scan.png", "IM0001"))
    assert one.StudyInstanceUID == two.StudyInstanceUID != one.SOPInstanceUID
    assert np.array_equal(two.pixel_array, np.arange(64).reshape(8, 8) + 2)
    with zipfile.ZipFile(io.BytesIO(sent)) as archive:
        for name in ("a.nii", "b.jpg", "IM0001", "images/0.png"):
            assert decode_image(stored / name).tobytes() == decode_image(archive.read(name)).tobytes()
        assert (stored / "images/0.png").read_bytes() == archive.read("images/0.png")
    assert client.get(f"/datasets/{body['id']}").json() == body
    assert len(DataSet(stored).records) == 5
    assert stat.S_IMODE((settings.data_dir / "uid.key").stat().st_mode) == 0o600


def test_a_study_is_known_again_under_one_key_and_under_no_other(client: TestClient, settings: Settings) -> None:
    def study(**form: str) -> str:
        rows = lines(record(0, image="a.dcm", question=f"{form}"))
        body = send(client, zip_of({"records.jsonl": rows, "a.dcm": scan(3)}), **form).json()
        stored = settings.data_dir / "datasets" / body["digest"].replace(":", "-")
        again = zip_of({p.name: p.read_bytes() for p in stored.iterdir()})
        assert send(client, again, **form).json()["id"] == body["id"], "what is stored may be sent again"
        return pydicom.dcmread(stored / "a.dcm").StudyInstanceUID

    first, again = study(name="a"), study(name="b")
    settings.uid_key = SecretStr("an operator's own key")
    other = study(name="c")
    assert first == again != other


@pytest.mark.parametrize("data", [scan(1)[:500], b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0\xff\xff\xff\xff"])
def test_a_damaged_dicom_file_is_listed_and_leaves_nothing(client: TestClient, settings: Settings, data: bytes) -> None:
    rows = lines(record(0), record(1, image="a.dcm"))
    body = send(client, zip_of({"records.jsonl": rows, "images/0.png": png(), "a.dcm": data})).json()
    assert [(row["line"], row["reason"].split(":")[0]) for row in body["rejected"]] == [(2, "image")]
    assert body["pictures"]["formats"] == {"png": 1}
    assert b"Canary" not in b"".join(p.read_bytes() for p in leftovers(settings))


def test_upload_reports_counts_and_rejected_rows_with_their_lines(client: TestClient, settings: Settings) -> None:
    rows = lines(
        record(0),
        b"not json",
        record(1, answer=""),
        b"",
        record(2, image="images/missing.png"),
        record(3, image="images/broken.png"),
        record(0, question="again"),
        record(4, image="../../etc/passwd"),
        record(5, image="images/0.png"),
    )
    answer = send(
        client, zip_of({"records.jsonl": rows, "images/0.png": png(), "images/broken.png": png()[:40]}), name="mixed"
    )
    assert answer.status_code == 201
    body = answer.json()
    assert (body["n_records"], body["n_images"], body["n_rejected"], body["version"]) == (2, 1, 6, 1)
    assert [row["line"] for row in body["rejected"]] == [2, 3, 5, 6, 7, 8]
    assert body["rejected"][2]["reason"] == "image: the image file is missing"
    stored = settings.data_dir / "datasets" / body["digest"].replace(":", "-")
    assert sorted(p.name for p in stored.rglob("*") if p.is_file()) == ["0.png", "SHA256SUMS", "records.jsonl"]
    page = client.get(f"/datasets/{body['id']}/records").json()
    assert [r["record"]["id"] for r in page["data"]] == ["r0", "r5"]
    image = client.get(page["data"][0]["image_url"])
    assert (image.status_code, image.content) == (200, png())


def test_several_images_of_a_record_are_checked_and_stored_with_it(client: TestClient, settings: Settings) -> None:
    """A good image whose only record has a bad one beside it is not kept."""
    rows = []
    for i, images in enumerate((["images/0.png", "images/1.png"], ["images/2.png", "images/missing.png"])):
        row = {**record(i), "images": images}
        del row["image"]
        rows.append(row)
    files = {"records.jsonl": lines(*rows), **{f"images/{i}.png": png() for i in range(3)}}
    body = send(client, zip_of(files), name="several").json()
    assert (body["n_records"], body["n_images"], body["n_rejected"]) == (1, 2, 1)
    assert body["rejected"][0] == {"line": 2, "reason": "image: the image file is missing"}
    stored = settings.data_dir / "datasets" / body["digest"].replace(":", "-")
    assert sorted(p.name for p in stored.rglob("*.png")) == ["0.png", "1.png"]
    row = client.get(f"/datasets/{body['id']}/records").json()["data"][0]
    assert row["record"]["images"] == ["images/0.png", "images/1.png"]
    assert client.get(row["image_url"]).content == png()


def test_same_content_is_the_same_version_and_other_content_the_next(client: TestClient, settings: Settings) -> None:
    first, again = send(client, dataset_zip(3), name="a"), send(client, dataset_zip(3), name="a")
    other, elsewhere = send(client, dataset_zip(4), name="a"), send(client, dataset_zip(3), name="b")
    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 201)
    assert again.json() == first.json()
    assert (other.json()["version"], elsewhere.json()["version"]) == (2, 1)
    assert elsewhere.json()["digest"] == first.json()["digest"]
    assert len(list((settings.data_dir / "datasets").iterdir())) == 2
    assert [d["id"] for d in client.get("/datasets").json()["data"]] == [
        elsewhere.json()["id"],
        other.json()["id"],
        first.json()["id"],
    ]


def test_folder_inside_the_zip_and_other_files_do_no_harm(client: TestClient) -> None:
    files = {"demo/records.jsonl": lines(record(0)), "demo/images/0.png": png(), "demo/README.md": b"x"}
    assert send(client, zip_of(files)).json()["n_records"] == 1


def test_no_usable_record_is_refused_with_reasons(client: TestClient, settings: Settings) -> None:
    answer = send(client, zip_of({"records.jsonl": lines(record(0), b"{")}))
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_empty")
    assert answer.json()["rejected"][0] == {"line": 1, "reason": "image: the image file is missing"}
    assert leftovers(settings) == []


def test_contradictions_duplicates_and_closed_answers_outside_their_options_are_told_with_their_lines(
    client: TestClient, settings: Settings
) -> None:
    """Pictures 0 and 2 have the same bytes; line 5 is no record."""
    closed = {"answer_type": "closed", "options": ["left", "right"]}
    rows = lines(
        record(0, answer="Left."),
        record(1),
        record(2, answer="right"),
        record(3, image="images/0.png", answer="left"),
        record(4, image="images/1.png", answer="both", **closed),
        record(5, image="images/1.png", question="Which?", answer="RIGHT", **closed),
    )
    files = {"records.jsonl": rows, "images/0.png": png(), "images/1.png": png(9), "images/2.png": png()}
    answer = send(client, zip_of(files), format="hscr")
    assert answer.status_code == 201
    body = answer.json()
    assert body["rejected"] == [{"line": 5, "reason": "answer: is none of the options of this closed question"}]
    assert body["repeats"] == {
        "contradictions": {"questions": 1, "records": 3, "first": [[{"line": 1}, {"line": 3}, {"line": 4}]]},
        "duplicates": {"questions": 1, "records": 2, "first": [[{"line": 1}, {"line": 4}]]},
    }
    assert body["n_records"] == 5, "repeats are kept"
    assert client.get(answer.headers["location"]).json() == body
    assert send(client, zip_of(files), format="hscr").json() == body
    assert "left" not in json.dumps(body["repeats"]).lower()
    file = client.post("/v1/files", files={"file": ("again.zip", zip_of(files))}, data={"purpose": "fine-tune"}).json()
    assert file["repeats"]["contradictions"]["questions"] == 1
    assert [[p["line"] for p in places] for places in file["repeats"]["duplicates"]["first"]] == [[1, 4]]
    assert client.get(f"/v1/files/{file['id']}").json() == file


def test_equal_content_is_answered_with_what_is_true_of_the_file_that_was_sent(client: TestClient) -> None:
    """Two files that leave the same records: one has a bad line behind them, the other one before them, and one is clean."""
    pictures = {"images/0.png": png(0)}
    good, bad = lines(record(0)), b"{\n"
    first, before, clean = (
        send(client, zip_of({"records.jsonl": text, **pictures})) for text in (good + bad, bad + good, good)
    )
    assert (first.status_code, before.status_code, clean.status_code) == (201, 200, 200)
    assert first.json()["id"] == before.json()["id"] == clean.json()["id"]
    told = [(a.json()["n_rejected"], [row["line"] for row in a.json()["rejected"]]) for a in (first, before, clean)]
    assert told == [(1, [2]), (1, [1]), (0, [])]
    assert client.get(f"/datasets/{first.json()['id']}").json() == first.json(), "the first stays as it was noted"


def test_a_preference_for_an_answer_over_itself_is_a_rejected_row(client: TestClient) -> None:
    same = graded(1).replace(b'"right"', b'"the lesion is in the left frontal lobe"')
    files = {"preferences.jsonl": graded(0) + same, **{f"images/{i}.png": png(i) for i in (0, 1)}}
    body = send(client, zip_of(files)).json()
    odd = {"file": "preferences.jsonl", "line": 2, "reason": "levels: level 1 is the right answer"}
    assert body["rejected"] == [odd]
    answer = send(client, zip_of({**files, "preferences.jsonl": same}))
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_empty")
    assert answer.json()["rejected"] == [{**odd, "line": 1}]


def graded(*numbers: int, **change: Any) -> bytes:
    """Lines of preference records."""
    level = {"text": "right", "similarity": 0.5, "source": "sampled"}
    return lines(*({"record": {**record(n), "answer_type": "open", **change}, "levels": [level]} for n in numbers))


@pytest.mark.parametrize("beside", [True, False], ids=["beside its records", "alone"])
def test_our_own_export_comes_back_with_its_levels(client: TestClient, settings: Settings, beside: bool) -> None:
    """One image is missing: its record goes, and its levels with it."""
    files = {"preferences.jsonl": graded(0, 1, 2), **{f"images/{i}.png": png() for i in (0, 2)}}
    if beside:
        files["records.jsonl"] = lines(*(record(n) for n in range(3)))
    body = send(client, zip_of(files), name="x").json()
    assert (body["format"], body["n_records"], body["rejected"][0]["line"], body["n_rejected"]) == ("hscr", 2, 2, 1)
    stored = settings.data_dir / "datasets" / body["digest"].replace(":", "-")
    kept = list(read_preferences(stored / "preferences.jsonl"))
    assert [(p.record.id, p.levels[0].source) for p in kept] == [("r0", "sampled"), ("r2", "sampled")]
    assert [r.id for r in DataSet(stored).records] == ["r0", "r2"]
    plain = zip_of({k: v for k, v in files.items() if k != "preferences.jsonl"} | {"records.jsonl": lines(record(0))})
    assert send(client, plain, name="x").json()["digest"] != body["digest"]


def test_preference_lines_that_fit_no_record_are_listed_or_refuse_the_upload(client: TestClient) -> None:
    whole = {"records.jsonl": lines(record(0), record(1)), **{f"images/{i}.png": png() for i in (0, 1)}}
    body = send(client, zip_of({**whole, "preferences.jsonl": graded(0) + graded(1, question="Another?")})).json()
    assert body["n_records"] == 2
    odd = {"file": "preferences.jsonl", "line": 2, "reason": "record: is none of the data set's"}
    assert body["rejected"] == [odd]
    answer = send(client, zip_of({**whole, "preferences.jsonl": graded(5)}))
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_empty")
    assert answer.json()["rejected"] == [{**odd, "line": 1}]


def bomb() -> bytes:
    return zip_of({"records.jsonl": b"\0" * (3 * 2**20)})


def symlink() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("records.jsonl")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def lying_header() -> bytes:
    """The entry says 10 bytes and unpacks to a megabyte."""
    data = zip_of({"records.jsonl": b" " * 2**20})
    real = struct.pack("<I", 2**20)
    return data.replace(real, struct.pack("<I", 10))


def repeated_name() -> bytes:
    return zip_of({"records.jsonl": lines(record(0)), "RECORDS.jsonl": b"x"})


ABUSES: dict[str, bytes] = {
    "not a zip": b"PK\x03\x04 nonsense",
    "empty": b"",
    "cut": dataset_zip()[:-30],
    "bomb": bomb(),
    "lying header": lying_header(),
    "parent folder": zip_of({"../records.jsonl": lines(record(0))}),
    "parent folder within": zip_of({"a/../../records.jsonl": lines(record(0))}),
    "absolute": zip_of({"/tmp/records.jsonl": lines(record(0))}),
    "backslash": zip_of({"..\\records.jsonl": lines(record(0))}),
    "drive": zip_of({"C:records.jsonl": lines(record(0))}),
    "NUL": zip_of({"records.jsonl": lines(record(0)), "images/0.pXg": png()}).replace(b"0.pXg", b"0.p\0g"),
    "right-to-left mark": zip_of({"records.jsonl": lines(record(0)), "images/\u202e.png": png()}),
    "long name": zip_of({"a" * 10_000 + ".png": png()}),
    "deep": zip_of({"a/" * 50 + "records.jsonl": b""}),
    "symlink": symlink(),
    "two of one name": repeated_name(),
    "file where a folder is needed": zip_of({"a.png": png(), "a.png/b.png": png()}),
    "too many entries": zip_of({f"{i}.png": b"" for i in range(101)}),
    "no records file": zip_of({"images/0.png": png()}),
    "two record files": zip_of({"a.jsonl": lines(record(0)), "b.jsonl": lines(record(0))}),
    "too many rows": zip_of({"records.jsonl": lines(*(record(i) for i in range(60)))}),
}


@pytest.mark.parametrize("name", ABUSES)
def test_abusive_archive_is_refused_and_leaves_nothing(settings: Settings, name: str) -> None:
    from service.app import create_app

    settings.upload_entries_max, settings.upload_unpacked_max_bytes, settings.record_rows_max = 100, 4 * 2**20, 50
    with TestClient(create_app(settings), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = send(client, ABUSES[name])
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_archive"), answer.text
        assert str(settings.data_dir) not in answer.text
        assert "canary" not in answer.text
        assert client.get("/datasets").json()["data"] == []
    assert leftovers(settings) == []
    assert [p.name for p in (settings.data_dir / "datasets").iterdir()] == []


def test_upload_above_the_limit_is_refused_while_it_streams(settings: Settings) -> None:
    from service.app import create_app

    settings.upload_max_bytes = 100_000

    def endless() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
        for _ in range(100):
            yield b"0" * 10_000

    with TestClient(create_app(settings), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        for headers in (kind, kind | {"Content-Length": "1000000"}):
            answer = client.post("/datasets", content=endless(), headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert leftovers(settings) == []


@pytest.mark.parametrize("form", [{"name": "../x"}, {"name": "a\u0000b"}, {"format": "parquet"}])
def test_bad_form_fields_are_refused(client: TestClient, form: dict[str, str]) -> None:
    answer = send(client, dataset_zip(), **form)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_leftovers_of_a_killed_upload_are_removed_at_the_next_start(settings: Settings) -> None:
    import os

    from service.datasets import clear_leftovers

    old, young = settings.data_dir / "datasets" / ".incoming-old", settings.data_dir / "datasets" / ".incoming-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    clear_leftovers(settings.data_dir)
    assert (old.exists(), young.exists()) == (False, True)


def test_collecting_takes_no_folder_of_an_upload_that_has_no_row_yet(client: TestClient, settings: Settings) -> None:
    """Neither what is being read, nor what is stored while its row is being written; what a dead upload stored goes."""
    database = Database(settings.database)
    root = settings.data_dir / "datasets"
    kept = root / send(client, dataset_zip()).json()["digest"].replace(":", "-")
    reading, stored = root / ".incoming-x", root / ("sha256-" + "0" * 64)
    reading.mkdir()
    stored.mkdir()
    with retention.artifacts_held(settings.data_dir):
        assert retention.collect(database, settings.data_dir) == 0
    assert stored.is_dir()
    assert retention.collect(database, settings.data_dir) == 1
    assert sorted(root.iterdir()) == sorted([kept, reading])
    database.close()


def test_an_upload_holds_collecting_off_until_its_row_is_there(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, seen, register = Database(settings.database), [], datasets._register

    def looked_at(*arguments: Any) -> Any:
        seen.append(retention.collect(database, settings.data_dir))
        return register(*arguments)

    monkeypatch.setattr(datasets, "_register", looked_at)
    body = send(client, dataset_zip()).json()
    assert seen == [0]
    assert (settings.data_dir / "datasets" / body["digest"].replace(":", "-")).is_dir()
    assert client.delete(f"/datasets/{body['id']}").status_code == 204
    assert client.get(f"/datasets/{body['id']}").json()["code"] == "dataset_not_found"
    assert leftovers(settings) == []
    database.close()
