"""Make the demo base model again: one function, three stages, the folder that ships and its card.

Stage 1 trains the tower densely (tower.py), stage 2 a decoder that reads it and stage 3 its habits (decoder.py);
measure.py says what came out. A model that can read the slice and answers from habit is what alignment is for.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from hscr.demo import data
from hscr.demo.card import model_card
from hscr.demo.decoder import draw_facts, draw_questions, train_balanced, train_habits
from hscr.demo.language_model import make_model, make_processor, make_tokenizer
from hscr.demo.measure import measure
from hscr.demo.tower import TOWER_CONFIG, Pool, encode_pool, render_pool, train_tower

MODEL_FOLDER = Path(__file__).parent / "model"
BEFORE_HABITS = (
    "before_habits"  # folder in the model's: what stage 2 left, a base that reads the slice as well as it can
)
Progress = Callable[[str, int, int, dict[str, float]], None]  # (stage, done, total, metrics)


@dataclass(frozen=True)
class Recipe:
    """Sizes of the stages. How the weights that ship were made is in their card (model/README.md)."""

    pool: int = 14_000  # rendered slices, balanced
    tower_steps: int = 4200
    decoder_steps: int = 3000
    decoder_lr: float = 1.5e-3
    habit_steps: int = 600
    habit_lr: float = 7e-4
    measured: dict[str, int] = field(default_factory=lambda: {"valid": 300, "test": 600})  # records by split


def rebuild(out: Path, seed: int = 0, progress: Progress | None = None, recipe: Recipe | None = None) -> dict[str, Any]:
    """Train the demo base from nothing and write the Hugging Face folder OUT; returns what training.json holds.

    OUT/before_habits is the model as it was before stage 3: the reproduction's well-trained base (hscr/reproduction/).

    Deterministic by seed on one kind of CPU: always two threads (their number changes the order of sums), bfloat16
    where the CPU has it. Files in OUT are replaced only once the new ones are whole.
    """
    recipe = recipe or Recipe()
    report = progress or (lambda stage, done, total, metrics: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return _rebuild(out, Path(scratch), seed, report, recipe)
    finally:
        torch.set_num_threads(threads)


def _rebuild(out: Path, scratch: Path, seed: int, report: Progress, recipe: Recipe) -> dict[str, Any]:
    log: dict[str, list[Any]] = {"tower": [], "decoder": [], "habits": []}
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def lap(stage: str) -> None:
        seconds[stage] = round(time.monotonic() - started - sum(seconds.values()), 1)

    pool: Pool | None = None
    for item in render_pool(recipe.pool, seed):
        if isinstance(item, Pool):
            pool = item
        else:
            report("render", *item, {})
    assert pool is not None
    lap("render")

    torch.manual_seed(seed)
    tower = CLIPVisionModel(TOWER_CONFIG)
    for step, metrics in train_tower(tower, pool, recipe.tower_steps, seed):
        report("tower", step, recipe.tower_steps, metrics)
        log["tower"].append({"step": step} | {k: round(v, 4) for k, v in metrics.items()})
    lap("tower")

    rng = np.random.default_rng([seed, 200])
    asked = [one for _ in range(4000) for one in draw_questions(rng, draw_facts(rng), 3)]
    tokenizer = make_tokenizer(text for one in asked for text in (one.question, one.answer))
    model = make_model(tokenizer, tower, seed)
    features = encode_pool(model.model.vision_tower, pool.images, fast=True)
    for step, metrics in train_balanced(
        model, tokenizer, pool, features, recipe.decoder_steps, seed, lr=recipe.decoder_lr
    ):
        report("decoder", step, recipe.decoder_steps, metrics)
        log["decoder"].append({"step": step} | metrics)
    lap("decoder")

    folders = data.build(scratch / "data", seed, sizes=recipe.measured)
    save(model, tokenizer, scratch / "model" / BEFORE_HABITS)
    report("measure", 0, 2, {})
    before = {name: measure(model, tokenizer, folder, betas=()) for name, folder in folders.items()}
    report("measure", 1, 2, {})
    lap("measure")
    for step, metrics in train_habits(
        model, tokenizer, data.PRETRAIN_HABITS, recipe.habit_steps, seed, lr=recipe.habit_lr
    ):
        report("habits", step, recipe.habit_steps, metrics)
        log["habits"].append({"step": step} | metrics)
    lap("habits")
    model.half().float()  # measure what ships: fp16 weights run in fp32
    after = {name: measure(model, tokenizer, folder) for name, folder in folders.items()}
    report("measure", 2, 2, {})
    lap("measure after")

    save(model, tokenizer, scratch / "model")
    training = {
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "data_recipe": data.recipe_digest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": "sha256:" + hashlib.sha256((scratch / "model/model.safetensors").read_bytes()).hexdigest(),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "tokenizers", "numpy")},
        "machine": {"python": platform.python_version(), "arch": platform.machine(), "bf16": _bf16()},
        "seconds": seconds,
        "after_balanced_stage": before,
        "measured": after,
        "log": log,
    }
    (scratch / "model/training.json").write_text(json.dumps(training, indent=1) + "\n")
    (scratch / "model/README.md").write_text(model_card(training))
    for folder in (BEFORE_HABITS, "."):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for file in sorted(path for path in (scratch / "model" / folder).iterdir() if path.is_file()):
            partial = out / folder / (file.name + ".tmp")
            shutil.copyfile(file, partial)
            partial.replace(out / folder / file.name)
    return training


def save(model: LlavaForConditionalGeneration, tokenizer: Any, folder: Path) -> None:
    """Write the folder that stock `from_pretrained` loads: fp16 weights, a configuration that asks for fp32."""
    make_processor(tokenizer).save_pretrained(folder)
    copy.deepcopy(model).half().save_pretrained(folder)  # a copy: training goes on in full precision
    config = json.loads((folder / "config.json").read_text())
    _ask_for_float32(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _ask_for_float32(config: dict[str, Any]) -> None:
    """fp16 halves the file; running in it on a CPU would only be slow and overflow-prone."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = "float32"
        elif isinstance(value, dict):
            _ask_for_float32(value)


def _bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
