"""The plan of a run: it follows the model's shapes, the data and the settings, says what fits, and is near what happens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.llava import Shape, save_data, save_llava
from hscr.adapted_decoder import AdaptedDecoder, kept_bytes
from hscr.cli import app
from hscr.config import AlignConfig, preset
from hscr.data_set import DataSet
from hscr.model import add_lora, encode_answer, encode_prompts, load_model
from hscr.plan import SHARE, Plan, _Counted, _lighter, estimate, skeleton
from hscr.preferences import generate
from hscr.probe import Probe
from hscr.records import to_json
from hscr.similarity import load_similarity
from hscr.trees import Prefixes, Trees
from tests.hscr.tiny_families import NAMES, save_tiny

CPU = torch.device("cpu")
SHAPE = Shape(patches=6, layers=3, hidden=64, heads=4, tower_layers=2, tower_hidden=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("plan") / "model", SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("plan") / "data"
    save_data(folder, 6, 12, 3)
    (folder / "preferences.jsonl").unlink()
    return DataSet(folder)


def planned(model: Path, data: DataSet, config: AlignConfig | None = None, available: int | None = None) -> Plan:
    return estimate(
        skeleton(str(model)),
        data,
        config or preset("recommended"),
        data,
        device=CPU,
        dtype=torch.float32,
        available=available,
    )


def test_without_weights_it_counts_what_the_loaded_model_has(model: Path, data: DataSet) -> None:
    plan, loaded = planned(model, data), estimate(load_model(model, device="cpu"), data, preset("recommended"), data)
    assert (plan.visual_tokens, plan.prompt_tokens, plan.answer_tokens) == (
        loaded.visual_tokens,
        loaded.prompt_tokens,
        loaded.answer_tokens,
    )
    assert plan.visual_tokens == SHAPE.patches**2
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    assert plan.weights_bytes == loaded.weights_bytes == pytest.approx(weights, rel=0.05)
    assert [(s.stage, s.units) for s in plan.stages] == [("generating", 6), ("optimizing", 6), ("evaluating", 36)]


def test_no_weight_is_read(model: Path, data: DataSet) -> None:
    assert all(p.is_meta for p in skeleton(str(model)).base.parameters())


@pytest.mark.thorough
@pytest.mark.parametrize("family", NAMES)
def test_every_family_can_be_planned(family: str, tmp_path: Path, data: DataSet) -> None:
    plan = planned(save_tiny(family, tmp_path / family), data)
    assert plan.fits
    assert all(s.seconds > 0 and s.bytes > plan.weights_bytes for s in plan.stages)


def test_what_a_layer_keeps_for_its_backward_pass_is_what_the_model_keeps(model: Path) -> None:
    """Bytes that autograd saves in the whole decoder, over layers and tokens, against the probe's two random layers.

    The probe has the final norm for two layers, the model for three: it counts a little too much.
    """
    from torch.autograd.graph import saved_tensors_hooks

    vlm, config = load_model(model, device="cpu"), preset("recommended").optimization
    probe = Probe(vlm, config, CPU, torch.float32)
    add_lora(vlm, config, seed=0)
    weights = {t.untyped_storage().data_ptr() for t in (*vlm.model.parameters(), *vlm.model.buffers())}
    held: dict[int, int] = {}
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.arange(4, 164)[None]
    with saved_tensors_hooks(note, lambda t: t):
        vlm.model(input_ids=ids, logits_to_keep=1, use_cache=False)
    assert probe.saved_bytes(160) * 160 * SHAPE.layers == pytest.approx(sum(held.values()), rel=0.2)


def test_what_a_layer_keeps_by_hand_is_what_it_saves(model: Path, data: DataSet) -> None:
    """Bytes that the hand-made pass saves with three layers, less those with two: of a layer that is not the last."""
    from torch.autograd.graph import saved_tensors_hooks

    vlm = load_model(model, device="cpu")
    add_lora(vlm, preset("recommended").optimization, seed=0)
    decoder = AdaptedDecoder.of(vlm)
    assert decoder is not None
    weights = {t.untyped_storage().data_ptr() for t in (*vlm.model.parameters(), *vlm.model.buffers())}
    records = data.records[:2]
    prompts = encode_prompts(vlm, [data.open_images(r) for r in records], [r.question for r in records])
    answers = [[encode_answer(vlm, r.question, r.answer)] * 3 for r in records]
    tokens = sum(len(p.input_ids) - 1 for p in prompts) + sum(len(a) for own in answers for a in own)
    totals = []
    for layers in (decoder.layers, decoder.layers[1:]):
        held: dict[int, Tensor] = {}

        def note(tensor: Tensor, held: dict[int, Tensor] = held) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        decoder.layers = layers
        with saved_tensors_hooks(note, lambda t: t):
            decoder.answer_logits(prompts, answers)
        totals.append(sum(t.untyped_storage().nbytes() for t in held.values()))
    assert kept_bytes(vlm) == pytest.approx((totals[0] - totals[1]) / tokens, rel=0.01)


@pytest.mark.usefixtures("steady")
def test_on_a_cpu_no_setting_is_advised_that_takes_nothing_off(model: Path, data: DataSet) -> None:
    """A forward has 1,024 tokens at most there, and checkpointing would leave the pass that keeps least."""
    counted = _Counted(skeleton(str(model)), data, preset("recommended"), None, CPU, torch.float32)
    budgets = {"token_budget": 8192}
    config = AlignConfig.from_dict({"optimization": budgets, "preference": budgets})
    first, *others = _lighter(config, counted)
    assert first == {"optimization.token_budget": 512, "preference.token_budget": 4096}
    names = {name for change in others for name in change}
    assert names == {"optimization.token_budget", "preference.token_budget"}
    bfloat16 = _Counted(skeleton(str(model)), data, preset("recommended"), None, CPU, torch.bfloat16)
    assert _lighter(config, bfloat16)[-1] == {"optimization.gradient_checkpointing": True}
    assert bfloat16.stages(config)[1].bytes > counted.stages(config)[1].bytes


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose times follow the tokens exactly: what a plan makes of timings, not the timings, is looked at."""
    monkeypatch.setattr(Probe, "forward_s", lambda self, rows, tokens: 1e-6 * rows * tokens)
    monkeypatch.setattr(Probe, "step_s", lambda self, rows, tokens: 2e-6 * rows * tokens)
    monkeypatch.setattr(Probe, "decode_s", lambda self, rows, held: 1e-6 * rows)


