"""Data sets on disk: what makes one, and the graded answers that it may bring along."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hscr.data_set import DataSet, checked_preferences
from hscr.records import Level, PreferenceRecord, RejectedRow, WordReward, read_records, to_json, write_jsonl
from tests.hscr.tiny import save_records

LOW = Level("no lesion", -0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_records(tmp_path / "data", 3)


def graded(folder: Path) -> list[PreferenceRecord]:
    """Everything that a generated record can hold; the last one has no level."""
    levels = (Level("the right lobe", 0.8, (("left", "right"),)), Level("no lesion", -0.1, source="sampled"))
    words = (WordReward("left", 1.25, True), WordReward("lobe", -0.5, False))
    records = read_records(folder)[0]
    return [PreferenceRecord(r, levels if n < 2 else (), words, {"gap_too_small": 1}) for n, r in enumerate(records)]


def test_a_file_of_preference_records_is_a_data_set_that_brings_its_levels(folder: Path) -> None:
    made = graded(folder)
    plain = DataSet(folder)
    write_jsonl(folder / "preferences.jsonl", made)
    beside = DataSet(folder)
    assert beside.given == folder / "preferences.jsonl"
    assert beside.digest != plain.digest
    (folder / "records.jsonl").unlink()
    alone = DataSet(folder)
    assert alone.records == beside.records
    assert (alone.given, alone.digest) == (beside.given, beside.digest)
    assert list(checked_preferences(folder / "preferences.jsonl", alone.records)) == made
    named = DataSet(shutil.move(folder / "preferences.jsonl", folder / "pairs.jsonl"))
    assert (named.records, named.given) == (alone.records, folder / "pairs.jsonl")


def test_preference_lines_that_fit_no_record_are_told_with_their_line(folder: Path) -> None:
    first, second, third = (json.dumps(to_json(p)) for p in graded(folder))
    lines = [first, first, "{", second.replace("Where", "When"), third.replace("-0.5", "NaN"), "[1]"]
    assert "When" in lines[3]
    assert "NaN" in lines[4]
    (folder / "preferences.jsonl").write_text("\n".join(lines))
    found = checked_preferences(folder / "preferences.jsonl", read_records(folder)[0])
    odd = {row.line: row.reason for row in found if isinstance(row, RejectedRow)}
    assert odd.keys() == {2, 3, 4, 5, 6}
    assert odd[2] == "id: used by an earlier line"
    assert odd[3].startswith("not JSON")
    assert odd[4] == "record: is none of the data set's"
    assert odd[5] == "similarity, reward: must be finite"
    assert odd[6] == "record: must be an object"
    with pytest.raises(ValueError, match=r"preferences.jsonl has 5 lines that fit no record \(line 2: id: used by"):
        DataSet(folder)
    for changed in ('"text": "\\ud800"', '"source": "\\ud800"', '"replaced": [["\\ud800", "x"]]'):
        row = json.loads(first)
        row["levels"] = [{"text": "right", "similarity": 0.5} | json.loads(f"{{{changed}}}")]
        (folder / "preferences.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match="holds half of a surrogate pair"):
            DataSet(folder)
    (folder / "preferences.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"preferences.jsonl has no line; remove it"):
        DataSet(folder)


@pytest.mark.parametrize(("answer", "text", "taken"), [("Left.", "left", False), ("+", "-", True), ("+", " + ", False)])
def test_an_answer_that_is_preferred_to_itself_is_no_pair(folder: Path, answer: str, text: str, taken: bool) -> None:
    """The second level of the second record says the right answer in other letters."""
    first, second, _ = graded(folder)
    again = replace(second.record, answer=answer)
    write_jsonl(folder / "preferences.jsonl", [first, replace(second, record=again, levels=(LOW, Level(text, 0.1)))])
    found = list(checked_preferences(folder / "preferences.jsonl", [first.record, again]))
    assert (found[1] == RejectedRow(2, "levels: level 2 is the right answer")) is not taken


@pytest.mark.parametrize(("text", "taken"), [("A bone!", False), ("a bone here", True), ("+", True)])
def test_two_levels_that_say_the_same_are_no_order(folder: Path, text: str, taken: bool) -> None:
    """Nearest to right first, each better than the next (equation of the multi-level loss): a text is not better than itself."""
    first, second, _ = graded(folder)
    levels = (Level("a bone", 0.5), Level("-", 0.4), Level(text, 0.1))
    write_jsonl(folder / "preferences.jsonl", [first, replace(second, levels=levels)])
    found = list(checked_preferences(folder / "preferences.jsonl", read_records(folder)[0]))
    assert (found[1] == RejectedRow(2, "levels: level 3 says the same as level 1")) is not taken


def test_repeats_are_told_by_line_and_kept(tmp_path: Path) -> None:
    """One picture under two names; a bad line and an empty one count as lines; another frame, or another order, is another picture."""
    folder = save_records(tmp_path / "data", 2)
    shutil.copy(folder / "images" / "0.png", folder / "images" / "copy.png")
    first = {"image": "images/0.png", "question": "Where is it?", "answer": "left"}
    rows: list[dict[str, Any] | str] = [
        first,
        "{",
        "",
        {**first, "image": "images/copy.png", "question": "where is it"},
        {**first, "answer": "Right."},
        {**first, "answer": "LEFT"},
        {**first, "image": "images/1.png", "answer": "right"},
        {**first, "view": {"frame": 1}, "answer": "right"},
        {**first, "image": None, "images": ["images/0.png", "images/1.png"]},
        {**first, "image": None, "images": ["images/1.png", "images/0.png"], "answer": "right"},
        {**first, "question": "Why?"},
        {**first, "question": "Why?"},
    ]
    written = [
        json.dumps({k: v for k, v in ({"id": f"r{n}"} | row).items() if v is not None})
        if isinstance(row, dict)
        else row
        for n, row in enumerate(rows)
    ]
    (folder / "records.jsonl").write_text("\n".join(written))
    data = DataSet(folder)
    assert (len(data.records), [row.line for row in data.rejected]) == (10, [2])
    at = [{"line": n} for n in range(13)]
    assert data.repeats() == {
        "contradictions": {"questions": 1, "records": 4, "first": [[at[1], at[4], at[5], at[6]]]},
        "duplicates": {"questions": 2, "records": 5, "first": [[at[1], at[4], at[6]], [at[11], at[12]]]},
    }


def test_what_is_told_of_repeats_is_bounded(folder: Path) -> None:
    rows = [
        {"id": f"{n}", "image": "images/0.png", "question": f"Which of {n % 30}?", "answer": "left"} for n in range(900)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = DataSet(folder).repeats()["duplicates"]
    assert (told["questions"], told["records"]) == (30, 900)
    assert [len(places) for places in told["first"]] == [20] * 20
