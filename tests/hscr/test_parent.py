"""Aligning on top of an adapter: the reference is that adapter, the policy starts as it, and what comes out stands by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from hscr.artifacts import file_digest
from hscr.events import Metrics, Stopped
from hscr.model import load_model
from hscr.parent import load_parent
from hscr.records import read_preferences
from tests.hscr.test_align import run
from tests.hscr.tiny import save_records


@pytest.fixture(scope="module")
def parent(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was aligned on other records; its rank 2 is not the default."""
    root = tmp_path_factory.mktemp("parent")
    run(tiny_folder, save_records(root / "data", 6, first=50), root / "out", evaluate=False)
    return root / "out" / "adapter"


@pytest.fixture(scope="module")
def child(parent: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("child")
    events = run(tiny_folder, save_records(root / "data"), root / "out", parent=parent)
    return root, events


def first_step(events: list[Any]) -> dict[str, float]:
    return next(e.values for e in events if isinstance(e, Metrics) and e.stage == "optimizing" and e.step == 1)


def test_policy_is_the_reference_before_the_first_step(child: tuple[Path, list[Any]]) -> None:
    """π = π_ref gives h = 0 for every answer: no reward and no margin. With the base as reference they would be the parent's own."""
    values = first_step(child[1])
    assert values["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert values["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_it_starts_from_the_parent_and_has_its_shape(child: tuple[Path, list[Any]], parent: Path) -> None:
    made, before = (load_file(f / "adapter_model.safetensors") for f in (child[0] / "out" / "adapter", parent))
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in before.items()}
    assert any(not made[n].equal(before[n]) for n in made)
    config = json.loads((child[0] / "out" / "config.json").read_text())
    assert config["optimization"]["lora_rank"] == 2
    assert config["lineage"]["parent"] == file_digest(parent / "adapter_model.safetensors")
    card = (child[0] / "out" / "adapter" / "README.md").read_text()
    assert config["lineage"]["parent"] in card
    assert PeftConfig.from_pretrained(str(child[0] / "out" / "adapter")).r == 2


def test_preferences_are_the_parents_own(child: tuple[Path, list[Any]], tiny_folder: Path, tmp_path: Path) -> None:
    run(tiny_folder, child[0] / "data", tmp_path / "plain", evaluate=False)
    own, base = (list(read_preferences(f / "preferences.jsonl")) for f in (child[0] / "out", tmp_path / "plain"))
    assert [[w.reward for w in p.words] for p in own] != [[w.reward for w in p.words] for p in base]


def test_evaluation_tells_the_gain_over_the_parent(child: tuple[Path, list[Any]]) -> None:
    evaluation = json.loads((child[0] / "out" / "evaluation.json").read_text())
    assert list(evaluation["scores"]) == ["base", "adapter", "before"]
    assert "open/strict" in evaluation["gain_over_before"]["real"]


def test_stock_peft_loads_it_on_the_plain_base(child: tuple[Path, list[Any]], tiny_folder: Path) -> None:
    base = LlavaForConditionalGeneration.from_pretrained(tiny_folder)
    assert PeftModel.from_pretrained(base, child[0] / "out" / "adapter").peft_config["default"].r == 2


@pytest.mark.thorough
def test_stopped_run_goes_on_to_the_uninterrupted_runs_weights(
    child: tuple[Path, list[Any]], parent: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    asked = iter([False] * 13 + [True] * 100)
    with pytest.raises(Stopped):
        run(tiny_folder, child[0] / "data", tmp_path / "out", parent=parent, should_stop=lambda: next(asked))
    assert list((tmp_path / "out" / "checkpoints").glob("step-*"))
    (tmp_path / "out" / "reference.json").unlink()  # measured again: from the parent, not from the checkpoint
    run(tiny_folder, child[0] / "data", tmp_path / "out", parent=parent)
    names = [f / "adapter" / "adapter_model.safetensors" for f in (child[0] / "out", tmp_path / "out")]
    assert file_digest(names[0]) == file_digest(names[1])


@pytest.mark.thorough
def test_other_parent_begins_anew(
    child: tuple[Path, list[Any]], tiny_folder: Path, tmp_path: Path, parent: Path
) -> None:
    run(tiny_folder, child[0] / "data", tmp_path / "out", parent=parent, evaluate=False)
    events = run(tiny_folder, child[0] / "data", tmp_path / "out", parent=child[0] / "out" / "adapter", evaluate=False)
    assert [e.stage for e in events if getattr(e, "status", "") == "started"] == [
        "generating",
        "optimizing",
        "reporting",
    ]
    assert first_step(events)["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_folder_without_safetensors_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    vlm = load_model(tiny_folder, device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_parent(vlm, tmp_path / "empty", trainable=True)
