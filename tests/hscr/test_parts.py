"""Parts of a generation from elsewhere: the run's preferences are one worker's byte for byte, and what is no part of them is left alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hscr.shard
from hscr.align import align
from hscr.artifacts import file_digest
from hscr.config import AlignConfig
from hscr.data_set import DataSet
from hscr.events import Event, Part, Progress, Result, Stage, Stopped, Warning_
from hscr.model import VLM, add_lora, load_model
from hscr.parts import part_name, shard_bounds
from hscr.run_dir import PartialFile, RunDir
from hscr.shard import generate_shards, part_inputs
from tests.hscr.test_cli import hscr as command  # noqa: F401 - a fixture
from tests.hscr.tiny import save_records

CONFIG = AlignConfig.from_dict(
    {
        "preference": {"similarity": "token_f1", "batch_size": 2, "max_similarity": 1.0, "similarity_gap": 0.0},
        "optimization": {"lora_rank": 2, "epochs": 1, "lr": 0.02},
        "seed": 5,
    }
)
N = 9  # five batches of two, the last of one


@dataclass
class Whole:
    """What one worker makes by itself. The model is loaded once: a generation leaves it as it was."""

    vlm: VLM
    model: Path
    data: Path
    preferences: bytes
    parent: Path | None = None

    def generate(
        self, out: Path, config: AlignConfig = CONFIG, seen: Callable[[Event], None] = lambda _: None, **options: Any
    ) -> tuple[bytes, list[Event]]:
        """A run up to the end of its generation: the preferences and the events; `seen` is called with each."""
        events: list[Event] = []
        made = align(self.vlm, DataSet(self.data), out, config, parent=self.parent, stop_after="generating", **options)
        with contextlib.suppress(Stopped):
            for event in made:
                events.append(event)
                seen(event)
        return (out / "preferences.jsonl").read_bytes(), events

    def part(self, folder: Path, which: int, of: int, config: AlignConfig = CONFIG) -> Path:
        """Make one part by itself."""
        before = set(folder.glob("*.jsonl"))
        bounds = shard_bounds(N, config.preference.batch_size, which, of)
        list(generate_shards(self.vlm, DataSet(self.data), config, [bounds], parts=folder, parent=self.parent))
        (made,) = set(folder.glob("*.jsonl")) - before
        assert set(folder.iterdir()) == before | {made}, "nothing half is left"
        return made


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    made = Whole(load_model(tiny_folder, device="cpu"), tiny_folder, save_records(root / "data", N), b"")
    made.preferences, events = made.generate(root / "out")
    assert taken(events) == []
    return made


def taken(events: list[Event]) -> list[tuple[int, int]]:
    return [(e.first, e.last) for e in events if isinstance(e, Part)]


def odd(events: list[Event]) -> list[str]:
    return [e.code for e in events if isinstance(e, Warning_)]


@pytest.mark.parametrize(("of", "there", "expected"), [
    (1, [1], [(1, 9)]),
    (2, [2], [(5, 9)]),
    (3, [1, 3], [(1, 2), (7, 9)]),
])  # fmt: skip
def test_a_run_takes_up_what_is_there_and_ends_with_one_workers_file(
    whole: Whole, tmp_path: Path, of: int, there: list[int], expected: list[tuple[int, int]]
) -> None:
    for which in there:
        whole.part(tmp_path / "out" / "parts", which, of)
    made, events = whole.generate(tmp_path / "out")
    assert made == whole.preferences
    assert taken(events) == expected
    assert odd(events) == []
    done = [e.done for e in events if isinstance(e, Progress)]
    assert done == sorted(done)
    assert done[-1] == N


def test_parts_on_top_of_a_parent_are_the_parents(whole: Whole, tmp_path: Path) -> None:
    vlm = load_model(whole.model, device="cpu")
    add_lora(vlm, CONFIG.optimization, 0)
    for parameter in vlm.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    vlm.model.save_pretrained(str(tmp_path / "parent"))
    child = replace(whole, parent=tmp_path / "parent")
    alone, _ = child.generate(tmp_path / "alone")
    assert alone != whole.preferences
    child.part(tmp_path / "parts", 2, 2)
    whole.part(tmp_path / "parts", 1, 2)  # the base's
    made, events = child.generate(tmp_path / "out", parts=tmp_path / "parts")
    assert made == alone
    assert taken(events) == [(5, 9)]
    assert odd(events) == ["foreign_part"]


def test_a_part_that_comes_while_the_run_works_on_its_records_is_taken_from_there(whole: Whole, tmp_path: Path) -> None:
    """The run is two batches into the part when it appears: the rest of it is taken."""
    part, folder = whole.part(tmp_path / "elsewhere", 1, 1), tmp_path / "parts"
    folder.mkdir()

    def arrive(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 4:
            shutil.move(part, folder / part.name)

    made, events = whole.generate(tmp_path / "out", seen=arrive, parts=folder)
    assert made == whole.preferences
    assert taken(events) == [(5, 9)]


def test_a_damaged_part_is_left_alone_until_it_is_whole(whole: Whole, tmp_path: Path) -> None:
    """As a copy under way is: first its beginning only, then another byte, then whole."""
    part = whole.part(tmp_path / "out" / "parts", 1, 1)
    good = part.read_bytes()
    other = good.replace(b'"coupled": true', b'"coupled": null', 1)  # of the right records, and yet not what was made
    assert other != good
    part.write_bytes(good[: len(good) // 2])

    def change(event: Event) -> None:
        if isinstance(event, Progress) and event.done in (2, 6):
            part.write_bytes(other if event.done == 2 else good)

    made, events = whole.generate(tmp_path / "out", seen=change)
    assert made == whole.preferences
    assert taken(events) == [(7, 9)]
    assert odd(events) == ["damaged_part"]


@pytest.mark.parametrize("change", [{"seed": 6}, {"preference": {"beta": 0.5}}, {"preference": {"batch_size": 1}}])
def test_a_part_made_from_something_else_is_left_alone(whole: Whole, tmp_path: Path, change: dict[str, Any]) -> None:
    whole.part(tmp_path / "out" / "parts", 1, 1, AlignConfig.from_dict(change, CONFIG))
    made, events = whole.generate(tmp_path / "out")
    assert made == whole.preferences
    assert taken(events) == []
    assert odd(events) == ["foreign_part"]


@pytest.mark.parametrize(
    ("start", "stop", "lines"),
    [(0, 4, slice(1, 5)), (0, 4, slice(0, 3)), (0, 3, slice(0, 3)), (1, 4, slice(1, 4)), (0, 11, slice(0, 11))],
    ids=["other records'", "a line too few", "half a batch", "within a batch", "beyond the end"],
)
def test_a_name_alone_makes_no_part(whole: Whole, tmp_path: Path, start: int, stop: int, lines: slice) -> None:
    folder = tmp_path / "out" / "parts"
    folder.mkdir(parents=True)
    path = folder / "forged"
    path.write_bytes(b"".join(whole.preferences.splitlines(keepends=True)[lines]))
    path.rename(
        folder / part_name(part_inputs(whole.vlm, DataSet(whole.data), CONFIG, None), start, stop, file_digest(path))
    )
    made, events = whole.generate(tmp_path / "out")
    assert made == whole.preferences
    assert taken(events) == []
    assert odd(events) == ["damaged_part"]


def test_a_run_that_was_stopped_after_a_part_goes_on_behind_it(whole: Whole, tmp_path: Path) -> None:
    whole.part(tmp_path / "out" / "parts", 1, 2)
    with pytest.raises(Stopped):
        list(
            align(
                whole.vlm,
                DataSet(whole.data),
                tmp_path / "out",
                CONFIG,
                should_stop=lambda: True,
            )
        )
    partial = tmp_path / "out" / "preferences.partial.jsonl"
    assert partial.read_bytes() == b"".join(whole.preferences.splitlines(keepends=True)[:4])
    made, events = whole.generate(tmp_path / "out")
    assert made == whole.preferences
    assert taken(events) == []


def test_a_part_is_made_once(whole: Whole, tmp_path: Path) -> None:
    whole.part(tmp_path, 2, 3)
    bounds = shard_bounds(N, 2, 2, 3)
    events = list(generate_shards(whole.vlm, DataSet(whole.data), CONFIG, [bounds], parts=tmp_path))
    assert [(e.stage, e.status) for e in events if isinstance(e, Stage)] == [("generating", "skipped")]
    next(tmp_path.glob("*.jsonl")).write_bytes(b"damaged")
    events = list(generate_shards(whole.vlm, DataSet(whole.data), CONFIG, [bounds], parts=tmp_path))
    assert isinstance(events[-1], Result)


FLAGS = ["-s", "preference.similarity=token_f1", "-s", "preference.batch_size=2", "-s", "preference.max_similarity=1"]
FLAGS += ["-s", "preference.similarity_gap=0", "--preset", "paper", "--seed", 5]


def test_generate_stops_on_term_and_the_same_command_goes_on(
    whole: Whole,
    command: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["generate", whole.data, "-m", whole.model, *FLAGS, "--device", "cpu"]
    assert command(*arguments, "-o", tmp_path / "whole.jsonl")[0] == 0
    batches: list[int] = []

    class Told(PartialFile):
        def append(self, values: Any) -> None:
            super().append(values)
            batches.append(1)
            if len(batches) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(hscr.shard, "PartialFile", Told)
    arguments += ["-o", tmp_path / "new" / "p.jsonl", "--events", "json"]
    code, out, _ = command(*arguments)
    assert code == 75
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["stage", "progress", "progress", "progress"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == [".p.jsonl.partial"]
    with RunDir(tmp_path / "new" / ".p.jsonl.partial").locked():
        code, out, _ = command(*arguments)
        assert code == 2, "another process makes the same"
        assert json.loads(out)["code"] == "bad_input"
    code, out, _ = command(*arguments)
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert (events[1]["done"], events[-1]["type"]) == (4, "result")
    assert events[-1]["digest"] == file_digest(tmp_path / "new" / "p.jsonl")
    assert len(batches) == 5, "no batch was made twice"
    assert (tmp_path / "new" / "p.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.jsonl"]


def test_generate_puts_a_part_where_align_finds_it(whole: Whole, command: Any, tmp_path: Path) -> None:  # noqa: F811
    same = ["-m", whole.model, *FLAGS, "--device", "cpu"]
    code, _, err = command("generate", whole.data, *same, "--shard", "2/2", "--parts", tmp_path / "run" / "parts")
    assert code == 0, err
    code, _, err = command("align", whole.data, *same, "--out", tmp_path / "run", "--stop-after", "generating")
    assert code == 75
    assert "records 5 to 9 were made elsewhere" in err
    assert command("generate", whole.data, *same, "-o", tmp_path / "p.jsonl")[0] == 0
    assert (tmp_path / "run" / "preferences.jsonl").read_bytes() == (tmp_path / "p.jsonl").read_bytes()
    for where in ([], ["-o", tmp_path / "x.jsonl", "--parts", tmp_path]):
        code, _, err = command("generate", whole.data, *same, *where)
        assert code == 2
        assert "give either --out FILE or --parts FOLDER" in err


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Where standard input is written to, a real pipe."""
    end, start = os.pipe()
    with os.fdopen(end) as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield start
        with contextlib.suppress(OSError):
            os.close(start)


