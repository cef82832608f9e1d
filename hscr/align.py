"""The recipe: records in, an evaluated adapter out, over a run directory. generate -> optimise -> evaluate -> report.

Each stage writes its outputs, is skipped when its inputs' digests are unchanged, and resumes after kill -9. `align` is a generator of
typed events (hscr/events.py); the caller prints, stores or draws them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hscr import __version__
from hscr.adapter_folder import save_adapter
from hscr.answer import Answerer
from hscr.artifacts import atomic_write, file_digest, json_digest, verify_manifest, write_json
from hscr.config import AlignConfig
from hscr.data_set import DataSet, checked_preferences
from hscr.evaluate import evaluation_inputs, evaluation_run
from hscr.events import Checkpoint, Event, Metrics, Rate, Result, Stage, Stopped, Warning_
from hscr.leaks import check_evaluation
from hscr.model import VLM, add_lora, require_images
from hscr.optimize import optimize
from hscr.preferences import generate
from hscr.records import read_preferences, write_jsonl
from hscr.run_dir import PartialFile, RunDir
from hscr.scoring import check_scorable
from hscr.similarity import load_similarity


def align(
    vlm: VLM,
    data: DataSet,
    out: Path,
    config: AlignConfig,
    *,
    evaluation_data: DataSet | None = None,
    stop_after: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Run all stages in `out`; yields events, the last is a Result. ValueError for bad input.

    Raises Stopped after `should_stop()`, and after the generation where `stop_after` is "generating": its preferences.jsonl can be looked
    at, and the same call without it goes on.

    Afterwards `out` holds config.json, preferences.jsonl, adapter/ (a PEFT folder), predictions.jsonl, evaluation.json, report.html and
    report.json, and manifest.json with the digests of every stage's inputs and outputs.
    """
    if stop_after not in (None, "generating"):
        raise ValueError("--stop-after: only `generating` can be looked at before the run goes on")
    check_scorable(evaluation_data.records if evaluation_data else ())
    require_images(vlm, max(len(r.images) for d in (data, evaluation_data) if d for r in d.records))
    run = RunDir(out)
    with run.locked():
        lineage = {"model": vlm.digest, "model_name": vlm.name, "data": data.digest, "hscr": __version__}
        write_json(out / "config.json", {**config.to_dict(), "lineage": lineage})
        if evaluation_data is not None and config.evaluation.max_records:
            yield from check_evaluation(run, data, evaluation_data, allow=config.evaluation.allow_leak)
        yield from _generating(vlm, data, run, config, should_stop)
        if stop_after == "generating":
            raise Stopped(stop_after)
        yield from _optimizing(vlm, data, run, config, lineage, should_stop)
        yield from _evaluating(vlm, evaluation_data, run, config, should_stop)
        yield from _reporting(run, data, evaluation_data)
        yield _result(out)


def _generating(
    vlm: VLM, data: DataSet, run: RunDir, config: AlignConfig, should_stop: Callable[[], bool]
) -> Iterator[Event]:
    stage, final = "generating", run.path / "preferences.jsonl"
    inputs = json_digest([data.digest, vlm.digest, asdict(config.preference), config.seed])
    if run.is_done(stage, inputs):
        yield Stage(stage, "skipped")
        return
    if data.given is not None:  # the data set brings its graded answers along: nothing is generated
        run.start(stage, inputs)
        partial_file = run.path / "preferences.partial.jsonl"  # the service may read `final` as soon as it is there
        write_jsonl(partial_file, checked_preferences(data.given, data.records))
        partial_file.rename(final)
        run.finish(stage, [final.name])
        yield Stage(stage, "skipped")
        yield Warning_("given_levels", "the data set brings its own graded answers: none were generated")
        return
    yield Stage(stage, "started")
    size, n = config.preference.batch_size, len(data.records)
    resumed = run.start(stage, inputs)
    partial = PartialFile(run.path / "preferences.partial.jsonl", _batches(n, size), resume=resumed)
    done = partial.done * size
    rate = Rate(stage, n, min(done, n))
    yield rate.at(min(done, n))
    similarity = load_similarity(config.preference.similarity)
    made = generate(vlm, data.records, data.open_images, config.preference, similarity, config.seed, start=done)
    for number, record in enumerate(made, done + 1):
        partial.append([record])
        if number % size == 0 or number == n:
            yield rate.at(number)
            if should_stop():
                raise Stopped(stage)
    partial.rename(final)
    run.finish(stage, [final.name])
    records = list(read_preferences(final))
    levels = sum(len(r.levels) for r in records)
    with_level = sum(bool(r.levels) for r in records)
    yield Metrics(stage, 0, {"records": n, "records/with_levels": with_level, "levels/mean": levels / n})
    if with_level < n / 4:
        yield Warning_(
            "few_levels", f"only {with_level} of {n} records got a graded wrong answer; the report lists the reasons"
        )
    yield Stage(stage, "completed")


