"""A person's review of preferences: what is rejected is gone, what is corrected is trained on, and nothing lands on other records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hscr.align import align
from hscr.artifacts import bytes_digest, file_digest, write_json
from hscr.data_set import DataSet
from hscr.events import Stopped
from hscr.model import load_model
from hscr.records import Level, PreferenceRecord, VQARecord, read_preferences, to_json
from hscr.review import LevelReview, RecordReview, corrected_levels, read_review, reviewed
from hscr.similarity import token_f1
from tests.hscr.test_align import CONFIG
from tests.hscr.tiny import save_records

RECORD = VQARecord("r", "a.png", "Where?", "in the left lobe")
PREFERENCE = PreferenceRecord(RECORD, (Level("in the right lobe", 0.75), Level("no idea at all", 0.0)), (), {"x": 1})
LINE = (json.dumps(to_json(PREFERENCE)) + "\n").encode()


def after(levels: dict[int, LevelReview], rejected: bool = False, line: bytes = LINE) -> list[PreferenceRecord]:
    review = {1: RecordReview(bytes_digest(LINE), rejected, levels)}
    return list(reviewed([line], review, lambda: token_f1))


def test_rejected_record_and_rejected_level_are_gone() -> None:
    assert after({}, rejected=True) == []
    (left,) = after({1: LevelReview(rejected=True)})
    assert (left.levels, left.dropped) == ((PREFERENCE.levels[1],), {"x": 1, "rejected_in_review": 1})
    assert after({}) == [PREFERENCE]


def test_correction_is_scored_anew_and_takes_its_place_among_the_levels() -> None:
    """Against "in the left lobe" (4 words): "a hole" shares none (F1 0); "in the left foot" shares three of four (F1 0.75)."""
    (down,) = after({1: LevelReview(text=" a hole ")})
    assert [(lv.text, lv.similarity, lv.source) for lv in down.levels] == [
        ("a hole", 0.0, "corrected"), ("no idea at all", 0.0, "replacement"),
    ]  # fmt: skip
    (up,) = after({1: LevelReview(text="a hole"), 2: LevelReview(text="in the left foot")})
    assert [(lv.text, lv.similarity) for lv in up.levels] == [("in the left foot", 0.75), ("a hole", 0.0)]


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ({1: LevelReview(text="In the LEFT lobe.")}, "level 1: says the same as the right answer"),
        ({2: LevelReview(text="in the right lobe")}, "level 2: says the same as level 1"),
        ({1: LevelReview(text="No idea at all!")}, "level 2: an earlier level was corrected to the same"),
        ({3: LevelReview(rejected=True)}, "level 3: the record has 2 levels"),
        ({0: LevelReview(rejected=True)}, "level 0: the record has 2 levels"),
        ({1: LevelReview(text="  ")}, "level 1: must be a text that is not empty"),
        ({1: LevelReview(text="a\x00b")}, "level 1: holds a NUL character"),
    ],
)
def test_correction_that_teaches_nothing_is_refused(levels: dict[int, LevelReview], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        corrected_levels(PREFERENCE, levels)


def test_signs_are_told_apart_though_they_hold_no_word() -> None:
    signs = PreferenceRecord(replace(RECORD, answer="+"), (Level("++", 0.5), Level("+-", 0.1)), (), {})
    assert [level.text for level in corrected_levels(signs, {2: LevelReview(text="-")})] == ["++", "-"]
    for text, words in (("+", "says the same as the right answer"), (" ++ ", "says the same as level 1")):
        with pytest.raises(ValueError, match=words):
            corrected_levels(signs, {2: LevelReview(text=text)})


def test_level_may_take_a_rejected_ones_words() -> None:
    levels = corrected_levels(PREFERENCE, {1: LevelReview(rejected=True), 2: LevelReview(text="in the right lobe")})
    assert [level.text for level in levels] == ["in the right lobe"]


def test_review_of_other_preferences_is_refused() -> None:
    other = LINE.replace(b"0.75", b"0.76")
    with pytest.raises(ValueError, match="record 1 is not the one that was looked at"):
        after({1: LevelReview(rejected=True)}, line=other)
    with pytest.raises(ValueError, match="record 7 is not among the preferences"):
        list(reviewed([LINE], {7: RecordReview("sha256:0", True)}, lambda: token_f1))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"records": {"x": {}}}', '{"records": {"1": {"line": "d", "levels": {"1": 3}}}}']
)
def test_file_that_is_no_review_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "review.json").write_text(text)
    with pytest.raises(ValueError, match=r"--review: review\.json is no review"):
        read_review(tmp_path / "review.json")


def test_optimisation_learns_from_what_the_review_leaves(tiny_folder: Path, tmp_path: Path) -> None:
    """The run stops, a record is rejected and a level corrected, the run goes on: nothing is generated twice, and the weights differ."""
    data = DataSet(save_records(tmp_path / "data", 4))

    def run(out: Path, **options: Any) -> list[Any]:
        return list(align(load_model(tiny_folder, device="cpu"), data, out, CONFIG, **options))

    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(out, stop_after="generating")
    lines = (out / "preferences.jsonl").read_bytes().splitlines(keepends=True)
    made = list(read_preferences(out / "preferences.jsonl"))
    corrected = next(n for n, p in enumerate(made, 1) if p.levels)
    gone = 4 if corrected != 4 else 3
    review = tmp_path / "review.json"
    levels = {"1": {"rejected": False, "text": "Bananas are yellow."}}
    rows = {
        str(corrected): {"line": bytes_digest(lines[corrected - 1]), "rejected": False, "levels": levels},
        str(gone): {"line": bytes_digest(lines[gone - 1]), "rejected": True, "levels": {}},
    }
    write_json(review, {"records": rows})
    run(out, review=review)
    learnt = list(read_preferences(out / "reviewed.jsonl"))
    assert [p.record.id for p in learnt] == [p.record.id for n, p in enumerate(made, 1) if n != gone]
    assert "Bananas are yellow." in [lv.text for lv in learnt[corrected - 1 - (corrected > gone)].levels]
    assert (out / "preferences.jsonl").read_bytes() == b"".join(lines)
    lineage = json.loads((out / "adapter" / "hscr.json").read_text())["lineage"]
    assert lineage["review"] == file_digest(review)
    assert json.loads((out / "report.json").read_text())["preferences"]["records"] == 3
    reference = json.loads((out / "reference.json").read_text())
    assert len(reference) == 3, "the rejected record is not scored"
    run(tmp_path / "plain")
    names = [folder / "adapter" / "adapter_model.safetensors" for folder in (out, tmp_path / "plain")]
    assert file_digest(names[0]) != file_digest(names[1])
    everything = {
        str(n): {"line": bytes_digest(line), "rejected": True, "levels": {}} for n, line in enumerate(lines, 1)
    }
    write_json(review, {"records": everything})
    with pytest.raises(ValueError, match="every record was rejected"):
        run(out, review=review)
