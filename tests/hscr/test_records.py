"""VQA records and preference records in JSONL: what is read, what is rejected and why."""

import json
from pathlib import Path
from typing import Any

import pytest

from hscr.records import (
    MAX_LINE_BYTES,
    GroundedWord,
    Level,
    PreferenceRecord,
    VQARecord,
    WordReward,
    preference_record,
    read_preferences,
    read_records,
    records_file,
    to_json,
    vqa_record,
    write_jsonl,
)

GOOD: dict[str, Any] = {"id": "a", "image": "images/a.png", "question": "Where?", "answer": "left"}


def test_a_full_record_survives_json() -> None:
    record = VQARecord(
        "é1",
        "images/a.png",
        "Which?",
        "no",
        answer_type="closed",
        options=("yes", "no"),
        grounded=(GroundedWord("no", ("yes", "no")),),
        group="g",
        meta={"k": [1]},
    )
    assert vqa_record(json.loads(json.dumps(to_json(record)))) == record
    assert vqa_record(GOOD) == VQARecord("a", "images/a.png", "Where?", "left")


def test_what_comes_after_the_answer_is_given_by_name() -> None:
    """The demo's kind of question once stood in the group's place, and the calibration part was five whole kinds."""
    with pytest.raises(TypeError, match="positional"):
        VQARecord("a", "a.png", "Which?", "left", "open")  # type: ignore[call-arg]


def test_several_images_survive_json_and_one_keeps_its_old_form() -> None:
    """Digests of data sets and runs depend on the bytes of records with one image, also inside preference records."""
    several = vqa_record({"id": "a", "images": ["a.png", " b.png"], "question": "Which?", "answer": "left"})
    assert (several.image, several.images) == ("a.png", ("a.png", "b.png"))
    written = json.loads(json.dumps(to_json(several)))
    assert (written["images"], "image" in written, "further_images" in written) == (["a.png", "b.png"], False, False)
    assert vqa_record(written) == several
    one = VQARecord("a", "a.png", "Which?", "left")
    assert vqa_record({"id": "a", "images": ["a.png"], "question": "Which?", "answer": "left"}) == one
    assert json.dumps(to_json(one)) == (
        '{"id": "a", "image": "a.png", "question": "Which?", "answer": "left", "answer_type": "open"}'
    )
    nested = to_json(PreferenceRecord(one, (), (), {}))["record"]
    fields = ["id", "image", "question", "answer", "answer_type", "options", "grounded", "group", "meta"]
    assert list(nested) == fields
    kept = PreferenceRecord(several, (Level("right", 0.5),), (), {})
    assert preference_record(json.loads(json.dumps(to_json(kept)))) == kept


