"""An evaluation over a run directory: predictions, tables and a report, resumable by whole batches.

`evaluate_version` is what `hscr evaluate` does and what the service's worker runs for POST /evaluate; `evaluation_run` is also a stage of
the recipe (hscr/align.py). What is measured and how is in hscr/evaluate.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hscr import __version__
from hscr.answer import Answerer
from hscr.artifacts import file_digest, json_digest, write_json
from hscr.config import AlignConfig
from hscr.data_set import DataSet
from hscr.evaluate import evaluate, plan
from hscr.events import Event, Rate, Result, Stage, Stopped
from hscr.leaks import check_evaluation, refuse_own_data
from hscr.model import VLM, require_images
from hscr.predictions import read_predictions
from hscr.run_dir import PartialFile, RunDir
from hscr.scoring import check_scorable
from hscr.static_steps import captured_events
from hscr.tables import summarize

WEIGHTS = "adapter_model.safetensors"


def evaluate_version(
    vlm: VLM,
    data: DataSet,
    out: Path,
    config: AlignConfig,
    *,
    adapter: Path | None = None,
    before: Path | None = None,
    learnt: Sequence[DataSet] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Evaluate the base, an adapter and the adapter `before` it (one that it may replace) on `data`; the last event is a Result.

    `learnt` are the data sets that the adapters were aligned on: pictures that are there too are refused (ValueError) unless the
    configuration allows it. Afterwards `out` holds config.json, predictions.jsonl, evaluation.json, report.html and report.json.
    """
    check_scorable(data.records)
    require_images(vlm, max(len(r.images) for r in data.records))
    run, stage, allow = RunDir(out), "evaluating", config.evaluation.allow_leak
    folders = {label: folder for label, folder in (("adapter", adapter), ("before", before)) if folder is not None}
    for folder in folders.values():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"adapter {folder.name!r}: has no {WEIGHTS}")
        if not allow:
            refuse_own_data(folder, data.digest)
    weights = {label: file_digest(folder / WEIGHTS) for label, folder in folders.items()}
    with run.locked():
        lineage = {"model": vlm.digest, "model_name": vlm.name, "data": data.digest, "hscr": __version__, **weights}
        write_json(out / "config.json", {**config.to_dict(), "lineage": lineage})
        for other in learnt:
            yield from check_evaluation(run, other, data, allow=allow)
        inputs = evaluation_inputs(vlm, data, weights, config)
        if run.is_done(stage, inputs):
            yield Stage(stage, "skipped")
        else:
            yield Stage(stage, "started")
            answerer = Answerer(vlm, dropout_ratio=config.preference.dropout_ratio)
            for label, folder in folders.items():
                answerer.load_adapter(label, folder)
            policies: dict[str, str | None] = {"base": None, **{label: label for label in folders}}
            yield from evaluation_run(answerer, data, policies, run, inputs, config, should_stop=should_stop)
            run.finish(stage, ["predictions.jsonl", "evaluation.json"])
            yield Stage(stage, "completed")
        yield from _reporting(run, data, inputs)
        yield Result(None, file_digest(out / "evaluation.json"), headline(out / "evaluation.json"))


def evaluation_inputs(vlm: VLM, data: DataSet, weights: dict[str, str], config: AlignConfig) -> str:
    """Digest of all that an evaluation's predictions and tables depend on; `weights` are digests of what is compared with the base."""
    ratio = config.preference.dropout_ratio  # of the grounding score
    return json_digest([weights, vlm.digest, data.digest, asdict(config.evaluation), config.seed, ratio])


def _reporting(run: RunDir, data: DataSet, evaluated: str) -> Iterator[Event]:
    from hscr.report import write_evaluation_report

    stage, inputs = "reporting", json_digest([evaluated, file_digest(run.path / "evaluation.json")])
    if run.is_done(stage, inputs):
        yield Stage(stage, "skipped")
        return
    yield Stage(stage, "started")
    run.start(stage, inputs)
    write_evaluation_report(run.path, data.records, data.open_image)
    run.finish(stage, ["report.html", "report.json"])
    yield Stage(stage, "completed")


def evaluation_run(
    answerer: Answerer,
    data: DataSet,
    policies: dict[str, str | None],
    run: RunDir,
    inputs: str,
    config: AlignConfig,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Evaluate policies into predictions.jsonl and evaluation.json of a run directory, resumable by whole batches."""
    stage = "evaluating"
    records = data.records[: config.evaluation.max_records]
    if not records:
        raise ValueError("evaluation.max_records: is 0, so there is nothing to evaluate")
    sizes = [len(rows) for _, _, rows in plan(len(records), list(policies), config.evaluation)]
    partial = PartialFile(run.path / "predictions.partial.jsonl", sizes, resume=run.start(stage, inputs))
    done = sum(sizes[: partial.done])
    rate = Rate(stage, sum(sizes), done)
    yield rate.at(done)
    for predictions in evaluate(
        answerer,
        records,
        data.open_images,
        policies,
        config.evaluation,
        seed=config.seed,
        skip_batches=partial.done,
    ):
        partial.append(predictions)
        done += len(predictions)
        yield rate.at(done)
        if should_stop():
            raise Stopped(stage)
    yield from captured_events(answerer.vlm, stage)
    partial.rename(run.path / "predictions.jsonl")
    predictions = read_predictions(run.path / "predictions.jsonl")
    write_json(run.path / "evaluation.json", summarize(predictions, config.evaluation))


def headline(path: Path) -> dict[str, float]:
    """Headline metrics of an evaluation.json, flat, as numbers; none where there is no such file.

    Per policy the real image's scores, what the grounding score is worth, and the part that its threshold comes from; the adapter's
    paired gains over the base, and over the adapter before it, each with its interval and count.
    """
    metrics: dict[str, float] = {}
    if not path.is_file():
        return metrics
    evaluation: dict[str, Any] = json.loads(path.read_text())
    for policy, conditions in evaluation["scores"].items():
        for metric, value in conditions["real"].items():
            metrics[f"{policy}/{metric}"] = value["mean"]
    for policy, value in evaluation["grounding"].items():
        metrics[f"{policy}/grounding"] = value["mean"]
    for policy, flag in evaluation["flag"].items():
        area = evaluation["separation"][policy].get("all", {}).get("auroc")
        if area is not None:
            metrics[f"{policy}/grounding_auroc"] = area["mean"]
        if flag["threshold"] is not None:
            metrics[f"{policy}/grounding_threshold"] = flag["threshold"]
        part = flag["calibration"]
        metrics |= {f"{policy}/grounding_calibration/{name}": float(part[name]) for name in ("n", "n_wrong")}
        if part.get("auroc"):
            metrics[f"{policy}/grounding_calibration/auroc_low"] = part["auroc"]["low"]
    for over in ("gain", "gain_over_before"):
        for metric, span in evaluation.get(over, {}).get("real", {}).items():
            metrics |= {f"{over}/{metric}/{name}": float(value) for name, value in span.items()}
    return metrics
