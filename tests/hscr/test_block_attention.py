"""Attention by blocks: blocks are what segments say, logits SDPA's in every family that allows it, and a run chooses by measuring."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import hscr.attention_choice
import hscr.block_attention
import hscr.optimize
from hscr.attention_choice import Attention, Guarded, attention_events, check_attention, chosen
from hscr.block_attention import BLOCK, attended, segment_blocks, why_not_family
from hscr.config import AlignConfig, OptimizationConfig
from hscr.grouped_attention import grouped_sdpa
from hscr.inputs import tree_mask
from hscr.model import VLM, add_lora, encode_answer, encode_prompts, load_model
from hscr.optimize import TrainStep, optimize
from hscr.packing import packed_logits
from hscr.records import Level, PreferenceRecord, VQARecord
from tests.hscr.tiny import picture
from tests.hscr.tiny_families import NAMES, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LONG = ("There is a large lesion in the left lobe. " * 6, "no", "left lobe lesion " * 30)


def segments_of(seed: int, width: int = 5 * BLOCK) -> Tensor:
    """Two rows of a prompt, answers of any length, and padding."""
    rng = random.Random(seed)
    rows = []
    for _ in range(2):
        row = [0] * rng.choice([40, BLOCK, 200, 2 * BLOCK])
        for j in range(1, rng.randint(2, 6)):
            row += [j] * rng.choice([1, 30, BLOCK, 150])
        rows.append((row + [-1] * width)[:width])
    return torch.tensor(rows)


def tiles(seen: Tensor) -> Tensor:
    """[B, blocks of queries, blocks of keys, pairs] of a mask [B, 1, T, T]."""
    b, _, t, _ = seen.shape
    n = t // BLOCK
    return seen.view(b, n, BLOCK, n, BLOCK).transpose(2, 3).reshape(b, n, n, -1)


def listed(number: Tensor, index: Tensor) -> Tensor:
    """The blocks [B, Q, K] that a BlockMask lists."""
    out = torch.zeros(index.shape, dtype=torch.bool)
    out.scatter_(-1, index.long(), torch.arange(index.shape[-1]).expand_as(index) < number[..., None])
    return out[:, 0]


def test_blocks_by_hand() -> None:
    """128 of prompt, 128 of answer 1, 128 of answer 2, padding: answers see the prompt's block whole and not each other."""
    segments = torch.tensor([0, 1, 2, -1]).repeat_interleave(BLOCK)[None]
    blocks = segment_blocks(segments)
    none, diagonal = [False] * 4, torch.eye(4, dtype=torch.bool).tolist()
    assert listed(blocks.kv_num_blocks, blocks.kv_indices)[0].tolist() == diagonal
    full = [none, [True, False, False, False], [True, False, False, False], none]
    assert listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)[0].tolist() == full  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(12))
def test_what_is_seen_lies_in_a_block_and_what_is_full_is_seen(seed: int) -> None:
    """The kernel reads the mask in partial blocks only and computes nothing outside of both; a block in both would count twice."""
    segments = segments_of(seed)
    blocks, seen = segment_blocks(segments), tree_mask(segments)
    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)  # type: ignore[arg-type]
    pairs = tiles(seen)
    assert not (partial & full).any()
    assert torch.equal(partial | full, pairs.any(-1))
    assert torch.equal(full, pairs.all(-1))
    b, t = segments.shape
    at = torch.meshgrid(torch.arange(b), torch.tensor([0]), torch.arange(t), torch.arange(t), indexing="ij")
    assert torch.equal(blocks.mask_mod(*at), seen)


