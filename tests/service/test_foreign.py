"""Uploads of foreign layouts: told apart or named, read in a child process, bad rows listed, abuse refused with nothing left behind."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from hscr.readers import LAYOUTS
from hscr.records import read_preferences
from service.routes.datasets import Layout
from service.settings import Settings
from tests.conftest import png, zip_of
from tests.hscr.medical import dicom

pytestmark = pytest.mark.either_database


def send(client: TestClient, data: bytes, **form: str) -> Any:
    return client.post("/datasets", files={"file": ("canary.zip", data)}, data=form)


def parquet(columns: dict[str, list[Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rad(qid: int, image: str) -> dict[str, Any]:
    row = {"qid": qid, "phrase_type": "freeform", "image_name": image, "question": "Is it?", "answer": "Yes"}
    return row | {"answer_type": "CLOSED ", "image_case_url": "x?id=1"}


def talk(image: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "left"}]
    return {"id": image, "image": image, "conversations": turns}


def chat(image: bytes) -> dict[str, Any]:
    url = {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}
    asked = [{"type": "text", "text": "Where?"}, {"type": "image_url", "image_url": url}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "left"}]}


def slake(n: int, image: str) -> dict[str, Any]:
    return {"qid": n, "img_id": n, "img_name": image, "q_lang": "en", "question": "Where?", "answer": "left"}


def path_row(image: str) -> dict[str, str]:
    return {"image": image, "question": "Where?", "answer": "left"}


PAIR = {"prompt": "Where?", "chosen": "left", "rejected": "right"}
GOOD: dict[str, bytes] = {  # each with one good row and then one whose image is missing
    "vqa-rad": zip_of({"V.json": json.dumps([rad(1, "a.png"), rad(2, "b.png")]).encode(), "images/a.png": png()}),
    "slake": zip_of({"train.json": json.dumps([slake(1, "a.png"), slake(2, "b.png")]).encode(), "imgs/a.png": png()}),
    "pathvqa": zip_of(
        {"qas/train/train_qa.pkl": pickle.dumps([path_row("a"), path_row("b")]), "images/train/a.png": png()}
    ),
    "llava": zip_of({"train.json": json.dumps([talk("a.png"), talk("b.png")]).encode(), "images/a.png": png()}),
    "openai": jsonl(chat(png()), chat(b"no image")),
    "trl": zip_of({"p.jsonl": jsonl(PAIR | {"images": ["a.png"]}, PAIR | {"images": ["b.png"]}), "a.png": png()}),
    "hf-parquet": parquet(
        {"image": [{"bytes": png()}, {"bytes": b"x"}], "question": ["Where?"] * 2, "answer": ["left"] * 2}
    ),
    "table": zip_of({"t.csv": b"image,question,answer\na.png,Where?,left\nb.png,Where?,left\n", "a.png": png()}),
}


def leftovers(settings: Settings) -> list[Path]:
    return list((settings.data_dir / "datasets").iterdir())


def test_every_layout_is_covered_and_the_route_takes_them_all() -> None:
    assert get_args(Layout) == ("auto", "hscr", *LAYOUTS)
    assert GOOD.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_layout_is_recognised_and_its_bad_rows_are_listed(
    client: TestClient, settings: Settings, layout: str
) -> None:
    answer = send(client, GOOD[layout], name="x")
    assert answer.status_code == 201, answer.text
    body = answer.json()
    assert (body["format"], body["n_records"], body["n_images"], body["n_rejected"]) == (layout, 1, 1, 1)
    (row,) = body["rejected"]
    assert row["line"] == (3 if layout == "table" else 2)
    assert row["reason"].startswith("image: ")
    assert row["file"].rpartition(".")[2] in ("json", "jsonl", "pkl", "parquet", "csv")
    assert send(client, GOOD[layout], name="x", format=layout).json() == body
    shown = client.get(f"/datasets/{body['id']}/records").json()["data"][0]
    assert client.get(shown["image_url"]).content == png()
    assert [p.name for p in leftovers(settings)] == [body["digest"].replace(":", "-")]


def test_dicom_files_of_a_foreign_layout_are_cleaned_on_the_way(client: TestClient, settings: Settings) -> None:
    scan = dicom(np.zeros((4, 4), np.uint8), PatientName="Canary^Bird", Modality="US")
    inline = parquet({"image": [{"bytes": scan}], "question": ["Where?"], "answer": ["left"]})
    named = zip_of({"t.csv": b"image,question,answer\na.dcm,Where?,left\n", "a.dcm": scan})
    for upload in (inline, named):
        body = send(client, upload, name="x").json()
        assert body["pictures"] == {"formats": {"dicom": 1}, "flags": {"ultrasound": 1}, "cleaned": 1}
    for path in settings.data_dir.rglob("*"):
        assert not path.is_file() or b"Canary" not in path.read_bytes(), path.name


def test_a_preference_sets_levels_are_stored_and_part_of_its_digest(client: TestClient, settings: Settings) -> None:
    first = send(client, GOOD["trl"], name="x").json()
    folder = settings.data_dir / "datasets" / first["digest"].replace(":", "-")
    assert [level.text for p in read_preferences(folder / "preferences.jsonl") for level in p.levels] == ["right"]
    other = zip_of({"p.jsonl": jsonl(PAIR | {"images": ["a.png"], "rejected": "above"}), "a.png": png()})
    assert send(client, other, name="x").json()["digest"] != first["digest"]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("canary",)


BAD: dict[str, tuple[bytes, dict[str, str], str]] = {
    "another layout than named": (GOOD["slake"], {"format": "trl"}, "layout"),
    "no such split": (GOOD["slake"], {"split": "test"}, "split"),
    "a pickle of more than data": (
        zip_of({"train_qa.pkl": pickle.dumps([Evil()]), "images/a.png": png()}),
        {},
        "plain data",
    ),
    "damaged parquet": (b"PAR1 nonsense", {}, "damaged"),
    "too many rows": (
        zip_of({"t.csv": b"image,question,answer\n" + b"a.png,b,c\n" + b"gone.png,b,c\n" * 60, "a.png": png()}),
        {},
        "rows",
    ),
    "too many bytes": (
        parquet(
            {
                "image": [{"bytes": png() + bytes(99_000 + n)} for n in range(12)],
                **{k: ["a"] * 12 for k in ("question", "answer")},
            }
        ),
        {},
        "bytes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(settings: Settings, name: str) -> None:
    from service.app import create_app

    settings.record_rows_max, settings.upload_unpacked_max_bytes = 50, 10**6
    data, form, word = BAD[name]
    with TestClient(create_app(settings), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = send(client, data, **form)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_archive"), answer.text
    assert word in answer.json()["detail"]
    assert "canary" not in answer.text
    assert str(settings.data_dir) not in answer.text
    assert leftovers(settings) == []
    assert not Path("canary").exists()


def test_labels_that_need_more_memory_than_allowed_take_only_the_child(settings: Settings) -> None:
    """12 million small lists are gigabytes in Python, and 36 MB as JSON."""
    from service.app import create_app

    settings.import_memory_max_bytes = 2**29
    stored = io.BytesIO()
    rows = json.dumps([talk("a.png")])[:-1].encode() + b",[" + b"[],[[1],7.5]," * 3_000_000 + b"0]]"
    with zipfile.ZipFile(stored, "w") as archive:  # deflated it would be refused for its ratio already
        archive.writestr("train.json", rows)
    with TestClient(create_app(settings), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = send(client, stored.getvalue())
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_archive"), answer.text
        assert "HSCR_IMPORT_MEMORY_MAX_BYTES" in answer.json()["detail"]
        assert client.get("/datasets").json()["data"] == []
    assert leftovers(settings) == []


def test_a_folder_with_the_name_of_labels_is_no_labels(client: TestClient) -> None:
    files = {"x.jsonl/a.png": png(), "t.csv": b"image,question,answer\nx.jsonl/a.png,Where?,left\n"}
    assert send(client, zip_of(files)).json()["n_records"] == 1
    answer = send(client, zip_of({"x.jsonl/a.png": png(), "y.png": png()}), format="hscr")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_archive")


def test_no_usable_row_is_refused_with_reasons(client: TestClient, settings: Settings) -> None:
    answer = send(client, zip_of({"t.csv": b"image,question,answer\nb.png,Where?,left\n"}))
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_empty")
    assert answer.json()["rejected"] == [{"file": "t.csv", "line": 2, "reason": "image: the image file is missing"}]
    assert leftovers(settings) == []


def test_contradictions_and_duplicates_of_a_foreign_layout_are_told_by_file_and_line(client: TestClient) -> None:
    """Rows of two files on one picture; a closed answer outside the options that its own row gives is left out."""
    first = b"image,question,answer,answer_type,options\na.png,Where?,left,,\na.png,Which?,both,closed,left|right\n"
    second = b"image,question,answer\na.png,where,Right\na.png,Where?,left.\n"
    body = send(client, zip_of({"train.csv": first, "test.csv": second, "a.png": png()})).json()
    reason = "answer: is none of the options of this closed question"
    assert body["rejected"] == [{"file": "train.csv", "line": 3, "reason": reason}]
    at = {(f, n): {"file": f"{f}.csv", "line": n} for f, n in (("train", 2), ("test", 2), ("test", 3))}
    (all_three,), (same,) = (body["repeats"][kind]["first"] for kind in ("contradictions", "duplicates"))
    assert sorted(all_three, key=str) == sorted(at.values(), key=str)
    assert sorted(same, key=str) == sorted((at["train", 2], at["test", 3]), key=str)
