"""Splits by group: nothing on two sides, whatever the order of the rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from hscr.leaks import find_leaks
from hscr.records import Level, PreferenceRecord, read_preferences, read_records, write_jsonl
from hscr.splits import parse_shares, part_of, split_data
from tests.hscr.tiny import picture


def save(folder: Path, rows: list[tuple[str, int, str | None]]) -> Path:
    """Records of (id, picture's seed, group); one file a record, so that equal pictures have other names."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for name, seed, group in rows:
        picture(seed).save(folder / "images" / f"{name}.png")
        row = {"id": name, "image": f"images/{name}.png", "question": "Where?", "answer": "left"}
        lines.append(json.dumps(row | ({"group": group} if group else {})) + "\n")
    (folder / "records.jsonl").write_text("".join(lines))
    return folder


def ids(out: Path) -> dict[str, set[str]]:
    return {p.parent.name: {r.id for r in read_records(p.parent)[0]} for p in out.glob("*/records.jsonl")}


ROWS: list[tuple[str, int, str | None]] = [(f"r{n}", n, f"patient {n // 3}") for n in range(60)]
SHARES = {"train": 0.6, "test": 0.4}


def test_a_group_lies_in_one_part_and_every_record_in_one(tmp_path: Path) -> None:
    summary = split_data(save(tmp_path / "d", ROWS), tmp_path / "out", SHARES, 0)
    parts = ids(tmp_path / "out")
    assert set.union(*parts.values()) == {name for name, _, _ in ROWS}
    assert sum(map(len, parts.values())) == 60
    groups = {n: {group for name, _, group in ROWS if name in found} for n, found in parts.items()}
    assert not groups["train"] & groups["test"]
    assert {n: part["groups"] for n, part in summary["parts"].items()} == {n: len(g) for n, g in groups.items()}
    assert (tmp_path / "out" / "train" / "images").is_dir()
    assert json.loads((tmp_path / "out" / "split.json").read_text()) == summary


def test_the_order_of_rows_changes_nothing_and_the_seed_does(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    for name, rows in (("a", ROWS), ("b", shuffled)):
        split_data(save(tmp_path / name, rows), tmp_path / f"{name}-out", SHARES, 3)
    assert ids(tmp_path / "a-out") == ids(tmp_path / "b-out")
    split_data(tmp_path / "a", tmp_path / "other", SHARES, 4)
    assert ids(tmp_path / "other") != ids(tmp_path / "a-out")


def test_one_picture_keeps_together_groups_and_records_without_one(tmp_path: Path) -> None:
    """Twelve chains: group 2n and group 2n + 1 are joined by a picture, and a record without a group shows it too."""
    rows: list[tuple[str, int, str | None]] = []
    for n in range(12):
        rows += [
            (f"{n}a", 10 * n, f"g{2 * n}"),
            (f"{n}b", 10 * n + 1, f"g{2 * n}"),
            (f"{n}c", 10 * n + 1, f"g{2 * n + 1}"),
        ]
        rows += [(f"{n}d", 10 * n + 2, f"g{2 * n + 1}"), (f"{n}e", 10 * n + 2, None)]
    summary = split_data(save(tmp_path / "d", rows), tmp_path / "out", SHARES, 0)
    parts = ids(tmp_path / "out")
    for n in range(12):
        assert any({f"{n}{x}" for x in "abcde"} <= found for found in parts.values())
    assert (summary["largest_group"], summary["records_without_group"]) == (5, 12)
    files = [sorted((tmp_path / "out" / name / "images").iterdir()) for name in ("train", "test")]
    assert find_leaks(*files) == []


def test_near_copies_stay_together(tmp_path: Path) -> None:
    """Twelve smooth pictures, each with a copy of half the size; no record names a group."""
    data = save(tmp_path / "d", [(f"{n}{x}", 2 * n + (x == "b"), None) for n in range(12) for x in "ab"])
    for n in range(12):
        smooth = picture(n, (16, 16)).resize((64, 64), Image.Resampling.BICUBIC)
        smooth.save(data / "images" / f"{n}a.png")
        smooth.resize((32, 32), Image.Resampling.LANCZOS).save(data / "images" / f"{n}b.png")
    summary = split_data(data, tmp_path / "out", SHARES, 0)
    parts = ids(tmp_path / "out")
    assert all(any({f"{n}a", f"{n}b"} <= found for found in parts.values()) for n in range(12))
    assert summary["largest_group"] == 2


def test_shares_hold_in_the_mean() -> None:
    """10,000 units: the share's standard error is √(0.8·0.2/10000) = 0.004; five of them are allowed."""
    found = [part_of(f"group {n}", {"train": 0.8, "test": 0.2}, 0) for n in range(10_000)]
    assert abs(found.count("train") / 10_000 - 0.8) < 0.02


def test_given_levels_go_with_their_records(tmp_path: Path) -> None:
    data = save(tmp_path / "d", ROWS)
    write_jsonl(
        data / "preferences.jsonl",
        (PreferenceRecord(r, (Level("right", 0.0),), (), {}) for r in read_records(data)[0]),
    )
    split_data(data, tmp_path / "out", SHARES, 0)
    for name, found in ids(tmp_path / "out").items():
        assert {p.record.id for p in read_preferences(tmp_path / "out" / name / "preferences.jsonl")} == found


def test_an_empty_part_or_a_taken_folder_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    data = save(tmp_path / "d", [("a", 0, "g"), ("b", 1, "g")])
    with pytest.raises(ValueError, match=r"no group falls into this part \(1 groups\)"):
        split_data(data, tmp_path / "out", SHARES, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(ValueError, match="not empty"):
        split_data(data, tmp_path / "out", SHARES, 0)


@pytest.mark.parametrize(
    "text", ["", "train", "train=.5", "train=.5,train=.5", "a=0,b=1", "a=nan,b=1", "../x=1", "a=x"]
)
def test_bad_shares_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--shares"):
        parse_shares(text)
    assert parse_shares("train=.8, valid=.1,test=.1") == {"train": 0.8, "valid": 0.1, "test": 0.1}


def test_records_of_several_images_stay_with_whoever_shows_one_of_them(tmp_path: Path) -> None:
    """Twelve chains of three records: the first's second picture is the second's first, whose group the third names."""
    data, rows = tmp_path / "d", []
    (data / "images").mkdir(parents=True)
    for n in range(12):
        for seed in (3 * n, 3 * n + 1, 3 * n + 2):
            picture(seed).save(data / "images" / f"{seed}.png")
        a, b, c = (f"images/{3 * n + k}.png" for k in range(3))
        for name, shown, group in (("a", [a, b], None), ("b", [b], f"g{n}"), ("c", [c], f"g{n}")):
            row = {"id": f"{n}{name}", "images": shown, "question": "Where?", "answer": "left"}
            rows.append(json.dumps(row | ({"group": group} if group else {})) + "\n")
    (data / "records.jsonl").write_text("".join(rows))
    split_data(data, tmp_path / "out", SHARES, 0)
    parts = ids(tmp_path / "out")
    assert all(any({f"{n}{x}" for x in "abc"} <= found for found in parts.values()) for n in range(12))
    files = [sorted((tmp_path / "out" / name / "images").iterdir()) for name in ("train", "test")]
    assert find_leaks(*files) == []
    assert sum(map(len, files)) == 36