@pytest.mark.usefixtures("steady")
def test_more_epochs_and_conditions_take_longer(model: Path, data: DataSet) -> None:
    def optimizing(**optimization: object) -> float:
        return planned(model, data, AlignConfig.from_dict({"optimization": optimization})).stages[1].seconds

    # A forward for the reference and a step of two forwards' cost an epoch: 41 to 5.
    assert optimizing(epochs=20) == pytest.approx(41 / 5 * optimizing(epochs=2), rel=0.01)
    blank = AlignConfig.from_dict({"evaluation": {"counterfactual": False}})
    assert planned(model, data).stages[2].seconds > 1.5 * planned(model, data, blank).stages[2].seconds


@pytest.mark.usefixtures("steady")
def test_memory_of_generation_is_near_what_its_caches_hold(
    model: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers as long as the references. Counted: keys and values that are kept of both branches, and those of the answers' trees."""
    config = AlignConfig.from_dict(
        {"preference": {"continuation": "redecode", "max_new_tokens": 8, "similarity": "token_f1"}}
    )
    kept, grown = [0], [0]
    put, append = Prefixes.put, Trees.append

    def noting_put(self: Prefixes, prompts: Any, tails: Any, cache: Any) -> None:
        put(self, prompts, tails, cache)
        kept[0] += sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)

    def noting_append(self: Trees, chosen: Any) -> None:
        append(self, chosen)
        layers: list[Any] = self.cache.layers
        grown[0] = max(grown[0], sum(t.untyped_storage().nbytes() for x in layers for t in (x.keys, x.values)))

    monkeypatch.setattr(Prefixes, "put", noting_put)
    monkeypatch.setattr(Trees, "append", noting_append)
    vlm = load_model(model, device="cpu")
    list(generate(vlm, data.records, data.open_images, config.preference, load_similarity("token_f1")))
    plan = planned(model, data, config)
    assert grown[0] > 0
    assert kept[0] + grown[0] < 1.2 * (plan.stages[0].bytes - plan.weights_bytes) < 4 * (kept[0] + grown[0])


