"""Preference records for other trainers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hscr.export import llama_factory_rows, ms_swift_rows, trl_rows, write_export
from hscr.records import Level, PreferenceRecord, VQARecord, read_preferences

RECORDS = [
    PreferenceRecord(
        VQARecord("a", "images/a.png", "Where?", "left"), (Level("right", 0.5), Level("none", 0.1)), (), {}
    ),
    PreferenceRecord(VQARecord("b", "images/b.png", "Which?", "axial"), (), (), {"no_level": 1}),
]


def test_trl_has_one_row_a_pair_in_conversational_columns() -> None:
    rows = list(trl_rows(RECORDS))
    assert rows[0] == {
        "images": ["images/a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "left"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "right"}]}],
    }
    assert [r["rejected"][0]["content"][0]["text"] for r in rows] == ["right", "none"]


def test_files_hold_a_row_a_line(tmp_path: Path) -> None:
    assert write_export(RECORDS, "trl", tmp_path / "t.jsonl") == 2
    assert len([json.loads(x) for x in (tmp_path / "t.jsonl").read_text().splitlines()]) == 2
    assert write_export(RECORDS, "hscr", tmp_path / "h.jsonl") == 2
    assert list(read_preferences(tmp_path / "h.jsonl")) == RECORDS


def test_an_export_over_its_own_source_loses_nothing_and_half_an_export_is_none(tmp_path: Path) -> None:
    path = tmp_path / "preferences.jsonl"
    write_export(RECORDS, "hscr", path)
    assert write_export(read_preferences(path), "hscr", path) == 2
    assert list(read_preferences(path)) == RECORDS

    def broken() -> Iterator[PreferenceRecord]:
        yield RECORDS[0]
        raise ValueError("the source is damaged")

    with pytest.raises(ValueError, match="damaged"):
        write_export(broken(), "trl", path)
    assert list(read_preferences(path)) == RECORDS
    assert [p.name for p in tmp_path.iterdir()] == ["preferences.jsonl"]


def test_an_unknown_format_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--format: must be one of trl, hscr, ms-swift, llama-factory"):
        write_export(RECORDS, "csv", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_ms_swift_and_llama_factory_have_their_columns_and_one_image_mark(tmp_path: Path) -> None:
    def first(form: str) -> object:
        assert write_export(RECORDS, form, tmp_path / form) == 2
        return json.loads((tmp_path / form).read_text().splitlines()[0])

    assert first("ms-swift") == {
        "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "left"}],
        "rejected_response": "right",
        "images": ["images/a.png"],
    }
    assert first("llama-factory") == {
        "conversations": [{"from": "human", "value": "<image>Where?"}],
        "chosen": {"from": "gpt", "value": "left"},
        "rejected": {"from": "gpt", "value": "right"},
        "images": ["images/a.png"],
    }


def test_other_trainers_get_a_mark_an_image() -> None:
    two = VQARecord("c", "a.png", "Which is newer?", "the second", further_images=("b.png",))
    record = [PreferenceRecord(two, (Level("the first", 0.5),), (), {})]
    assert next(trl_rows(record))["images"] == ["a.png", "b.png"]
    assert next(ms_swift_rows(record))["messages"][0]["content"] == "<image><image>Which is newer?"
    assert next(llama_factory_rows(record))["conversations"][0]["value"] == "<image><image>Which is newer?"
