"""Run a reproduction: data, grid of learning rates, every arm at every seed, tables. Resumable: a finished cell is a file.

Cells are independent, so they run in processes of one thread each; one process with two threads is slower on models as small as these.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from hscr import __version__
from hscr.demo import data
from hscr.records import VQARecord, read_records
from hscr.reproduction.measures import mean, measures
from hscr.reproduction.plan import ENTRY_SPLITS, Cell, Scale, generations, grid_cells, table_cells

Progress = Callable[[str, int, int], None]  # (phase, done, total)
Rates = dict[tuple[str, str], float]  # (base, arm) -> learning rate


def reproduce(out: Path, scale: Scale, processes: int, progress: Progress) -> dict[str, Any]:
    """Run all cells that OUT does not hold yet and write reproduction.json, .md and .html there; returns what the first holds.

    Raises ValueError where the demo base is not whole. What is interrupted goes on with the same command.
    """
    from hscr.reproduction.cell import MODELS, Place, run_base
    from hscr.reproduction.table import summarize, write

    for folder in ("cells", "preferences"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    data.build(out / "data", 0, progress, sizes=_sizes(scale))
    for name in scale.arms:
        if not (MODELS[name] / "model.safetensors").is_file():
            raise ValueError(f"{MODELS[name]}: no model there; `hscr demo-model --rebuild` makes it")
    place = Place(out, {base: _lineage(MODELS[base]) for base in scale.arms})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_start) as pool:
        try:
            grid = grid_cells(scale)
            _cells(pool, place, grid, progress, "grid")
            valid = _records(out, "valid", scale.valid)
            tried = [(cell, _read(place.cell(cell))) for cell in grid]
            rates = chosen_rates(tried, valid)
            cells = table_cells(scale, rates)
            bases = [partial(run_base, place, base, scale.asked) for base in scale.arms]
            _finish(pool, bases, progress, "bases")
            _cells(pool, place, cells, progress, "cells")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = [(cell, _read(place.cell(cell))) for cell in cells]
    base_results = {base: _read(place.base(base, scale.asked)) for base in scale.arms}
    records = {split: _records(out, split, n) for split, n in scale.asked.items()}
    summary = summarize(scale, results, base_results, tried, records)
    write(out, summary)
    return summary


def chosen_rates(tried: Iterable[tuple[Cell, dict[str, Any]]], records: Sequence[VQARecord]) -> Rates:
    """Each arm's best learning rate: most right answers on the validation part, of equals the smaller. ValueError where all diverged."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for cell, result in tried:
        key = (cell.base, cell.arm.name)
        if "diverged" not in result:
            value = (mean(measures(records, result["valid"])["right"]), -cell.lr)
            best[key] = max(best.get(key, value), value)
    lost = sorted({cell.arm.name for cell, _ in tried if (cell.base, cell.arm.name) not in best})
    if lost:
        raise ValueError(f"learning rates: every one diverged for {', '.join(lost)}")
    return {key: -lr for key, (_, lr) in best.items()}


def _cells(pool: Executor, place: Any, cells: list[Cell], progress: Progress, phase: str) -> None:
    """Preferences first, then the cells that read them."""
    from hscr.reproduction.cell import make_preferences, run_cell

    missing = [cell for cell in cells if not place.cell(cell).is_file()]
    reads = generations(cells)  # of all: which data are shared must not depend on what is done already
    wanted = sorted({id(g): g for c, g in reads.items() if c in set(missing)}.values(), key=lambda g: -g.n)
    _finish(pool, [partial(make_preferences, place, g) for g in wanted], progress, f"{phase}: preferences")
    tasks = [partial(run_cell, place, cell, reads.get(cell)) for cell in missing]
    _finish(pool, tasks, progress, phase, done=len(cells) - len(missing))


def _finish(
    pool: Executor, tasks: Sequence[Callable[[], None]], progress: Progress, phase: str, *, done: int = 0
) -> None:
    futures: list[Future[None]] = [pool.submit(task) for task in tasks]
    total = done + len(futures)
    if total:
        progress(phase, done, total)
    for n, future in enumerate(as_completed(futures), done + 1):
        future.result()
        progress(phase, n, total)


def _sizes(scale: Scale) -> dict[str, int]:
    """Records of each split: enough entries for the largest cell of each base."""
    sizes = dict(scale.asked)
    for base, arms in scale.arms.items():
        most = max((arm.entries or scale.entries) * (2 if arm.selected else 1) for arm in arms)
        sizes[ENTRY_SPLITS[base]] = round(1.5 * most)  # seeds draw different entries
    return sizes


def _lineage(model: Path) -> dict[str, str]:
    from hscr.model import folder_digest

    return {"model": folder_digest(model), "data": data.recipe_digest(), "hscr": __version__}


def _records(out: Path, split: str, n: int) -> list[VQARecord]:
    return read_records(out / "data" / split)[0][:n]


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def _start() -> None:
    """What every process of the pool does first: one thread, no bars of its own, and an end when the parent's comes."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft asks transformers
    parent = multiprocessing.parent_process()
    if parent is not None:  # killed, it leaves its pool at work otherwise

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