@pytest.mark.thorough
def test_too_small_a_device_gets_settings_that_fit_it(model: Path, data: DataSet) -> None:
    few = AlignConfig.from_dict({"evaluation": {"batch_size": 4}})  # an evaluation is not what is made smaller
    whole = planned(model, data, few)
    assert whole.fits
    assert whole.settings == {}
    tight = int(whole.weights_bytes + 0.5 * (whole.bytes - whole.weights_bytes))
    plan = planned(model, data, few, available=tight)
    assert not plan.fits
    assert plan.settings
    config = few.to_dict()
    for name, value in plan.settings.items():
        section, key = name.split(".")
        config[section][key] = value
    assert planned(model, data, AlignConfig.from_dict(config), available=tight).fits
    hopeless = planned(model, data, few, available=plan.weights_bytes // 2)
    assert (hopeless.fits, hopeless.settings) == (False, {})


@pytest.mark.usefixtures("steady")
def test_an_evaluation_is_planned_alone_and_fits_with_smaller_batches(model: Path, data: DataSet) -> None:
    def plan(available: int | None = None, **evaluation: object) -> Plan:
        config = AlignConfig.from_dict({"evaluation": evaluation})
        vlm = skeleton(str(model))
        return estimate(vlm, data, config, device=CPU, dtype=torch.float32, available=available, evaluates=True)

    whole, single = plan(batch_size=64), plan(batch_size=1)
    assert [(s.stage, s.units) for s in whole.stages] == [("evaluating", 36)]
    assert whole.bytes > single.bytes > whole.weights_bytes
    tight = plan(available=int((whole.bytes + single.bytes) / 2 / SHARE), batch_size=64)
    assert (tight.fits, tight.settings) == (False, {"evaluation.batch_size": 32})
    assert plan(available=int((whole.bytes + single.bytes) / 2 / SHARE), batch_size=32).fits
    assert plan(available=single.weights_bytes // 2).settings == {}


@pytest.mark.usefixtures("steady")
def test_checkpointing_takes_less_memory_and_more_time(model: Path, data: DataSet) -> None:
    plain = planned(model, data).stages[1]
    light = planned(model, data, AlignConfig.from_dict({"optimization": {"gradient_checkpointing": True}})).stages[1]
    assert light.bytes < plain.bytes
    assert light.seconds > plain.seconds


def test_plan_command_and_the_report_beside_what_happened(
    model: Path, tmp_path: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hscr plan` prints it; `hscr align` writes plan.json first, costs.json as it goes, and both are in the report."""
    run = CliRunner()
    asked = run.invoke(app, ["plan", str(data.folder), "-m", str(model), "--json"])
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout.splitlines()[-1])["fits"]
    twice = shutil.copytree(data.folder, tmp_path / "twice")
    with (twice / "records.jsonl").open("a") as file:
        file.write(json.dumps(to_json(replace(data.records[0], id="again"))) + "\n")
    shown = run.invoke(app, ["plan", str(twice), "-m", str(model), "--memory", "0.001"])
    assert "generating" in shown.stdout
    assert "larger device" in shown.stdout
    assert "2 records answer 1 of the questions more than once in the same words" in shown.output
    out = tmp_path / "run"
    done = run.invoke(
        app, ["align", str(data.folder), "-m", str(model), "--out", str(out), "-s", "preference.similarity=token_f1"]
    )
    assert done.exit_code == 0, done.output
    plan = json.loads((out / "plan.json").read_text())
    costs = {c["stage"]: c for c in json.loads((out / "report.json").read_text())["costs"]}
    assert costs.keys() == {"generating", "optimizing"}  # no evaluation was asked for
    assert costs["generating"]["units"] == 6
    assert costs["generating"]["planned_seconds"] == plan["stages"][0]["seconds"]
    assert all(c["seconds"] > 0 and c["bytes"] > 2**20 for c in costs.values())
    assert "What it took" in (out / "report.html").read_text()
