"""The correctness half of the benchmarks: what they time gives the same losses, gradients and words as the plain routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hscr.preferences
import hscr.replacement
from benchmarks import bench_generate, bench_optimize, bench_serving
from benchmarks.llava import Shape, save_data, save_llava
from hscr.answer import Answerer, AnswerRequest
from hscr.model import load_model

TINY = Shape(patches=4, layers=2, hidden=48, heads=4, tower_layers=2, tower_hidden=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save_llava(folder / "model", TINY)
    return folder


@pytest.mark.parametrize("tokens", [3, 20])  # short and long beside the prompt
def test_ours_and_the_naive_route_have_the_same_loss_and_gradients(folder: Path, tokens: int) -> None:
    data = folder / f"gradients{tokens}"
    save_data(data, 2, tokens, 3)
    bench_optimize.same_gradients(folder / "model", data)


def test_another_gradient_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder / "noticed"
    save_data(data, 2, 20, 3)
    stock = bench_optimize.naive_logprobs

    def colder(*args: Any) -> torch.Tensor:
        return stock(*args) * 1.001

    monkeypatch.setattr(bench_optimize, "naive_logprobs", colder)
    with pytest.raises(AssertionError):
        bench_optimize.same_gradients(folder / "model", data)


def test_ours_and_the_naive_route_say_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder / "words"
    save_data(data, 3, 12, 0)
    vlm = load_model(folder / "model", device="cpu")
    ours = bench_generate.made_by("hscr", vlm, data, 8)
    monkeypatch.setattr(hscr.preferences, "contrast", hscr.preferences.contrast)  # set back after the test
    monkeypatch.setattr(hscr.replacement, "decode", hscr.replacement.decode)
    plain = bench_generate.made_by("naive", vlm, data, 8)
    assert [[x.text for x in p.levels] for p in ours] == [[x.text for x in p.levels] for p in plain]
    assert sum(len(p.levels) for p in ours) > 6


def test_what_is_served_is_what_generate_says(folder: Path) -> None:
    """Eight questions together, prefixes kept, beside one call of stock `generate` each."""
    vlm = load_model(folder / "model", device="cpu")
    images = [bench_serving.opened(i) for i in bench_serving.pictures(folder, 4, 1)]
    asked = [(i, q, n) for i in images for q, n in zip(bench_serving.QUESTIONS[:2], (6, 11), strict=True)]
    requests = [AnswerRequest(i, q, max_tokens=n) for i, q, n in asked]
    ours = Answerer(vlm, prefix_cache_bytes=2**20).answer(requests)
    for (image, question, n), answer in zip(asked, ours, strict=True):
        batch = vlm.processor(images=[image], text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        with torch.no_grad():
            said = vlm.model.generate(**batch, do_sample=False, max_new_tokens=n, suppress_tokens=vlm.placeholder_ids)
        assert answer.token_ids == said[0, batch["input_ids"].shape[1] :].tolist()
    assert len({tuple(a.token_ids) for a in ours}) > 4


@pytest.mark.thorough
def test_mixed_adapters_say_the_same_in_one_forward(folder: Path) -> None:
    rows = bench_serving.mixed(folder, folder / "model", 1)  # asserts it
    assert [row["way"] for row in rows] == ["one forward", "one a distinct adapter", "all on the base"]