def test_numbers_as_id_and_answer_become_text() -> None:
    record = vqa_record({**GOOD, "id": 7, "answer": 2.5})
    assert (record.id, record.answer) == ("7", "2.5")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": ""}, "id: must be a text"),
        ({"id": None}, "id: must be a text"),
        ({"question": 3}, "question: must be a text"),
        ({"answer": "  "}, "answer: must be a text"),
        ({"answer": True}, "answer: must be a text"),
        ({"question": "x" * 20_001}, "question: longer than"),
        ({"answer": "a\x00b"}, "answer: holds a NUL"),
        ({"answer": "a\ud800b"}, "answer: holds half of a surrogate pair"),
        ({"image": "/etc/passwd"}, "image: must be a path inside"),
        ({"image": "../a.png"}, "image: must be a path inside"),
        ({"image": "images/../../a.png"}, "image: must be a path inside"),
        ({"image": "images\\a.png"}, "image: must be a path inside"),
        ({"image": "i" * 300}, "image: the path is longer"),
        ({"image": "i/" * 600 + "a"}, "image: the path is longer"),
        ({"image": None}, "image: must be a text"),
        ({"images": ["a.png"]}, "image: give image or images, not both"),
        ({"answer_type": "OPEN?"}, "answer_type: must be open, closed or caption"),
        ({"answer_type": 1}, "answer_type: must be open, closed or caption"),
        ({"options": "yes"}, "options: must be a list"),
        ({"options": ["yes", 1]}, "options: must be a list"),
        ({"grounded": ["left"]}, "grounded: must be a list of"),
        ({"grounded": 5}, "grounded: must be a list"),
        ({"grounded": True}, "grounded: must be a list"),
        ({"grounded": [{"word": "left"}]}, "grounded: must be a list of"),
        ({"group": 1}, "group: must be a text"),
        ({"meta": [1]}, "meta: must be an object"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        vqa_record({**GOOD, **change})


@pytest.mark.parametrize(
    ("answer", "options", "taken"),
    [
        ("Left.", ["left", "right"], True),
        ("T2-weighted", ["T1 weighted", "t2 weighted"], True),
        ("+", ["+", "-"], True),
        ("-", ["+", "±"], False),
        ("both", ["left", "right"], False),
        ("left side", ["left", "right"], False),
        ("maybe", [], True),
    ],
)
def test_a_closed_answer_is_one_of_its_options(answer: str, options: list[str], taken: bool) -> None:
    row = {**GOOD, "answer": answer, "options": options, "answer_type": "Closed"}
    if taken:
        assert vqa_record(row).answer == answer
    else:
        with pytest.raises(ValueError, match=r"^answer: is none of the options of this closed question$"):
            vqa_record(row)
    assert vqa_record({**row, "answer_type": "open"}).answer == answer


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([], "images: must be a list of 1 to 16 paths"),
        (["a.png"] * 17, "images: must be a list of 1 to 16 paths"),
        ("a.png", "images: must be a list of 1 to 16 paths"),
        (["a.png", 3], "images: must be a text"),
        (["a.png", "../b.png"], "images: must be a path inside"),
    ],
)
def test_a_wrong_list_of_images_is_named(images: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        vqa_record({"id": "a", "images": images, "question": "Where?", "answer": "left"})


def test_bad_lines_are_returned_with_line_and_reason_and_never_dropped(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        b"",
        b"{",
        b'"text"',
        json.dumps({**GOOD, "question": "again"}).encode(),
        b'{"id": "\xff"}',
        b"[" * 100_000,
        json.dumps({**GOOD, "id": "b", "answer_type": "CLOSED"}).encode(),
        b'{"id": 1' + b"0" * 5000 + b"}",
    ]
    (tmp_path / "records.jsonl").write_bytes(b"\r\n".join(lines))
    records, rejected = read_records(tmp_path)
    assert [(r.id, r.answer_type) for r in records] == [("a", "open"), ("b", "closed")]
    assert {r.line: r.reason.split(":")[0] for r in rejected if r.line != 9} == {
        3: "not JSON",
        4: "a line must be a JSON object",
        5: "id",
        6: "not UTF-8",
        7: "nested too deeply",
    }
    assert [r.line for r in rejected] == [3, 4, 5, 6, 7, 9]


def test_the_records_file_is_found_or_its_absence_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        records_file(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"0 \.jsonl files there"):
        records_file(tmp_path)
    (tmp_path / "train.jsonl").touch()
    assert records_file(tmp_path).name == "train.jsonl"
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(ValueError, match=r"2 \.jsonl files there"):
        records_file(tmp_path)
    (tmp_path / "records.jsonl").touch()
    assert records_file(tmp_path).name == "records.jsonl"
    assert records_file(tmp_path / "test.jsonl").name == "test.jsonl"


def test_preference_records_survive_jsonl_and_a_torn_last_line_ends_the_reading(tmp_path: Path) -> None:
    records = [
        PreferenceRecord(
            vqa_record({**GOOD, "id": str(i)}),
            (Level("right", 0.5, (("left", "right"),)), Level("none", 0.3, source="sampled"), Level("no", 0.1)),
            (WordReward("left", 1.5, True), WordReward("é", 0.0, False)),
            {"gap_too_small": 2},
        )
        for i in range(2)
    ]
    empty = PreferenceRecord(vqa_record({**GOOD, "id": "3"}), (), (), {})
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [*records, empty])
    assert list(read_preferences(path)) == [*records, empty]
    path.write_bytes(path.read_bytes()[:-5])
    assert list(read_preferences(path)) == records


