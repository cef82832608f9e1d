"""The recipe: records in, an evaluated adapter out, over a run directory. generate -> optimise -> evaluate -> report.

Each stage writes its outputs, is skipped when its inputs' digests are unchanged, and resumes after kill -9. `align` is a generator of
typed events (hscr/events.py); the caller prints, stores or draws them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from hscr import __version__
from hscr.adapter_folder import save_adapter
from hscr.answer import Answerer
from hscr.artifacts import atomic_write, file_digest, json_digest, verify_manifest, write_json
from hscr.attention_choice import NAME as ATTENTION
from hscr.attention_choice import SDPA, attention_events, check_attention
from hscr.config import AlignConfig
from hscr.costs import measured
from hscr.data_set import DataSet, checked_preferences
from hscr.evaluation import evaluation_inputs, evaluation_run, headline
from hscr.events import Checkpoint, Event, Metrics, Part, Rate, Result, Stage, Stopped, Warning_
from hscr.leaks import check_evaluation, refuse_own_data
from hscr.model import VLM, add_lora, checkpoint_gradients, require_images
from hscr.optimize import optimize
from hscr.parent import as_parent, load_parent, on_top_of, parent_digest, with_parents_shape
from hscr.parts import Parts
from hscr.processes import parted, rank, told
from hscr.records import PreferenceRecord, read_preferences, write_jsonl
from hscr.repeats import sentences
from hscr.review import read_review, reviewed
from hscr.run_dir import PartialFile, RunDir
from hscr.scoring import check_scorable
from hscr.shard import batch_lengths, batches_made, generation_inputs, part_inputs
from hscr.similarity import load_similarity
from hscr.static_steps import captured_events
from hscr.token_budget import TokenBudget, out_of_memory


def align(
    vlm: VLM,
    data: DataSet,
    out: Path,
    config: AlignConfig,
    *,
    evaluation_data: DataSet | None = None,
    stop_after: str | None = None,
    review: Path | None = None,
    parent: Path | None = None,
    learnt: Sequence[DataSet] = (),
    parts: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Run all stages in `out`; yields events, the last is a Result. ValueError for bad input.

    Raises Stopped after `should_stop()`, and after the generation where `stop_after` is "generating": its preferences.jsonl can be looked
    at, and the same call without it goes on, with `review` (hscr/review.py) on what that makes of them: reviewed.jsonl.

    With `parent`, a PEFT folder, the run is on top of that adapter (hscr/parent.py); `learnt` are the data sets that it was aligned on,
    whose pictures the evaluation must not show either.

    `parts` (default: `out`/parts) is where others may put preferences that they made of the same (hscr/parts.py): they are taken up
    instead of being made here, and nothing is waited for.

    Afterwards `out` holds config.json, preferences.jsonl (reviewed.jsonl), adapter/ (a PEFT folder), predictions.jsonl, evaluation.json,
    report.html and report.json, costs.json (hscr/costs.py), repeats.json (hscr/repeats.py), and manifest.json with the digests of every
    stage's inputs and outputs.
    """
    if stop_after not in (None, "generating"):
        raise ValueError("--stop-after: only `generating` can be looked at before the run goes on")
    check_scorable(evaluation_data.records if evaluation_data else ())
    check_attention(vlm, config.optimization.attention)
    require_images(vlm, max(len(r.images) for d in (data, evaluation_data) if d for r in d.records))
    if parent is not None:
        config = with_parents_shape(config, parent)
    if rank() > 0:
        _following(vlm, data, out, config, parent)
        return
    run = RunDir(out)
    with run.locked():
        lineage = {"model": vlm.digest, "model_name": vlm.name, "data": data.digest, "hscr": __version__}
        if review is not None:
            lineage["review"] = file_digest(review)
        if parent is not None:
            lineage["parent"] = parent_digest(parent)
        yield from _changed(run, {**config.to_dict(), "lineage": lineage})
        yield from _repeated(run, data)
        if evaluation_data is not None and config.evaluation.max_records:
            if parent is not None and not config.evaluation.allow_leak:
                refuse_own_data(parent, evaluation_data.digest)
            for seen in (*learnt, data):
                yield from check_evaluation(run, seen, evaluation_data, allow=config.evaluation.allow_leak)
        generating = _generating(vlm, data, run, config, parent, parts or out / "parts", should_stop)
        yield from measured(out, "generating", generating, vlm)
        if stop_after == "generating":
            raise Stopped(stop_after)
        preferences = _reviewing(run, config, review)
        optimizing = _optimizing(vlm, data, preferences, run, config, lineage, parent, should_stop)
        yield from measured(out, "optimizing", optimizing, vlm)
        evaluating = _evaluating(vlm, evaluation_data, run, config, parent, should_stop)
        yield from measured(out, "evaluating", evaluating, vlm)
        yield from _reporting(run, data, evaluation_data)
        yield _result(out)