def attention_inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Queries of 4 heads, keys and values of 2 [2, ·, 640, 8]; segments."""
    stream = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 640, 8, dtype=dtype, generator=stream) for heads in (4, 2, 2)], segments_of(1)


def test_it_is_the_same_function_as_sdpa_and_so_are_its_slopes() -> None:
    """There is no backward pass on a CPU: along a random direction the change of flex's output is what SDPA's gradient says (float64)."""
    inputs, segments = attention_inputs(torch.float64)
    blocks, seen = segment_blocks(segments), tree_mask(segments)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    weight = torch.randn(2, 640, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def sdpa(*qkv: Tensor) -> Tensor:
        return (grouped_sdpa(module, *qkv, seen, scaling=0.3)[0] * weight).sum()

    def flex(*qkv: Tensor) -> Tensor:
        return (grouped_sdpa(module, *qkv, blocks, scaling=0.3)[0] * weight).sum()  # type: ignore[arg-type]

    torch.testing.assert_close(attended(*inputs, blocks, 0.3), grouped_sdpa(module, *inputs, seen, scaling=0.3)[0])
    leaves = [t.clone().requires_grad_() for t in inputs]
    gradients = torch.autograd.grad(sdpa(*leaves), leaves)
    stream, step = torch.Generator().manual_seed(2), 1e-5
    way = [torch.randn(t.shape, dtype=torch.float64, generator=stream) for t in inputs]
    ends = [flex(*(t + side * w for t, w in zip(inputs, way, strict=True))) for side in (step, -step)]
    slope = sum(float((g * w).sum()) for g, w in zip(gradients, way, strict=True))
    assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(slope, rel=1e-6)


def packed_both(vlm: VLM) -> tuple[list[Tensor], list[Tensor]]:
    questions = ["Where is the lesion?", "what"]
    prompts = encode_prompts(vlm, [picture(0), picture(1)], questions)
    answers = [[encode_answer(vlm, questions[0], a) for a in LONG], [encode_answer(vlm, questions[1], "right")]]
    with torch.no_grad():
        plain, blocks = (packed_logits(vlm, prompts, answers, blocks=b) for b in (False, True))
    return [row for group in plain for row in group], [row for group in blocks for row in group]


def test_packed_rows_have_the_same_logits(vlm: VLM) -> None:
    for plain, blocks in zip(*packed_both(vlm), strict=True):
        torch.testing.assert_close(blocks, plain, atol=3e-5, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_every_family_that_allows_it_has_the_same_logits(name: str, tmp_path: Path) -> None:
    vlm = load_model(save_tiny(name, tmp_path / "model"), device="cpu")
    reason = why_not_family(vlm)
    assert (reason is None) == (name != "gemma3")
    if reason is None:
        for plain, blocks in zip(*packed_both(vlm), strict=True):
            torch.testing.assert_close(blocks, plain, atol=3e-5, rtol=1e-5)
    else:
        assert reason == "gemma3 has attention masks of its own"


def test_flex_without_cuda_is_refused_before_the_run(vlm: VLM) -> None:
    check_attention(vlm, "auto")
    with pytest.raises(ValueError, match=r"optimization\.attention: flex is not possible here: .* CUDA only"):
        check_attention(vlm, "flex")
    with pytest.raises(ValueError, match=r"optimization\.attention: must be one of auto, sdpa, flex"):
        AlignConfig.from_dict({"optimization": {"attention": "eager"}})


class Work:
    """Scoring by either attention, as long as asked by the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sdpa: float, flex: float | Exception) -> None:
        self.seconds, self.now, self.asked = {False: sdpa, True: flex}, 0.0, []
        monkeypatch.setattr(hscr.attention_choice.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(hscr.attention_choice, "why_not", why_not_family)  # as if this were CUDA

    def __call__(self, blocks: bool) -> None:
        self.asked.append(blocks)
        took = self.seconds[blocks]
        if isinstance(took, Exception):
            raise took
        self.now += took


@pytest.mark.parametrize(("flex", "kind"), [(0.3, "flex"), (0.5, "sdpa")])
def test_the_faster_is_chosen_and_kept(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flex: float, kind: str
) -> None:
    work = Work(monkeypatch, 0.4, flex)
    found = chosen(vlm, "auto", tmp_path, 1000, work)
    assert (found.kind, found.why) == (kind, None)
    assert (found.sdpa_ms, found.flex_ms) == (pytest.approx(400), pytest.approx(1000 * flex))
    (event,) = attention_events("optimizing", found)
    assert event.values["attention/flex"] == (kind == "flex")  # type: ignore[union-attr]
    assert chosen(vlm, "auto", tmp_path, 1000, work) == found
    assert len(work.asked) == 6


def test_nothing_is_measured_where_there_is_nothing_to_win(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDPA asked for, a short run, a run that began before, a family that does not allow it, a CPU."""
    work = Work(monkeypatch, 0.4, 0.1)
    assert chosen(vlm, "sdpa", tmp_path, 1000, work).kind == "sdpa"
    assert chosen(vlm, "auto", tmp_path, 199, work).kind == "sdpa"
    (tmp_path / "reference.json").write_text("[]")
    assert chosen(vlm, "auto", tmp_path, 1000, work).kind == "sdpa"
    (tmp_path / "reference.json").unlink()
    monkeypatch.setattr(hscr.attention_choice, "why_not", hscr.block_attention.why_not)
    assert chosen(vlm, "auto", tmp_path, 1000, work).kind == "sdpa"
    assert not work.asked
    assert not list(tmp_path.iterdir())


def test_what_stands_against_flex_is_told(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is missing; and a run that goes on where flex cannot be: its reference is computed again."""
    work = Work(monkeypatch, 0.4, RuntimeError("Failed to find C compiler.\nPlease …"))
    found = chosen(vlm, "auto", tmp_path, 1000, work)
    assert found == Attention("sdpa", pytest.approx(400), None, "RuntimeError: Failed to find C compiler.")
    *_, warning = attention_events("optimizing", found)
    assert warning.code == "attention"  # type: ignore[union-attr]
    (tmp_path / "attention.json").write_text(json.dumps({"kind": "flex"}))
    (tmp_path / "reference.json").write_text("[]")
    monkeypatch.setattr(hscr.attention_choice, "why_not", hscr.block_attention.why_not)
    found = chosen(vlm, "auto", tmp_path, 1000, work)
    assert (found.kind, found.why) == ("sdpa", "flex_attention has a backward pass on CUDA only, and this is cpu")
    assert not (tmp_path / "reference.json").exists()


def test_memory_and_sdpas_own_errors_are_not_taken_for_flexs(tmp_path: Path) -> None:
    def failing(error: Exception) -> Callable[[], None]:
        def run() -> None:
            raise error

        return run

    guard = Guarded(Attention("flex"), tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        guard(failing(torch.OutOfMemoryError("full")))
    for error in (OSError("no such image"), ValueError("the device's memory is too small for one record")):
        with pytest.raises(type(error)):
            guard(failing(error))
    assert guard.attention.blocks
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError):  # with SDPA too: it was not flex's
        guard(failing(KeyError("image")))
    assert not guard.attention.blocks
    assert json.loads((tmp_path / "attention.json").read_text())["why"] == "KeyError: 'image'"


@pytest.fixture
def blocks_with_gradients(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """flex_attention as SDPA under the mask that the blocks say, for on a CPU it has no backward pass; as if this were CUDA."""
    calls: list[str] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, scale: float, enable_gqa: bool) -> Tensor:
        calls.append("failed" if calls[-1:] == ["fail"] else "flex")
        if calls[-1] == "failed":
            raise RuntimeError("no kernel for this shape")
        b, t = q.shape[0], q.shape[2]
        at = torch.meshgrid(torch.arange(b), torch.tensor([0]), torch.arange(t), torch.arange(t), indexing="ij")
        seen = block_mask.mask_mod(*at)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(hscr.block_attention, "flex_attention", attend)
    monkeypatch.setattr(hscr.attention_choice, "why_not", why_not_family)
    return calls


def trained(vlm: VLM, folder: Path, attention: str) -> Iterator[TrainStep]:
    config = OptimizationConfig(epochs=2, batch_size=2, lora_rank=2, lr=1e-3, anchor=1.0, attention=attention)
    made = [
        PreferenceRecord(
            VQARecord(str(i), f"{i}.png", "Where is the lesion?", "in the left lobe"),
            (Level("in the right lobe", 0.8), Level("nowhere", 0.5)),
            (),
            {},
        )
        for i in range(4)
    ]
    add_lora(vlm, config, seed=0)
    folder.mkdir()
    yield from optimize(vlm, made, lambda r: picture(int(r.id)), config, folder)


def test_a_run_by_blocks_takes_the_same_steps(
    tiny_folder: Path, tmp_path: Path, blocks_with_gradients: list[str]
) -> None:
    """Reference and policy by blocks; and one whose blocks fail in the middle, which goes on with SDPA and says so."""
    plain = list(trained(load_model(tiny_folder, device="cpu"), tmp_path / "sdpa", "sdpa"))
    assert not blocks_with_gradients
    flex = list(trained(load_model(tiny_folder, device="cpu"), tmp_path / "flex", "flex"))
    assert blocks_with_gradients
    assert {s.attention for s in flex} == {Attention("flex")}
    failing, steps = trained(load_model(tiny_folder, device="cpu"), tmp_path / "failing", "flex"), []
    for step in failing:
        steps.append(step)
        if step.step == 2:
            blocks_with_gradients.append("fail")
    assert [s.attention.kind for s in steps] == ["flex", "flex", "sdpa", "sdpa"]
    assert steps[-1].attention.why == "RuntimeError: no kernel for this shape"
    for other in (flex, steps):
        for a, b in zip(plain, other, strict=True):
            assert a.metrics == pytest.approx(b.metrics, rel=1e-4, abs=1e-5)
    assert plain[0].metrics["loss"] != plain[-1].metrics["loss"]


def test_where_flex_fails_in_one_process_all_go_on_with_sdpa(
    tiny_folder: Path, tmp_path: Path, blocks_with_gradients: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process of the two is played here: its flex fails in the second step. The first one keeps what they agreed."""
    failed, said = Attention("sdpa", why="RuntimeError: no kernel for this shape"), []

    def gathered(value: Any) -> list[Any]:
        if not isinstance(value, Attention):
            return [value]
        said.append(value)
        return [value, failed if len(said) > 1 else value]

    monkeypatch.setattr(hscr.optimize, "gathered", gathered)
    steps = list(trained(load_model(tiny_folder, device="cpu"), tmp_path / "run", "flex"))
    assert [s.attention.kind for s in steps] == ["flex", "sdpa", "sdpa", "sdpa"]
    assert json.loads((tmp_path / "run" / "attention.json").read_text())["why"] == failed.why
    assert blocks_with_gradients