def _batches(n: int, size: int) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)]


def _optimizing(
    vlm: VLM, data: DataSet, run: RunDir, config: AlignConfig, lineage: dict[str, str], should_stop: Callable[[], bool]
) -> Iterator[Event]:
    from hscr.report import displaced

    stage, preferences = "optimizing", run.path / "preferences.jsonl"
    inputs = json_digest([file_digest(preferences), data.digest, vlm.digest, asdict(config.optimization), config.seed])
    if run.is_done(stage, inputs):
        yield Stage(stage, "skipped")
        return
    yield Stage(stage, "started")
    if not run.start(stage, inputs):  # what a run with other inputs left must not be taken up
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        # The evaluation of an adapter that will be another: without --eval nothing would ever replace it.
        for name in ("reference.json", "steps.jsonl", "evaluation.json", "predictions.jsonl"):
            (run.path / name).unlink(missing_ok=True)
    add_lora(vlm, config.optimization, config.seed)
    rate: Rate | None = None
    chosen: list[float] = []
    steps = run.path / "steps.jsonl"
    try:
        for step in optimize(
            vlm,
            list(read_preferences(preferences)),
            data.open_images,
            config.optimization,
            run.path,
            seed=config.seed,
            should_stop=should_stop,
        ):
            if rate is None:
                rate = Rate(stage, step.total, step.step - 1)
                _keep_steps(steps, step.step - 1)
            with steps.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step.step, **step.metrics}) + "\n")
            chosen.append(step.metrics["rewards/chosen"])
            yield Metrics(stage, step.step, step.metrics)
            yield rate.at(step.step)
            if step.checkpoint:
                yield Checkpoint(stage, step.step, step.checkpoint)
            # Only where optimize() saw the wish too and wrote a checkpoint: the signal may have come between the two looks.
            if step.step < step.total and step.checkpoint and should_stop():
                raise Stopped(stage)
        if displaced(chosen):
            yield Warning_(
                "likelihood_displacement",
                "rewards/chosen fell below zero: the right answers became less likely; raise optimization.anchor or lower lr",
            )
        save_adapter(vlm, run.path / "adapter", config, lineage)
    finally:
        vlm.model = vlm.model.unload()  # the base again, so that evaluation loads the adapter as everybody else does
        vlm.model.requires_grad_(False)
    run.finish(stage, ["adapter"])
    yield Stage(stage, "completed")


def _keep_steps(path: Path, last: int) -> None:
    """Cut the metrics file back to the checkpoint that the run resumed from: later steps are taken again, a torn line goes."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= last]
    atomic_write(path, b"".join(kept))


def _evaluating(
    vlm: VLM, data: DataSet | None, run: RunDir, config: AlignConfig, should_stop: Callable[[], bool]
) -> Iterator[Event]:
    stage, adapter = "evaluating", run.path / "adapter"
    digest = verify_manifest(adapter)
    inputs = None if data is None else evaluation_inputs(vlm, data, digest, config)
    if data is None or inputs is None or config.evaluation.max_records == 0 or run.is_done(stage, inputs):
        yield Stage(stage, "skipped")
        return
    yield Stage(stage, "started")
    answerer = Answerer(vlm, dropout_ratio=config.preference.dropout_ratio)
    answerer.load_adapter("adapter", adapter)
    yield from evaluation_run(
        answerer, data, {"base": None, "adapter": "adapter"}, run, inputs, config, should_stop=should_stop
    )
    run.finish(stage, ["predictions.jsonl", "evaluation.json"])
    yield Stage(stage, "completed")


def _reporting(run: RunDir, data: DataSet, evaluation_data: DataSet | None) -> Iterator[Event]:
    from hscr.report import write_report

    stage = "reporting"
    names = ("config.json", "preferences.jsonl", "steps.jsonl", "predictions.jsonl", "evaluation.json")
    made_from = [run.path / n for n in names]
    inputs = json_digest([file_digest(p) if p.is_file() else None for p in made_from])
    if run.is_done(stage, inputs):
        yield Stage(stage, "skipped")
        return
    yield Stage(stage, "started")
    run.start(stage, inputs)
    if evaluation_data is None:
        write_report(run.path, data.records, data.open_image)
    else:
        write_report(run.path, data.records, data.open_image, evaluation_data.records, evaluation_data.open_image)
    run.finish(stage, ["report.html", "report.json"])
    yield Stage(stage, "completed")


def _result(out: Path) -> Result:
    """Headline metrics: per policy the real image's scores and what the grounding score is worth, flat, as numbers."""
    metrics: dict[str, float] = {}
    path = out / "evaluation.json"
    if path.is_file():
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
    return Result("adapter", verify_manifest(out / "adapter"), metrics)