def _changed(run: RunDir, config: dict[str, Any]) -> Iterator[Event]:
    """Write RUN/config.json; what is not what it was there is said, for the adapter and the tables that rest on it are made anew."""
    path = run.path / "config.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else config
    write_json(path, config)
    names = []
    for group, value in config.items():
        was: Any = before.get(group, {})
        if group == "lineage":  # other digests; a review is what a run goes on with
            names += [f"the {name}" for name in ("model", "data", "parent") if value.get(name) != was.get(name)]
        elif isinstance(value, dict):
            names += [f"{group}.{name}" for name in value if name not in was or was[name] != value[name]]
        elif was != value:
            names.append(group)
    if names:
        told = ", ".join(names)
        yield Warning_("settings_changed", f"settings changed in this folder: {told}; what rests on them is made anew")


def _repeated(run: RunDir, data: DataSet) -> Iterator[Event]:
    """What the data say twice or in different ways is learnt from, but not silently: RUN/repeats.json, and a warning a kind."""
    told = data.repeats()
    write_json(run.path / "repeats.json", told)
    for kind, sentence in sentences(told).items():
        yield Warning_(kind, sentence)


def _generating(
    vlm: VLM,
    data: DataSet,
    run: RunDir,
    config: AlignConfig,
    parent: Path | None,
    parts: Path,
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    stage, final = "generating", run.path / "preferences.jsonl"
    inputs = generation_inputs(vlm, data, config, parent)
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
    partial = PartialFile(run.path / "preferences.partial.jsonl", batch_lengths(n, size), resume=resumed)
    position = min(partial.done * size, n)
    rate = Rate(stage, n, position)
    yield rate.at(position)
    similarity = load_similarity(config.preference.similarity)
    budget = TokenBudget(config.preference.token_budget)
    tokens = budget.tokens
    elsewhere = Parts(parts, part_inputs(vlm, data, config, parent), data.records, size)
    made: Iterator[list[PreferenceRecord]] | None = None
    with as_parent(vlm, parent):
        while position < n:
            lines = elsewhere.at(position)
            yield from elsewhere.warnings()
            if lines:
                partial.append_lines(lines)
                yield Part(stage, position + 1, position + len(lines))
                position, made = position + len(lines), None
            else:
                made = made or batches_made(vlm, data, config, similarity, budget, position, n)
                batch = next(made)
                partial.append(batch)
                position += len(batch)
                if budget.tokens < tokens:
                    yield out_of_memory("preference", tokens := budget.tokens)
            yield rate.at(position)
            if should_stop():
                raise Stopped(stage)
    yield from captured_events(vlm, stage)
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


def _reviewing(run: RunDir, config: AlignConfig, review: Path | None) -> Path:
    """The preferences to optimise on: as generated, or what a review leaves of them."""
    stage, generated, final = "reviewing", run.path / "preferences.jsonl", run.path / "reviewed.jsonl"
    if review is None:
        final.unlink(missing_ok=True)
        return generated
    inputs = json_digest([file_digest(generated), file_digest(review), config.preference.similarity])
    if not run.is_done(stage, inputs):
        run.start(stage, inputs)
        partial = run.path / "reviewed.partial.jsonl"
        with generated.open("rb") as lines:
            similarity = cache(lambda: load_similarity(config.preference.similarity))
            write_jsonl(partial, reviewed(lines, read_review(review), similarity))
        if partial.stat().st_size == 0:
            raise ValueError("--review: every record was rejected, so there is nothing to optimise on")
        partial.replace(final)
        run.finish(stage, [final.name])
    return final


def _optimizing(
    vlm: VLM,
    data: DataSet,
    preferences: Path,
    run: RunDir,
    config: AlignConfig,
    lineage: dict[str, str],
    parent: Path | None,
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    from hscr.report import displaced

    stage = "optimizing"
    asked = [file_digest(preferences), data.digest, vlm.digest, asdict(config.optimization), config.seed]
    inputs = json_digest([*asked, *on_top_of(parent)])
    if run.is_done(stage, inputs):
        told("")  # nothing to follow
        parted()
        yield Stage(stage, "skipped")
        return
    yield Stage(stage, "started")
    if not run.start(stage, inputs):  # what a run with other inputs left must not be taken up
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        # The evaluation of an adapter that will be another: without --eval nothing would ever replace it.
        for name in ("reference.json", ATTENTION, "steps.jsonl", "evaluation.json", "predictions.jsonl"):
            (run.path / name).unlink(missing_ok=True)
    told(preferences.name)
    _put_on_adapter(vlm, config, parent)
    rate: Rate | None = None
    chosen: list[float] = []
    tokens, attention = config.optimization.token_budget, SDPA
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
                yield rate.at(step.step - 1)
                _keep_steps(steps, step.step - 1)
            with steps.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step.step, **step.metrics}) + "\n")
            chosen.append(step.metrics["rewards/chosen"])
            yield Metrics(stage, step.step, step.metrics)
            if step.attention != attention:
                attention = step.attention
                yield from attention_events(stage, attention)
            if step.token_budget < tokens:
                yield out_of_memory("optimization", tokens := step.token_budget)
            yield rate.at(step.step)
            if step.checkpoint:
                yield Checkpoint(stage, step.step, step.checkpoint)
            # Only where optimize() saw the wish too and wrote a checkpoint: the signal may have come between the two looks.
            if step.step < step.total and step.checkpoint and should_stop():
                raise Stopped(stage)
        parted()
        if displaced(chosen):
            yield Warning_(
                "likelihood_displacement",
                "rewards/chosen fell below zero: the right answers became less likely; raise optimization.anchor or lower lr",
            )
        save_adapter(vlm, run.path / "adapter", config, lineage)
    finally:
        vlm.model = vlm.model.unload()  # the base again, so that evaluation loads the adapter as everybody else does
        vlm.model.requires_grad_(False)
        checkpoint_gradients(vlm, False)
        vlm.on_top = False
    run.finish(stage, ["adapter"])
    yield Stage(stage, "completed")