def test_one_command_makes_the_parts_that_it_is_told(
    whole: Whole,
    command: Any,  # noqa: F811
    tmp_path: Path,
    said: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[str] = []
    load = hscr.shard.load_similarity
    monkeypatch.setattr(hscr.shard, "load_similarity", lambda name: (loads.append(name), load(name))[1])
    same = ["generate", whole.data, "-m", whole.model, *FLAGS, "--device", "cpu", "--events", "json"]
    os.write(said, b"3/3\n\n1/3\n3/3\n")
    os.close(said)
    code, out, err = command(*same, "--shard", "-", "--parts", tmp_path / "told")
    assert code == 0, err
    stages = [json.loads(line)["status"] for line in out.splitlines() if '"stage"' in line and '"status"' in line]
    assert stages == ["started", "completed", "started", "completed", "skipped"]
    assert loads == ["token_f1"]
    for which in ("1/3", "3/3"):
        assert command(*same, "--shard", which, "--parts", tmp_path / "apart")[0] == 0
    assert {p.name for p in (tmp_path / "told").iterdir()} == {p.name for p in (tmp_path / "apart").iterdir()}


def test_what_is_told_must_be_a_part(whole: Whole, command: Any, tmp_path: Path, said: int) -> None:  # noqa: F811
    same = ["generate", whole.data, "-m", whole.model, *FLAGS, "--device", "cpu", "--shard", "-"]
    code, _, err = command(*same, "-o", tmp_path / "x.jsonl")
    assert code == 2
    assert "--parts FOLDER" in err
    os.write(said, b"4/3\n")
    code, _, err = command(*same, "--parts", tmp_path)
    assert code == 2
    assert "must be 1/3 to 3/3" in err


def test_a_command_that_waits_for_a_part_stops_on_term(whole: Whole, command: Any, tmp_path: Path, said: int) -> None:  # noqa: F811
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    code, _, _ = command("generate", whole.data, "-m", whole.model, *FLAGS, "--shard", "-", "--parts", tmp_path)
    timer.join()
    assert code == 75


def test_a_command_with_further_parts_before_it_stops_on_term(
    whole: Whole,
    command: Any,  # noqa: F811
    tmp_path: Path,
    said: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = hscr.shard.load_similarity
    monkeypatch.setattr(
        hscr.shard, "load_similarity", lambda name: (os.kill(os.getpid(), signal.SIGTERM), load(name))[1]
    )
    os.write(said, b"1/3\n2/3\n3/3\n")
    code, _, _ = command("generate", whole.data, "-m", whole.model, *FLAGS, "--shard", "-", "--parts", tmp_path / "p")
    assert code == 75
    assert not (tmp_path / "p").exists()
