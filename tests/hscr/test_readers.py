"""Readers of foreign layouts: fixtures in exactly the published layouts, with their quirks, through the import's door."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hscr.importing import ImportReport, import_data
from hscr.readers import LAYOUTS, detect
from hscr.readers.pathvqa import load_plain
from hscr.records import VQARecord, read_preferences, read_records
from tests.hscr.tiny import picture


def png(seed: int) -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def put(path: Path, value: Any) -> Path:
    """Write bytes, text, or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
    path.write_bytes(data)
    return path


def imported(source: Path, **options: Any) -> tuple[dict[str, VQARecord], ImportReport]:
    """Import, and check what holds of every import: the report is stored, the records read back clean and every image is there."""
    out = source.parent / f"out-{len(list(source.parent.iterdir()))}"
    report = import_data(source, out, **options)
    records, rejected = read_records(out)
    assert rejected == []
    assert all((out / r.image).is_file() for r in records)
    assert json.loads((out / "import.json").read_text())["counts"] == report.counts
    assert report.counts["rows"] >= report.counts["records"] + report.counts["rejected"]
    return {r.id: r for r in records}, report


def reasons(report: ImportReport) -> dict[tuple[str, int], str]:
    return {(r["file"], r["line"]): r["reason"] for r in report.rejected}


# VQA-RAD, official JSON.


def rad_row(qid: Any, phrase_type: str, **changes: Any) -> dict[str, Any]:
    case = "https://medpix.nlm.nih.gov/case?id=48e1dd0e-8552-46ad-a354-5eb55be86de6"
    row = {"qid": qid, "phrase_type": phrase_type, "qid_linked_id": "03f451ca", "image_case_url": case}
    row |= {"image_name": "synpic54610.jpg", "image_organ": "HEAD", "evaluation": "not evaluated"}
    row |= {"question": "Are regions of the brain infarcted?", "question_rephrase": "NULL", "question_relation": "NULL"}
    return row | {"question_type": "PRES", "answer": "Yes", "answer_type": "CLOSED"} | changes


@pytest.fixture
def vqa_rad(tmp_path: Path) -> Path:
    rows = [
        rad_row(0, "freeform"),
        rad_row(1, "para", answer="axial ", answer_type="OPEN", question="Which plane? "),
        rad_row(2, "test_freeform", answer=3, answer_type="OPEN", question="How many lesions?"),
        rad_row(3, "test_para", answer_type="CLOSED ", question="Is there a lesion?", answer="no"),
        rad_row(4, "freeform", image_name="synpic1.jpg"),
        rad_row(5, "other"),
        rad_row(6, "test_freeform", answer=None),
        "no object",
    ]
    put(tmp_path / "rad" / "VQA_RAD Dataset Public.json", rows)
    put(tmp_path / "rad" / "VQA_RAD Image Folder" / "synpic54610.jpg", png(0))
    return tmp_path / "rad"


def test_vqa_rad_reads_numbers_trailing_spaces_and_its_split_by_phrase_type(vqa_rad: Path) -> None:
    test, report = imported(vqa_rad, split="test")
    assert {k: (r.answer, r.answer_type) for k, r in test.items()} == {"2": ("3", "open"), "3": ("no", "closed")}
    assert reasons(report) == {("VQA_RAD Dataset Public.json", 7): "answer: must be a text that is not empty"}
    train, report = imported(vqa_rad, split="train")
    assert list(train) == ["0", "1"]
    assert (train["1"].question, train["1"].answer, train["1"].image) == (
        "Which plane?",
        "axial",
        "images/synpic54610.jpg",
    )
    assert train["0"].options == ("yes", "no")
    assert train["0"].group == "48e1dd0e-8552-46ad-a354-5eb55be86de6"
    assert {line: reason[:20] for (_, line), reason in reasons(report).items()} == {
        5: "image: the image fil",
        6: "phrase_type: must be",
        8: "must be an object wi",
    }
    both, report = imported(vqa_rad)
    assert (len(both), report.counts["rejected"], report.counts["rows"]) == (4, 4, 8)