def test_only_an_unusual_source_of_a_level_is_written() -> None:
    """Files made before there were several sources stay byte for byte what they were."""
    levels = (Level("right", 0.5), Level("none", 0.1, source="random"))
    row = to_json(PreferenceRecord(vqa_record(GOOD), levels, (), {}))
    assert row["levels"][0] == {"text": "right", "similarity": 0.5, "replaced": ()}
    assert row["levels"][1]["source"] == "random"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": float("nan")}, "answer: is nan"),
        ({"id": float("inf")}, "id: is inf"),
        ({"options": ["yes", "\ud800"]}, "options: holds half of a surrogate pair"),
        ({"options": ["yes", "x" * 20_001]}, "options: longer than"),
        ({"group": "a\x00"}, "group: holds a NUL character"),
        ({"grounded": [{"word": "left", "among": ["\udfff"]}]}, "grounded: holds half of a surrogate pair"),
        ({"meta": {"age": float("nan")}}, "meta: holds nan, which is no JSON"),
        ({"meta": {"\ud800": 1}}, "meta: holds half of a surrogate pair"),
        ({"meta": {"a": [{"b": "\x00"}]}}, "meta: holds a NUL character"),
        ({"meta": {"a": json.loads("[" * 400 + "]" * 400)}}, "meta: nested more than 20 levels deep"),
    ],
)
def test_what_no_file_or_database_takes_is_refused_in_every_field(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        vqa_record(GOOD | change)


def test_a_line_of_many_megabytes_is_told_and_never_parsed(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(GOOD | {"meta": {"x": "y" * MAX_LINE_BYTES}}) + "\n" + json.dumps(GOOD))
    records, rejected = read_records(path)
    assert [r.id for r in records] == ["a"]
    assert [(r.line, r.reason) for r in rejected] == [(1, f"longer than {MAX_LINE_BYTES} bytes")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"record": 1}, "record: must be an object"),
        ({"levels": 5}, "levels: must be a list of objects"),
        ({"levels": [{"text": 7, "similarity": 0.5}]}, "levels: must have a text"),
        ({"levels": [{"text": " ", "similarity": 0.5}]}, "levels: must have a text"),
        ({"levels": [{"text": "right"}]}, "similarity: must be a number"),
        ({"levels": [{"text": "right", "similarity": 10**400}]}, "similarity: must be a number"),
        ({"levels": [{"text": "right", "similarity": 0.5, "replaced": ["ab"]}]}, "must be a list of pairs"),
        ({"words": [{"text": "left", "reward": "1"}]}, "reward: must be a number"),
        ({"dropped": {"a": "b"}}, "dropped: must be an object of counts"),
    ],
)
def test_a_preference_record_that_is_none_names_its_field(change: dict[str, Any], reason: str) -> None:
    row = {"record": GOOD, "levels": [{"text": "right", "similarity": 0.5}]}
    assert preference_record(row).levels == (Level("right", 0.5),)
    with pytest.raises(ValueError, match=reason):
        preference_record(row | change)


def test_views_are_read_written_and_checked() -> None:
    from hscr.image_view import View

    plain = {"id": "1", "image": "a.dcm", "question": "q", "answer": "a"}
    one = plain | {"view": {"frame": 3, "window": [40, 400]}}
    record = vqa_record(one)
    assert record.shown == (("a.dcm", View(frame=3, window=(40.0, 400.0))),)
    assert vqa_record(json.loads(json.dumps(to_json(record)))) == record
    several = {
        "id": "1",
        "images": ["a.nii", "b.png"],
        "question": "q",
        "answer": "a",
        "views": [{"plane": "axial"}, {}],
    }
    assert vqa_record(json.loads(json.dumps(to_json(vqa_record(several))))) == vqa_record(several)
    assert to_json(vqa_record(plain | {"view": {}})) == to_json(vqa_record(plain))  # digests of old data sets stay
    assert "views" not in json.dumps(to_json(vqa_record(plain)))
    for bad in (
        {"frame": -1},
        {"frame": True},
        {"plane": "up"},
        {"window": [1]},
        {"window": [1, 0]},
        {"x": 1},
        3,
        {"window": [float("nan"), 1]},
        {"slice": 1.5},
    ):
        with pytest.raises(ValueError, match="view"):
            vqa_record(plain | {"view": bad})
    for wrong in (several | {"view": {}}, several | {"views": [{}]}, plain | {"view": {}, "views": [{}]}):
        with pytest.raises(ValueError, match="view"):
            vqa_record(wrong)
