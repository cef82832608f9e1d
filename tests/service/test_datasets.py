"""Uploads: what is stored, what is reported, and every abuse refused with nothing left behind."""

from __future__ import annotations

import io
import json
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from hscr.data_set import DataSet
from hscr.records import read_preferences
from service.settings import Settings
from tests.conftest import dataset_zip, png, record, zip_of
from tests.hscr.medical import dicom


def send(client: TestClient, data: bytes, **form: str) -> Any:
    return client.post("/datasets", files={"file": ("canary.zip", data, "application/zip")}, data=form)


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def leftovers(settings: Settings) -> list[Path]:
    return [p for p in (settings.data_dir / "datasets").rglob("*") if p.is_file()]


def test_a_dicom_file_is_not_stored_under_any_name(client: TestClient, settings: Settings) -> None:
    scan = dicom(np.arange(64, dtype=np.uint16).reshape(8, 8), PatientName="Canary^Bird")
    rows = lines(record(0), record(1, image="images/scan.png"))
    answer = send(client, zip_of({"records.jsonl": rows, "images/0.png": png(), "images/scan.png": scan}), name="scans")
    assert answer.status_code == 201
    assert [row["line"] for row in answer.json()["rejected"]] == [2]
    assert "DICOM" in answer.json()["rejected"][0]["reason"]
    assert not [p for p in settings.data_dir.rglob("*") if p.is_file() and b"Canary" in p.read_bytes()]


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