# SLAKE.


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    base = {"img_id": 1, "img_name": "xmlab1/source.jpg", "location": "Abdomen", "modality": "MRI"}
    base |= {"base_type": "vqa", "content_type": "Modality", "triple": ["vhead", "_", "_"], "q_lang": "en"}
    closed = base | {"answer_type": "CLOSED"}
    rows = [
        base | {"qid": 0, "question": "What modality?", "answer": "MRI", "answer_type": "OPEN"},
        closed | {"qid": 1, "question": "Is this a CT or an MRI?", "answer": "MRI"},
        closed | {"qid": 2, "question": "Is it healthy?", "answer": "No"},
        base | {"qid": 3, "question": "成像方式是什么?", "answer": "磁共振", "answer_type": "OPEN", "q_lang": "zh"},
        base | {"qid": 4, "question": "Where?", "answer": "left", "answer_type": "OPEN", "img_name": "gone/x.jpg"},
    ]
    put(tmp_path / "slake" / "train.json", rows)
    put(tmp_path / "slake" / "validate.json", rows[:1])
    put(tmp_path / "slake" / "test.json", rows[:2])
    put(tmp_path / "slake" / "imgs" / "xmlab1" / "source.jpg", png(1))
    return tmp_path / "slake"


def test_slake_keeps_english_lists_the_rest_and_leaves_closed_words_closed(slake: Path) -> None:
    found, report = imported(slake, split="train")
    assert {k: (r.answer_type, r.options) for k, r in found.items()} == {
        "train-0": ("open", ()),
        "train-1": ("closed", ()),
        "train-2": ("closed", ("yes", "no")),
    }
    assert found["train-0"].image == "images/xmlab1/source.jpg"
    assert (found["train-0"].group, found["train-0"].meta["modality"]) == ("1", "MRI")
    assert reasons(report) == {
        ("train.json", 4): "language: is zh, wanted: en",
        ("train.json", 5): "image: the image file is missing",
    }
    assert len(imported(slake, split="train", languages=["en", "zh"])[0]) == 4
    assert list(imported(slake, split="valid")[0]) == ["valid-0"]
    assert len(imported(slake)[0]) == 6
    with pytest.raises(ValueError, match="--split dev: slake has only test, train, valid"):
        imported(slake, split="dev")


# PathVQA, pickles.


def test_pathvqa_pickles_have_names_without_extension_and_no_answer_types(tmp_path: Path) -> None:
    rows = [
        {"image": "train_0422", "question": "where are liver stem cells located?", "answer": "in the canals"},
        {"image": "train_0422", "question": "is it benign?", "answer": "yes"},
        {"image": "train_9999", "question": "is it benign?", "answer": "no"},
        ["no dict"],
    ]
    put(tmp_path / "p" / "qas" / "train" / "train_qa.pkl", pickle.dumps(rows, protocol=2))
    put(tmp_path / "p" / "images" / "train" / "train_0422.jpg", png(0))
    found, report = imported(tmp_path / "p")
    assert {k: (r.image, r.answer_type) for k, r in found.items()} == {
        "train_qa-1": ("images/train_0422.jpg", "open"),
        "train_qa-2": ("images/train_0422.jpg", "closed"),
    }
    assert reasons(report) == {
        ("train_qa.pkl", 3): "image: the image file is missing",
        ("train_qa.pkl", 4): "must be an object with the layout's fields",
    }


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({self.path!r}, 'w').close()",))


def test_a_pickle_that_asks_for_anything_but_plain_data_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    attacks = [pickle.dumps([Evil(str(mark))], protocol=p) for p in range(6)]
    attacks += [pickle.dumps(print), pickle.dumps(pa.scalar(1)), b"cos\nsystem\n(S'touch ran'\ntR."]
    for n, attack in enumerate(attacks):
        with pytest.raises(ValueError, match="only lists, dicts, texts and numbers"):
            load_plain(put(tmp_path / f"{n}_qa.pkl", attack))
        assert not mark.exists()
    for broken in (b"", b"\x80\x04", b"(lp0\n", pickle.dumps([1])[:-1], b"P1\n."):
        with pytest.raises(ValueError, match=r"is no whole pickle|is refused"):
            load_plain(put(tmp_path / "broken_qa.pkl", broken))
    assert load_plain(put(tmp_path / "a_qa.pkl", pickle.dumps([{"a": (1, 2.5, "x", None)}]))) == [
        {"a": (1, 2.5, "x", None)}
    ]


# Parquet, as Hugging Face stores it.


