"""Optimisation: the first step's value, the plan and the rate by hand, LoRA only, checkpoints and resume bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hscr.optimize
from hscr.adapted_decoder import AdaptedDecoder
from hscr.artifacts import verify_manifest
from hscr.config import OptimizationConfig
from hscr.images import decode_image
from hscr.model import VLM, add_lora, load_model
from hscr.optimize import TrainStep, batch_plan, lr_factor, optimize
from hscr.records import Level, PreferenceRecord, VQARecord, read_records

CONFIG = OptimizationConfig(
    lora_rank=2, lr=0.02, batch_size=3, token_budget=80, epochs=2, checkpoint_every=2, gamma=0.5, anchor=0.5
)
LEVELS = ("There is a large bright lesion in the right temporal lobe.", "no lesion", "axial")


@pytest.fixture
def preferences(data_folder: Path) -> list[PreferenceRecord]:
    """Seven records with 3, 2, 1, 0, 3, 2, 1 levels."""
    records = read_records(data_folder)[0][:7]
    counts = (3, 2, 1, 0, 3, 2, 1)
    return [
        PreferenceRecord(r, tuple(Level(t, 0.5) for t in LEVELS[:n]), (), {})
        for r, n in zip(records, counts, strict=True)
    ]


class Trainer:
    """A fresh model with a fresh adapter a run, as in a fresh process."""

    def __init__(self, model: Path, data: Path, preferences: Sequence[PreferenceRecord]) -> None:
        self.model, self.data, self.preferences = model, data, preferences
        self.vlm: VLM

    def open_image(self, record: VQARecord) -> Any:
        return decode_image(self.data / record.image)

    def run(
        self, out: Path, config: OptimizationConfig = CONFIG, *, stop_at: int = 0, dtype: str = "float32"
    ) -> list[TrainStep]:
        self.vlm = load_model(self.model, device="cpu", dtype=dtype)
        add_lora(self.vlm, config, seed=0)
        calls = [0]

        def should_stop() -> bool:
            calls[0] += 1
            return calls[0] == stop_at

        out.mkdir(exist_ok=True)
        return list(optimize(self.vlm, self.preferences, self.open_image, config, out, seed=0, should_stop=should_stop))

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.vlm.model.named_parameters() if "lora_" in n}


@pytest.fixture
def trainer(tiny_folder: Path, data_folder: Path, preferences: list[PreferenceRecord]) -> Trainer:
    return Trainer(tiny_folder, data_folder, preferences)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_at_the_first_step_policy_and_reference_are_equal(trainer: Trainer, tmp_path: Path) -> None:
    """No anchor: six records with levels, pairs 6, 3, 1, 6, 3, 1 (j + j(j−1)/2); one batch: mean loss 20/6 · ln 2."""
    config = replace(CONFIG, anchor=0.0, batch_size=16, epochs=1)
    (step,) = trainer.run(tmp_path / "out", config)
    assert step.metrics["loss"] == pytest.approx(20 / 6 * math.log(2), rel=1e-6)
    assert step.metrics["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert step.metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_training_moves_right_answers_up_against_wrong_ones(trainer: Trainer, tmp_path: Path) -> None:
    steps = trainer.run(tmp_path / "out", replace(CONFIG, epochs=8, batch_size=7))
    assert steps[-1].metrics["loss"] < steps[0].metrics["loss"]
    assert steps[-1].metrics["rewards/margins"] > 0.05
    assert steps[-1].metrics["rewards/accuracies"] > 0.9
    assert steps[-1].metrics["logps/chosen"] > steps[0].metrics["logps/chosen"]  # the anchor holds it up


def test_accumulated_batches_are_one_batch(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over records: however a step's records are cut by the token budget, its metrics are the same."""
    stock, cuts, results = hscr.optimize.answer_logits, [], []

    def counted(vlm: VLM, prompts: Any, answers: Any, **route: bool) -> Any:
        cuts[-1].append(len(prompts))
        return stock(vlm, prompts, answers, **route)

    monkeypatch.setattr(hscr.optimize, "answer_logits", counted)
    for tokens in (1, 200, 8192):
        cuts.append([])
        (step,) = trainer.run(
            tmp_path / str(tokens), replace(CONFIG, batch_size=7, token_budget=tokens, epochs=1, lr=1e-3)
        )
        results.append(step.metrics)
    assert cuts[0] == [1] * 14  # reference and policy
    assert cuts[2] == [7] * 2
    assert len(cuts[2]) < len(cuts[1]) < len(cuts[0])
    for other in results[1:]:
        assert other["loss"] == pytest.approx(results[0]["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-4)


def test_only_lora_weights_move(trainer: Trainer, tmp_path: Path) -> None:
    trainer.run(tmp_path / "out")
    fresh = dict(load_model(trainer.model, device="cpu").model.named_parameters())
    base = dict(trainer.vlm.model.unload().named_parameters())
    assert same(base, fresh)


def test_lora_trains_in_float32_on_a_bfloat16_base(trainer: Trainer, tmp_path: Path) -> None:
    """At lr 5e-7 bfloat16 weights would hardly move (8 bits of mantissa); float32 ones do, every B entry."""
    config = replace(CONFIG, lr=5e-7, epochs=1, lr_schedule="constant", warmup_ratio=0.0)
    steps = trainer.run(tmp_path / "out", config, dtype="bfloat16")
    weights = trainer.weights()
    assert {w.dtype for w in weights.values()} == {torch.float32}
    moved = torch.cat([(w != 0).flatten() for n, w in weights.items() if "lora_B" in n]).float().mean()
    assert moved > 0.9
    assert all(math.isfinite(s.metrics["loss"]) for s in steps)


def test_batch_plan_is_a_permutation_an_epoch() -> None:
    plan = batch_plan(7, 3, 2, seed=1)
    assert [len(b) for b in plan] == [3, 3, 1, 3, 3, 1]
    first, second = [i for b in plan[:3] for i in b], [i for b in plan[3:] for i in b]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert plan == batch_plan(7, 3, 2, seed=1) != batch_plan(7, 3, 2, seed=2)


def test_learning_rate_by_hand() -> None:
    """Ten steps, 20 % warm-up: 1/2, 1, then 8 steps of progress 0, 1/8 … 7/8; cosine at 4/8: ½(1 + cos π/2) = ½."""
    linear = [lr_factor(s, 10, "linear", 0.2) for s in range(1, 11)]
    assert linear == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert [lr_factor(s, 10, "constant", 0.2) for s in range(1, 11)] == [0.5] + [1.0] * 9
    assert lr_factor(7, 10, "cosine", 0.2) == pytest.approx(0.5)
    assert lr_factor(10, 10, "cosine", 0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert lr_factor(1, 1, "cosine", 0.03) == 1.0
    assert [lr_factor(s, 4, "cosine", 1.0) for s in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("stop_at", [1, 4, *(pytest.param(n, marks=pytest.mark.thorough) for n in (2, 3, 5))])
def test_a_run_stopped_at_any_step_ends_with_the_same_weights(trainer: Trainer, tmp_path: Path, stop_at: int) -> None:
    """Six steps; bit for bit, also where the resumed run evicts, recomputes and batches images otherwise."""
    whole = trainer.run(tmp_path / "whole")
    expected = trainer.weights()
    first = trainer.run(tmp_path / "out", stop_at=stop_at)
    assert [s.step for s in first] == list(range(1, stop_at + 1))
    assert first[-1].checkpoint == verify_manifest(tmp_path / "out" / "checkpoints" / f"step-{stop_at}")
    rest = trainer.run(tmp_path / "out")
    assert [s.step for s in rest] == list(range(stop_at + 1, 7))
    assert same(trainer.weights(), expected)
    assert [s.metrics for s in first + rest] == [s.metrics for s in whole]


def test_a_killed_run_resumes_from_its_last_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    """Checkpoints after steps 2, 4, 6; a kill after step 5 (nothing written) goes on with step 5."""
    trainer.run(tmp_path / "whole")
    expected = trainer.weights()
    vlm = load_model(trainer.model, device="cpu")
    add_lora(vlm, CONFIG, seed=0)
    (tmp_path / "out").mkdir()
    steps = optimize(vlm, trainer.preferences, trainer.open_image, CONFIG, tmp_path / "out", seed=0)
    for _ in range(5):
        next(steps)
    del steps
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-4"]
    assert [s.step for s in trainer.run(tmp_path / "out")] == [5, 6]
    assert same(trainer.weights(), expected)
    assert trainer.run(tmp_path / "out") == []  # all done: the weights come from the checkpoint
    assert same(trainer.weights(), expected)


@pytest.mark.parametrize(
    "file",
    [
        "optimizer.safetensors",
        *(pytest.param(f, marks=pytest.mark.thorough) for f in ("adapter.safetensors", "state.json", "SHA256SUMS")),
    ],
)
def test_a_damaged_checkpoint_is_not_used(trainer: Trainer, tmp_path: Path, file: str) -> None:
    trainer.run(tmp_path / "whole")
    expected = trainer.weights()
    out = tmp_path / "out"
    trainer.run(out, stop_at=2)
    shutil.copytree(out / "checkpoints" / "step-2", tmp_path / "kept")
    trainer.run(out, stop_at=1)  # resumes, stops after step 3
    damaged = out / "checkpoints" / "step-3" / file
    damaged.write_bytes(damaged.read_bytes()[:-20] + b"x" * 20)
    assert trainer.run(out)[0].step == 1
    assert same(trainer.weights(), expected)
    shutil.rmtree(out / "checkpoints")
    trainer.run(out, stop_at=3)
    damaged.write_bytes(damaged.read_bytes()[:-20] + b"x" * 20)
    shutil.copytree(tmp_path / "kept", out / "checkpoints" / "step-2")
    assert trainer.run(out)[0].step == 3  # from the older one
    assert same(trainer.weights(), expected)


def test_a_checkpoint_of_another_plan_is_not_used(trainer: Trainer, tmp_path: Path) -> None:
    trainer.run(tmp_path / "out", stop_at=3)
    assert trainer.run(tmp_path / "out", replace(CONFIG, epochs=3))[0].step == 1


def test_reference_log_probabilities_come_from_the_base(trainer: Trainer, tmp_path: Path) -> None:
    """Also when the adapter has been trained already and is not at its start, where it says what the base says."""
    trainer.run(tmp_path / "fresh")
    assert any(w.any() for n, w in trainer.weights().items() if "lora_B" in n)
    (tmp_path / "trained").mkdir()
    data = (trainer.preferences, trainer.open_image, CONFIG, tmp_path / "trained")
    step = next(optimize(trainer.vlm, *data, seed=0))
    fresh, trained = (json.loads((tmp_path / n / "reference.json").read_text()) for n in ("fresh", "trained"))
    assert trained == fresh
    assert abs(step.metrics["rewards/chosen"]) > 1e-3


def without_levels(preferences: Sequence[PreferenceRecord], keep: int = 0) -> list[PreferenceRecord]:
    return [replace(p, levels=p.levels[:keep]) for p in preferences]


def test_no_level_anywhere_is_a_clear_error(trainer: Trainer, tmp_path: Path) -> None:
    trainer.preferences = without_levels(trainer.preferences)
    with pytest.raises(ValueError, match="no record has a usable level"):
        trainer.run(tmp_path / "out", replace(CONFIG, anchor=0.0))
    assert len(trainer.run(tmp_path / "sft", replace(CONFIG, objective="sft"))) == 6
    assert len(trainer.run(tmp_path / "anchored", CONFIG)) == 6  # the supervised term teaches without levels


def test_implicit_with_one_level_a_record_is_a_clear_error(trainer: Trainer, tmp_path: Path) -> None:
    trainer.preferences = without_levels(trainer.preferences, keep=1)
    with pytest.raises(ValueError, match="two levels"):
        trainer.run(tmp_path / "out", replace(CONFIG, anchor=0.0, objective="implicit"))


@pytest.mark.parametrize("objective", ["explicit", "implicit", "dpo", "listwise", "lipo"])
def test_every_objective_trains_on_records_of_mixed_levels(trainer: Trainer, tmp_path: Path, objective: str) -> None:
    config = replace(CONFIG, objective=objective, anchor=0.0, guard=5.0, epochs=1, batch_size=1)
    steps = trainer.run(tmp_path / "out", config)
    assert len(steps) == 6  # the record without levels is left out
    assert all(math.isfinite(s.metrics["loss"]) for s in steps)


@pytest.mark.parametrize(("objective", "read"), [("sft", 1), ("dpo", 2), ("hscr", 4)])
def test_only_the_answers_that_the_objective_reads_are_scored(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, read: int
) -> None:
    """The richest record has three levels: supervision scores y_w alone, DPO one pair."""
    stock, scored = hscr.optimize.answer_logits, []

    def counted(vlm: VLM, prompts: Any, answers: Any, **route: bool) -> Any:
        scored.extend(len(group) for group in answers)
        return stock(vlm, prompts, answers, **route)

    monkeypatch.setattr(hscr.optimize, "answer_logits", counted)
    trainer.run(tmp_path / "out", replace(CONFIG, objective=objective, epochs=1))
    assert max(scored) == read


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_no_checkpoint_holds_it(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    stock, calls = hscr.optimize.record_loss, [0]

    def broken(*args: Any) -> Any:
        calls[0] += 1
        loss, metrics = stock(*args)
        return (loss * value, metrics | {"loss": value}) if calls[0] > 9 else (loss, metrics)

    monkeypatch.setattr(hscr.optimize, "record_loss", broken)
    with pytest.raises(ArithmeticError, match=f"loss is {value} at step 4; a smaller lr or gamma may help"):
        trainer.run(tmp_path / "out")
    assert all(w.isfinite().all() for w in trainer.weights().values())
    assert (tmp_path / "out" / "checkpoints" / "step-2").is_dir()


def test_an_infinite_gradient_of_a_finite_loss_stops_the_run(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping multiplies it by 1/inf = 0, and inf · 0 is NaN: the weights would be lost, on the last step unseen."""
    stock = hscr.optimize.record_loss

    def steep(*args: Any) -> Any:
        loss, metrics = stock(*args)
        loss.register_hook(lambda g: g * float("inf"))
        return loss, metrics

    monkeypatch.setattr(hscr.optimize, "record_loss", steep)
    with pytest.raises(ArithmeticError, match="grad_norm is"):
        trainer.run(tmp_path / "out", replace(CONFIG, epochs=1, batch_size=16))
    assert all(w.isfinite().all() for w in trainer.weights().values())


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """A device that holds `tokens` tokens of a forward, padding included; what it was asked for."""
    stock, asked = hscr.optimize.answer_logits, []

    def limited(vlm: VLM, prompts: Any, answers: Any, **route: bool) -> Any:
        width = max(len(p.input_ids) + sum(map(len, a)) for p, a in zip(prompts, answers, strict=True))
        asked.append(len(prompts) * width)
        if asked[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(vlm, prompts, answers, **route)

    monkeypatch.setattr(hscr.optimize, "answer_logits", limited)
    return asked


def test_out_of_memory_halves_the_budget_and_repeats_the_step(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights (to rounding) as with that budget from the start, and a resumed run starts with the small one."""
    config = replace(CONFIG, batch_size=7, token_budget=800)
    small = trainer.run(tmp_path / "small", replace(config, token_budget=200))
    expected = trainer.weights()
    asked = out_of_memory_above(monkeypatch, 250)
    steps = trainer.run(tmp_path / "out", config, stop_at=1)
    assert (small[0].token_budget, steps[0].token_budget) == (200, 200)
    assert max(asked) > 250
    asked.clear()
    steps += trainer.run(tmp_path / "out", config)
    assert max(asked) <= 250
    assert same(trainer.weights(), expected)
    assert [s.metrics for s in steps] == [s.metrics for s in small]


def test_out_of_memory_in_the_middle_of_a_step_leaves_no_half_gradient(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference fits; the third forward of the first step does not, once."""
    config = replace(CONFIG, batch_size=7, token_budget=200, epochs=1)
    whole = trainer.run(tmp_path / "whole", replace(config, token_budget=100))
    stock, calls = hscr.optimize.answer_logits, [0]

    def failing(vlm: VLM, prompts: Any, answers: Any, **route: bool) -> Any:
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 3:
            calls[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(vlm, prompts, answers, **route)

    monkeypatch.setattr(hscr.optimize, "answer_logits", failing)
    (step,) = trainer.run(tmp_path / "out", config)
    assert step.token_budget == 100
    assert step.metrics["grad_norm"] == pytest.approx(whole[0].metrics["grad_norm"], rel=1e-4)
    assert step.metrics["loss"] == pytest.approx(whole[0].metrics["loss"], rel=1e-5)


def test_gradient_checkpointing_gives_the_same_weights_in_less_memory(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in bytes that autograd keeps for the backward pass of a step, beside a decoder that is not plain: what training keeps of a
    plain one (hscr/adapted_layer.py) is little more than checkpoints."""
    monkeypatch.setattr(AdaptedDecoder, "of", lambda vlm: None)
    kept = [0, 0]
    weights = []
    for number, checkpointing in enumerate((False, True)):
        config = replace(CONFIG, epochs=1, gradient_checkpointing=checkpointing)

        def pack(tensor: Tensor, number: int = number) -> Tensor:
            kept[number] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            trainer.run(tmp_path / str(number), config)
        weights.append(trainer.weights())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    assert kept[1] < kept[0] / 2
