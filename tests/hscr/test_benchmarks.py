"""The correctness half of the benchmarks: what they time gives the same losses, gradients and words as the plain routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hscr.preferences
import hscr.replacement
from benchmarks import bench_generate, bench_gpu, bench_optimize, bench_serving, gpu_serving
from benchmarks.gpu_tables import markdown
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


def test_serving_in_process_answers_every_cell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole batches and questions that join, adapters among them; what stock `generate` takes stands beside."""
    monkeypatch.setattr(gpu_serving, "lengths", lambda n: [2 + i % 3 for i in range(n)])
    rows: list[dict[str, Any]] = []
    over: list[str] = []

    def load() -> Any:
        return load_model(folder / "model", device="cpu")

    gpu_serving.serving(
        load, folder / "served", 600, rows.append, lambda mode, _: over.append(mode), clients=(1, 3), each=1
    )
    cells = ["new", "known", "new", "known", "six questions on one", "known, base", "known, base and 4 adapters"]
    assert [row["images"] for row in rows] == ["new", *cells, *cells]
    assert over == ["whole batches", "joining"]
    assert [row["answers"] for row in rows] == [4, *2 * [4, 4, 4, 4, 12, 4, 4]]
    assert {row["cut"] for row in rows} == {""}
    assert rows[0]["× generate"] == 1
    joining = [row for row in rows if row["method"] == "joining"]
    assert all(0 < row["first token p50 ms"] < row["answer p50 ms"] for row in joining)


def test_a_cell_without_time_says_that_it_was_cut(folder: Path) -> None:
    vlm = load_model(folder / "model", device="cpu")
    asked = gpu_serving.questions(gpu_serving.pictures(3, 1), 0)
    with gpu_serving.Served(vlm, "joining", 0) as served:
        row = served.closed(asked, 2, 0.0).row("joining", "new", 2, gpu_serving.Cell(1.0, [1.0]))
    assert (row["answers"], row["cut"]) == (0, "of 3")
    cell = gpu_serving.generated(vlm, gpu_serving.pictures(4, 1), 0.0)
    assert (len(cell.answered), cell.asked) == (1, 4)


def test_the_docs_table_says_what_is_missing() -> None:
    found = {
        "name": "7b",
        "machine": "a GPU",
        "tables": {"attention": [{"SDPA ms": 12.345, "flex ms": float("nan"), "why": "no compiler"}], "serving": []},
        "missing": {"peers": "no time left"},
    }
    assert markdown(found) == (
        "7b\na GPU\n\n**attention**\n\n| SDPA ms | flex ms | why |\n| --- | --- | --- |\n| 12.3 |  | no compiler |\n\n"
        "peers: no time left\n"
    )


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # TRL's and transformers' about each other
def test_the_gpu_bench_in_a_small_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part on a CPU: what only a GPU has is named as missing, and a part without time too."""
    monkeypatch.chdir(tmp_path)
    told = tmp_path / "told.json"
    monkeypatch.setattr("sys.argv", ["bench_gpu", "--shape", "small", "--records", "4", "--json", str(told)])
    bench_gpu.main()
    found = json.loads(told.read_text())
    assert [len(rows) for rows in found["tables"].values()] == [7, 15]
    assert list(found["missing"]) == ["attention"]
    monkeypatch.setattr(
        "sys.argv", ["bench_gpu", "--shape", "small", "--records", "4", "--seconds", "0", "--json", str(told)]
    )
    bench_gpu.main()
    found = json.loads(told.read_text())
    assert found["tables"] == {}
    assert found["missing"] == dict.fromkeys(bench_gpu.PARTS, "no time left")
