"""One cell of the reproduction, in a process of its own: preferences generated, an adapter trained, the questions asked.

Uses the functions that `hscr align` uses. What was said is stored, not what it scored, so every table can be computed again. Each cell
loads the base anew (milliseconds) and shares only image features with the cells before it in its process.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hscr.answer import Answerer
from hscr.artifacts import atomic_write, json_digest
from hscr.config import EvaluationConfig
from hscr.data_set import DataSet
from hscr.demo.base import BEFORE_HABITS, MODEL_FOLDER
from hscr.evaluate import evaluate
from hscr.feature_cache import FeatureCache
from hscr.model import VLM, add_lora, encode_answer, encode_prompts, load_model
from hscr.optimize import optimize
from hscr.packing import packed_logits, token_logprobs
from hscr.predictions import Prediction
from hscr.preferences import generate
from hscr.records import PreferenceRecord, VQARecord, read_preferences, write_jsonl
from hscr.reproduction.measures import probed
from hscr.reproduction.plan import ENTRY_SPLITS, Cell, Generation
from hscr.similarity import load_similarity

MODELS = {"habit": MODEL_FOLDER, "well_trained": MODEL_FOLDER / BEFORE_HABITS}
BATCH = 100  # questions decoded together


@dataclass(frozen=True)
class Place:
    """Where a reproduction lives: OUT/data, OUT/preferences and OUT/cells, and what its results depend on besides the plan."""

    out: Path
    lineage: dict[str, dict[str, str]]  # by base

    def cell(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.key(self.lineage[cell.base])}.json"

    def base(self, base: str, asked: dict[str, int]) -> Path:
        return self.out / "cells" / f"base-{json_digest([asked, self.lineage[base]])[7:31]}.json"

    def preferences(self, generation: Generation) -> Path:
        return self.out / "preferences" / f"{generation.key(self.lineage[generation.base])}.jsonl"


def make_preferences(place: Place, generation: Generation) -> None:
    """Write the preference records of a generation, whole or not at all; nothing where they are there."""
    path = place.preferences(generation)
    if path.is_file():
        return
    vlm, data = _model(generation.base), _data(place.out, ENTRY_SPLITS[generation.base])
    entries = entries_of(data.records, generation.seed, generation.n)
    config = generation.config.preference
    made = generate(vlm, entries, data.open_images, config, _similarity(config.similarity), generation.seed)
    partial = path.with_suffix(".tmp")
    write_jsonl(partial, list(made))
    partial.replace(path)


def run_base(place: Place, base: str, asked: dict[str, int]) -> None:
    """What the base itself says: the row that every gain is measured from."""
    path = place.base(base, asked)
    if not path.is_file():
        atomic_write(path, json.dumps({"base": base, "arm": "base"} | _asked(place, _model(base), asked)).encode())


def run_cell(place: Place, cell: Cell, generation: Generation | None) -> None:
    """Train one arm and store what it says; nothing where that is there."""
    path = place.cell(cell)
    if path.is_file():
        return
    started = time.monotonic()
    vlm, data = _model(cell.base), _data(place.out, ENTRY_SPLITS[cell.base])
    preferences = _preferences(place, cell, generation, data)
    config = cell.config
    add_lora(vlm, config.optimization, cell.seed)
    result: dict[str, Any] = {
        "base": cell.base,
        "arm": cell.arm.name,
        "seed": cell.seed,
        "config": config.to_dict(),
        "entries": len(preferences),
        "with_levels": sum(bool(p.levels) for p in preferences),
        "levels": sum(len(p.levels) for p in preferences),
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            steps = [
                step.metrics
                for step in optimize(
                    vlm, preferences, data.open_images, config.optimization, Path(folder), seed=cell.seed
                )
            ]
    except ArithmeticError as error:  # a learning rate that a loss does not survive is a result too
        atomic_write(path, json.dumps(result | {"diverged": str(error)}).encode())
        return
    result |= {"steps": len(steps), "last": steps[-1], "train_seconds": time.monotonic() - started}
    vlm.model = vlm.model.merge_and_unload()  # float32: the same answers in half the time
    result |= _asked(place, vlm, cell.asked)
    atomic_write(path, json.dumps(result | {"seconds": time.monotonic() - started}).encode())


def entries_of(records: list[VQARecord], seed: int, n: int) -> list[VQARecord]:
    """The first n records in the seed's order. ValueError where there are not so many."""
    if n > len(records):
        raise ValueError(f"entries: {n} asked for, {len(records)} in the split")
    order = np.random.default_rng([seed, 77]).permutation(len(records))[:n]
    return [records[int(i)] for i in order]


def _preferences(place: Place, cell: Cell, generation: Generation | None, data: DataSet) -> list[PreferenceRecord]:
    """The cell's entries with their graded wrong answers; without any where the arm is told none."""
    if generation is None:
        return [PreferenceRecord(r, (), (), {}) for r in entries_of(data.records, cell.seed, cell.n_entries)]
    made = list(read_preferences(place.preferences(generation)))
    if cell.arm.selected:
        made = [p for p in made if p.levels]
    return made[: cell.n_entries]


def _asked(place: Place, vlm: VLM, asked: dict[str, int]) -> dict[str, Any]:
    """By split: the answers to its first questions, in order; on the first half of the test part also grounding, log π(y_w) and
    answers to another image (`measures.probed`)."""
    out: dict[str, Any] = {}
    for split, n in asked.items():
        data = _data(place.out, split)
        m = probed(n) if split == "test" else 0
        both, rest = (_said(vlm, data, data.records[:m], whole=True), _said(vlm, data, data.records[m:n], whole=False))
        out[split] = {"answers": [p.text for p in (*both[:m], *rest)]}
        if m:
            out[split] |= {
                "grounding": [p.grounding for p in both[:m]],
                "shuffled": [p.text for p in both[m:]],
                "logp": [round(v, 4) for v in _log_likelihood(vlm, data, data.records[:m])],
            }
    return out


def _said(vlm: VLM, data: DataSet, records: list[VQARecord], *, whole: bool) -> list[Prediction]:
    """Answers to the real images; `whole` with their grounding, and then the answers to the shuffled ones."""
    config = EvaluationConfig(batch_size=BATCH, max_new_tokens=40)
    conditions = ("real", "shuffled") if whole else ("real",)
    asked = evaluate(
        Answerer(vlm), records, data.open_images, {"": None}, config, conditions=conditions, grounding=whole
    )
    return [prediction for batch in asked for prediction in batch]


@torch.no_grad()
def _log_likelihood(vlm: VLM, data: DataSet, records: list[VQARecord]) -> list[float]:
    """log π(y_w | i, x) of each record's reference answer, summed over its tokens."""
    out: list[float] = []
    for start in range(0, len(records), BATCH):
        part = records[start : start + BATCH]
        prompts = encode_prompts(vlm, [data.open_images(r) for r in part], [r.question for r in part])
        answers = [[encode_answer(vlm, r.question, r.answer)] for r in part]
        logits = packed_logits(vlm, prompts, answers)
        out += [float(token_logprobs(row[0], ids[0]).sum()) for row, ids in zip(logits, answers, strict=True)]
    return out


def _model(base: str) -> VLM:
    features, tokens = _caches(base)
    return replace(load_model(MODELS[base], device="cpu"), features=features, tokens=tokens)


@cache
def _caches(base: str) -> tuple[FeatureCache, FeatureCache]:
    return FeatureCache(), FeatureCache()


@cache
def _data(out: Path, split: str) -> DataSet:
    return DataSet(out / "data" / split)


_similarity = cache(load_similarity)
