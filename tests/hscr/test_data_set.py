"""Data sets on disk: what makes one, and the graded answers that it may bring along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hscr.data_set import DataSet, checked_preferences
from hscr.records import Level, PreferenceRecord, RejectedRow, WordReward, read_records, to_json, write_jsonl
from tests.hscr.tiny import save_records


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