def _put_on_adapter(vlm: VLM, config: AlignConfig, parent: Path | None) -> None:
    if parent is None:
        add_lora(vlm, config.optimization, config.seed)
    else:
        load_parent(vlm, parent, trainable=True)


def _following(vlm: VLM, data: DataSet, out: Path, config: AlignConfig, parent: Path | None) -> None:
    """What a process after the first does: its share of the optimisation's steps, once the first has generated the preferences."""
    preferences: str = told(None)
    if preferences:
        _put_on_adapter(vlm, config, parent)
        for _ in optimize(
            vlm,
            list(read_preferences(out / preferences)),
            data.open_images,
            config.optimization,
            out,
            seed=config.seed,
        ):
            pass


def _keep_steps(path: Path, last: int) -> None:
    """Cut the metrics file back to the checkpoint that the run resumed from: later steps are taken again, a torn line goes."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= last]
    atomic_write(path, b"".join(kept))


def _evaluating(
    vlm: VLM,
    data: DataSet | None,
    run: RunDir,
    config: AlignConfig,
    parent: Path | None,
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    stage, adapter = "evaluating", run.path / "adapter"
    policies: dict[str, str | None] = {"base": None}
    folders = {label: folder for label, folder in (("adapter", adapter), ("before", parent)) if folder is not None}
    weights = {"adapter": verify_manifest(adapter)} | ({"before": parent_digest(parent)} if parent else {})
    inputs = None if data is None else evaluation_inputs(vlm, data, weights, config)
    if data is None or inputs is None or config.evaluation.max_records == 0 or run.is_done(stage, inputs):
        yield Stage(stage, "skipped")
        return
    yield Stage(stage, "started")
    answerer = Answerer(vlm, dropout_ratio=config.preference.dropout_ratio)
    for label, folder in folders.items():
        answerer.load_adapter(label, folder)
        policies[label] = label
    yield from evaluation_run(answerer, data, policies, run, inputs, config, should_stop=should_stop)
    run.finish(stage, ["predictions.jsonl", "evaluation.json"])
    yield Stage(stage, "completed")


def _reporting(run: RunDir, data: DataSet, evaluation_data: DataSet | None) -> Iterator[Event]:
    from hscr.report import write_report

    stage = "reporting"
    names = (
        "config.json",
        "preferences.jsonl",
        "reviewed.jsonl",
        "steps.jsonl",
        ATTENTION,
        "predictions.jsonl",
        "evaluation.json",
        "plan.json",
        "costs.json",
        "repeats.json",
    )
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
    return Result("adapter", verify_manifest(out / "adapter"), headline(out / "evaluation.json"))