def test_hf_parquet_reads_embedded_bytes_and_names_them_by_their_digest(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": png(0), "path": None}, "question": "is it normal?", "answer": "no"},
        {"image": {"bytes": png(0), "path": "x.jpg"}, "question": "which plane?", "answer": "axial "},
        {"image": {"bytes": None, "path": None}, "question": "which plane?", "answer": "axial"},
        {"image": {"bytes": png(1)[:50], "path": None}, "question": "which plane?", "answer": "axial"},
    ]
    (tmp_path / "hf" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hf" / "data" / "train-00000-of-00001-eb85.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "hf" / "data" / "test-00000-of-00001.parquet")
    found, report = imported(tmp_path / "hf", split="train")
    assert [(k, r.answer, r.answer_type) for k, r in found.items()] == [
        ("train-00000-1", "no", "closed"),
        ("train-00000-2", "axial", "open"),
    ]
    assert len({r.image for r in found.values()}) == report.counts["images"] == 1
    assert [r["reason"] for r in report.rejected] == [
        "image: the row has neither bytes nor a path",
        "image: the image is damaged",
    ]
    assert list(imported(tmp_path / "hf", split="test")[0]) == ["test-00000-1"]


def test_a_missing_pyarrow_is_told_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    put(tmp_path / "s" / "a.parquet", b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: is no whole parquet file"):
        detect(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'hscr\[data\]'"):
        detect(tmp_path / "s")


# LLaVA-Med conversations.


def test_llava_conversations_lose_the_image_mark_and_every_pair_is_a_record(tmp_path: Path) -> None:
    def talk(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]

    rows = [
        {"id": "a", "image": "a.jpg", "conversations": talk("<image>\nWhat is shown?", "A CT.", "Is it normal?", "No")},
        {"id": "b", "image": "a.jpg", "conversations": talk("Where?\n<image>", "left"), "answer_type": "OPEN"},
        {"id": "c", "conversations": talk("What?", "nothing")},
        {"id": "d", "image": "a.jpg", "conversations": talk("What?", "a", "and?")},
        {"id": "e", "image": "a.jpg", "conversations": talk("<image>", "a")},
        {"id": "f", "image": "../../a.jpg", "conversations": talk("What?", "a")},
    ]
    put(tmp_path / "l" / "train.json", rows)
    put(tmp_path / "l" / "images" / "a.jpg", png(0))
    found, report = imported(tmp_path / "l")
    assert [(r.id, r.question, r.answer, r.answer_type) for r in found.values()] == [
        ("a", "What is shown?", "A CT.", "open"),
        ("a-2", "Is it normal?", "No", "closed"),
        ("b", "Where?", "left", "open"),
    ]
    assert {line: reason.split(":")[0] for (_, line), reason in reasons(report).items()} == {
        3: "image",
        4: "conversations",
        5: "question",
        6: "image",
    }


# TRL's vision preference.


def trl_row(image: Any, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    def turn(role: str, words: str, *parts: dict[str, str]) -> list[dict[str, Any]]:
        return [{"role": role, "content": [*parts, {"type": "text", "text": words}]}]

    row = {"images": [image], "prompt": turn("user", prompt, {"type": "image"})}
    return row | {"chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)}


def test_trl_rows_of_one_question_become_one_record_with_its_levels_in_order(tmp_path: Path) -> None:
    rows = [
        trl_row("images/a.png", "Where?", "left lobe", "right lobe"),
        trl_row("images/a.png", "Where?", "left lobe", "nothing"),
        trl_row("images/b.png", "Where?", "left lobe", "nothing"),
        trl_row("images/a.png", "Where?", "left lobe", "nothing"),
        trl_row("images/a.png", "Where?", "left lobe", "Left lobe."),
        {"images": [], "prompt": "Where?", "chosen": "a", "rejected": "b"},
        {"images": ["images/b.png"], "prompt": "What <image>?", "chosen": "a", "rejected": "b"},
    ]
    put(tmp_path / "t" / "p.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    for seed, name in enumerate("ab"):
        put(tmp_path / "t" / "images" / f"{name}.png", png(seed))
    found, report = imported(tmp_path / "t")
    assert list(found) == ["p-1", "p-3", "p-7"]
    out = next(tmp_path.glob("out-*"))
    given = {
        p.record.id: [(level.text, level.similarity) for level in p.levels]
        for p in read_preferences(out / "preferences.jsonl")
    }
    assert given == {
        "p-1": [("right lobe", 0.5), ("nothing", 0.0)],
        "p-3": [("nothing", 0.0)],
        "p-7": [("b", 0.0)],
    }
    assert [r["line"] for r in report.rejected] == [4, 5, 6]


def test_trl_parquet_embeds_its_images(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    rows = [trl_row({"bytes": png(0), "path": None}, "Where?", "left", "right")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t" / "train.parquet")
    found, report = imported(tmp_path / "t")
    assert (len(found), report.source["format"]) == (1, "trl")


# CSV and JSONL.


def test_a_csv_names_its_rows_by_line_and_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    lines = [
        "\ufeffimage,question,answer,answer_type,options,group,language",
        "a.png,Which side?,left ,closed,left|right,p1,",
        '"a.png","Describe\nit.",a lesion,,,p1,en',
        "a.png,Is it normal?,Yes.,,,,",
        "a.png,too,few",
        ",,,,,,",
        "a.png,Was ist das?,Hirn,,,,de",
        "a.png,Is it normal?,no,maybe,,,",
        "a.png,Caf\udce9?,no,,,,",
    ]
    put(tmp_path / "c" / "rows.csv", "\r\n".join(lines).encode("utf-8", "surrogateescape"))
    put(tmp_path / "c" / "a.png", png(0))
    found, report = imported(tmp_path / "c")
    assert [(r.id, r.answer, r.answer_type, r.options, r.group) for r in found.values()] == [
        ("rows-2", "left", "closed", ("left", "right"), "p1"),
        ("rows-3", "a lesion", "open", (), "p1"),
        ("rows-5", "Yes.", "closed", ("yes", "no"), None),
    ]
    assert {line: reason for (_, line), reason in reasons(report).items()} == {
        6: "has 3 fields, the header has 7",
        8: "language: is de, wanted: en",
        9: "answer_type: must be open, closed or caption",
        10: "not UTF-8",
    }


def test_our_own_folder_imports_as_it_is(tmp_path: Path) -> None:
    from tests.hscr.tiny import save_records

    data = save_records(tmp_path / "data")
    found, report = imported(data)
    before = {r.id: r for r in read_records(data)[0]}
    assert {k: r.answer for k, r in found.items()} == {k: r.answer for k, r in before.items()}
    assert {k: (r.grounded, r.options, r.image) for k, r in found.items()} == {
        k: (r.grounded, r.options, r.image) for k, r in before.items()
    }
    assert report.counts["rejected"] == 0


# The door.


def test_contradictions_and_duplicates_are_reported_and_kept(tmp_path: Path) -> None:
    """Rows 1 and 3 are the same but for case; row 2 contradicts them, its file has the same bytes; row 4 asks otherwise."""
    rows = [
        {"id": "1", "image": "a.png", "question": "Where?", "answer": "Left"},
        {"id": "2", "image": "b.png", "question": "where", "answer": "right"},
        {"id": "3", "image": "a.png", "question": "Where?", "answer": "left."},
        {"id": "4", "image": "a.png", "question": "What?", "answer": "right"},
        {"id": "4", "image": "a.png", "question": "How?", "answer": "right"},
        {"id": "5", "image": "c.png", "question": "Where?", "answer": "right"},
    ]
    put(tmp_path / "s" / "r.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        put(tmp_path / "s" / f"{name}.png", png(seed))
    found, report = imported(tmp_path / "s")
    assert list(found) == ["1", "2", "3", "4", "5"]
    assert [[p["id"] for p in c["records"]] for c in report.contradictions] == [["1", "2", "3"]]
    assert [[p["id"] for p in c["records"]] for c in report.duplicates] == [["1", "3"]]
    assert reasons(report) == {("r.jsonl", 5): "id: used by an earlier row"}


def test_an_image_that_leaves_the_source_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "secret.png", png(0))
    names = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "a/../../secret.png",
        "..\\secret.png",
        "a\x00b",
        "a" * 300,
        "",
    ]
    rows = [{"image": n, "question": "Where?", "answer": "left"} for n in [*names, "ok.png"]]
    put(tmp_path / "s" / "r.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    put(tmp_path / "s" / "ok.png", png(1))
    found, report = imported(tmp_path / "s")
    assert list(found) == ["r-8"]
    assert [r["line"] for r in report.rejected] == list(range(1, 8))
    assert all(r["reason"].startswith("image:") for r in report.rejected)


def test_nothing_is_left_behind_where_nothing_is_usable_or_the_folder_is_taken(tmp_path: Path) -> None:
    put(tmp_path / "s" / "r.jsonl", '{"image": "a.png", "question": "Where?", "answer": "left"}\n')
    with pytest.raises(ValueError, match=r"s: no usable row \(r\.jsonl 1: image: the image file is missing"):
        import_data(tmp_path / "s", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    put(tmp_path / "s" / "a.png", png(0))
    put(tmp_path / "out" / "mine.txt", b"")
    with pytest.raises(ValueError, match="not empty"):
        import_data(tmp_path / "s", tmp_path / "out")


def test_an_unknown_layout_is_told_with_those_that_are_known(tmp_path: Path) -> None:
    put(tmp_path / "s" / "x.txt", b"x")
    for bad in (tmp_path / "s", put(tmp_path / "bad.json", b"[{"), put(tmp_path / "deep.json", b"[" * 100_000)):
        with pytest.raises(ValueError, match=r"not recognised.*pathvqa: qas"):
            detect(bad)
    with pytest.raises(ValueError, match="--format: must be auto or one of"):
        detect(tmp_path / "s", "csv")
    with pytest.raises(ValueError, match="no such file or folder"):
        detect(tmp_path / "none")
    assert set(LAYOUTS) == {"vqa-rad", "slake", "pathvqa", "llava", "openai", "trl", "hf-parquet", "table"}


# Hostile sources: told in a line, never a crash, an endless wait or a file outside the source.


def test_folders_and_pipes_with_the_names_of_labels_are_no_labels(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be read for ever."""
    source = tmp_path / "in"
    put(source / "a.png", png(0))
    put(source / "R.JSONL", {"image": "a.png", "question": "Where?", "answer": "left"})
    for name in ("x.csv", "x.json", "x.jsonl", "x.parquet", "qas/train/x_qa.pkl", "data"):
        put(source / name / "inside", "x")
    for name in ("pipe.csv", "pipe.json", "pipe.jsonl", "pipe.parquet", "pipe_qa.pkl"):
        os.mkfifo(source / name)
    records, report = imported(source)
    assert list(records) == ["R-1"]
    assert report.rejected == []


def test_lists_in_a_pickle_that_share_their_items_a_billion_times_are_never_written_out(tmp_path: Path) -> None:
    laughs: list[Any] = []
    for _ in range(40):
        laughs = [laughs, laughs]
    good = {"image": "a", "question": "Where?", "answer": "left"}
    rows = [good, good | {"image": laughs}, good | {"question": laughs}, good | {"answer": laughs}, {"image": 5}]
    put(tmp_path / "in" / "images" / "a.png", png(0))
    put(tmp_path / "in" / "train_qa.pkl", pickle.dumps(rows))
    records, report = imported(tmp_path / "in")
    assert list(records) == ["train_qa-1"]
    assert [r["line"] for r in report.rejected] == [2, 3, 4, 5]


def test_a_rejected_answer_that_is_no_text_leaves_its_row_out_not_the_whole_import(tmp_path: Path) -> None:
    good = {"images": ["a.png"], "prompt": "Where?", "chosen": "left", "rejected": "right"}
    rows = [good, *(good | {"rejected": x} for x in ("\ud800", "a\x00b", "z" * 20_001))]
    put(tmp_path / "in" / "a.png", png(0))
    put(tmp_path / "in" / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    records, report = imported(tmp_path / "in")
    assert len(records) == 1
    found = list(reasons(report).values())
    assert [r.split(":")[0] for r in found] == ["rejected"] * 3
    assert ["surrogate" in found[0], "NUL" in found[1], "longer" in found[2]] == [True] * 3


def test_a_parquet_file_with_text_that_is_no_utf8_or_more_rows_than_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe"))
    (tmp_path / "in").mkdir()
    table = pa.table({"image": pa.array([{"bytes": png(0), "path": "x"}]), "question": text, "answer": ["left"]})
    pq.write_table(table, tmp_path / "in" / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0.parquet: is damaged \(UnicodeDecodeError\)"):
        import_data(tmp_path / "in", tmp_path / "out")

    def starved(self: Any, **options: Any) -> Any:
        raise pa.ArrowMemoryError("malloc of size 1073741824 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", starved)
    with pytest.raises(MemoryError, match=r"train-0.parquet: 64 of its rows need more memory"):
        import_data(tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.png", png(0))
    put(tmp_path / "in" / "t.csv", "image,question,answer,answer\na.png,Where?,left,right\n")
    with pytest.raises(ValueError, match=r"t.csv: its header names a column twice"):
        import_data(tmp_path / "in", tmp_path / "out")
