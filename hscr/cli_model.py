"""The commands that need a model: align, generate, evaluate, ask. The first three are also what the service's workers run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hscr.cli_events import lines, refuse, show, stoppable
from hscr.cli_options import (
    DEMO_MODEL,
    AllowLeak,
    ConfigFile,
    Data,
    Device,
    DType,
    Events,
    Model,
    Out,
    Preset,
    Quantize,
    Revision,
    Seed,
    Set,
    adapter_folder,
    configuration,
    console,
    leak_setting,
    load,
    quiet,
    tell,
)
from hscr.config import AlignConfig

if TYPE_CHECKING:
    from hscr.data_set import DataSet
    from hscr.model import VLM


def align(
    data: Data,
    out: Out,
    model: Model = str(DEMO_MODEL),
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Data set to evaluate base and adapter on.")] = None,
    preset_name: Preset = "recommended",
    config: ConfigFile = None,
    set_: Set = None,
    allow_leak: AllowLeak = False,
    seed: Seed = None,
    dtype: DType = "auto",
    device: Device = "auto",
    revision: Revision = None,
    quantize: Quantize = None,
    stop_after: Annotated[
        str | None,
        typer.Option(help="generating: look at preferences.jsonl first; the same command without it goes on."),
    ] = None,
    review: Annotated[
        Path | None,
        typer.Option(help="JSON file of rejected and corrected preferences (hscr/review.py says its form)."),
    ] = None,
    parent: Annotated[
        Path | None, typer.Option(help="PEFT folder to align on top of: the policy starts as it, the reference is it.")
    ] = None,
    trained_on: Annotated[
        list[Path] | None,
        typer.Option(help="A data set that PARENT was aligned on: not to be evaluated on. Repeatable."),
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which `hscr generate --parts` puts parts from elsewhere.", show_default="OUT/parts"
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes (one a GPU) that share the steps of the optimisation on this machine.")
    ] = 1,
    events: Events = "progress",
) -> None:
    """Align MODEL on DATA: graded wrong answers from the model itself, multi-level optimisation, an evaluated LoRA adapter."""
    from hscr.align import align as run
    from hscr.data_set import DataSet
    from hscr.processes import followers, rank

    settings = configuration(preset_name, config, [*(set_ or ()), *leak_setting(allow_leak)], seed)
    data_set, evaluation = DataSet(data), DataSet(eval_data) if eval_data else None
    for row in data_set.rejected[:20]:
        console.print(f"[yellow]line {row.line} left out:[/] {escape(row.reason)}")
    with stoppable() as stop, followers(processes, refuse):
        first = rank() == 0
        vlm = load(model, dtype, device, revision, quantize)
        if first and not (out / "plan.json").is_file():  # of the first attempt
            planned(vlm, data_set, settings, evaluation, out, events)
        made = run(
            vlm,
            data_set,
            out,
            settings,
            evaluation_data=evaluation,
            stop_after=stop_after,
            review=review,
            parent=adapter_folder(parent, "--parent"),
            learnt=[DataSet(path) for path in trained_on or ()],
            parts=parts,
            should_stop=stop.is_set,
        )
        show(made, events if first else "json")
    if first and events == "progress":
        tell("adapter", out / "adapter")
        tell("report", out / "report.html")
        if (out / "evaluation.json").is_file():
            from hscr.progress import evaluation_table

            Console().print(evaluation_table(json.loads((out / "evaluation.json").read_text())))


def planned(vlm: VLM, data: DataSet, settings: AlignConfig, evaluation: DataSet | None, out: Path, events: str) -> None:
    """Write OUT/plan.json, which the report compares with what happens, and say what is to be expected."""
    from hscr.artifacts import write_json
    from hscr.plan import estimate
    from hscr.progress import plan_line

    expected = estimate(vlm, data, settings, evaluation)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "plan.json", expected.to_dict())
    if events == "progress":
        console.print(plan_line(expected), soft_wrap=True)


def plan(
    data: Data,
    model: Model = str(DEMO_MODEL),
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Data set to evaluate base and adapter on.")] = None,
    preset_name: Preset = "recommended",
    config: ConfigFile = None,
    set_: Set = None,
    dtype: DType = "auto",
    device: Device = "auto",
    revision: Revision = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB that the run may have.", show_default="what the device has free", min=0)
    ] = None,
    evaluates: Annotated[bool, typer.Option("--evaluate", help="Estimate `evaluate` of an adapter on DATA.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Estimate time and memory of `align`, and settings that fit the device. Reads no weights; times two random layers."""
    from hscr.data_set import DataSet
    from hscr.model import device_and_dtype, set_threads
    from hscr.plan import estimate, skeleton
    from hscr.progress import plan_line, plan_table
    from hscr.repeats import sentences

    quiet()
    set_threads()
    settings = configuration(preset_name, config, set_)
    where, kind = device_and_dtype(device, dtype)
    data_set = DataSet(data)
    expected = estimate(
        skeleton(model, revision),
        data_set,
        settings,
        DataSet(eval_data) if eval_data else None,
        device=where,
        dtype=kind,
        available=None if memory is None else round(memory * 2**30),
        evaluates=evaluates,
    )
    if json_:
        typer.echo(json.dumps(expected.to_dict()))
    else:
        Console().print(plan_table(expected), plan_line(expected), soft_wrap=True)
        for sentence in sentences(data_set.repeats()).values():
            console.print(f"[yellow]warning:[/] {sentence}", soft_wrap=True)


def generate(
    data: Data,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSONL file of preference records to write.", show_default=False)
    ] = None,
    model: Model = str(DEMO_MODEL),
    preset_name: Preset = "recommended",
    config: ConfigFile = None,
    set_: Set = None,
    seed: Seed = None,
    dtype: DType = "auto",
    device: Device = "auto",
    revision: Revision = None,
    quantize: Quantize = None,
    parent: Annotated[
        Path | None, typer.Option(help="PEFT folder: what it hallucinates, not the base (see align --parent).")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N: only the Ith of N parts; all parts in order are the whole. -: one line of standard input after the other says I/N.",
            metavar="I/N",
        ),
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(
            help="In place of --out: put the part into this folder (RUN/parts), where `hscr align` takes it up."
        ),
    ] = None,
    events: Events = "progress",
) -> None:
    """Only the graded wrong answers: preference records as JSONL, to look at or to train elsewhere (see export).

    Stopped or killed, the same command goes on from its last batch.
    """
    from hscr.data_set import DataSet
    from hscr.parts import shard_bounds
    from hscr.shard import generate_shards

    if shard == "-" and parts is None:
        raise ValueError("generate: --shard - makes many parts, so it takes --parts FOLDER")
    if (out is None) == (parts is None):
        raise ValueError("generate: give either --out FILE or --parts FOLDER")
    settings, data_set = configuration(preset_name, config, set_, seed), DataSet(data)

    def bounds(shard: str | None) -> tuple[int, int]:
        return shard_bounds(len(data_set.records), settings.preference.batch_size, *_part_of(shard))

    asked = [] if shard == "-" else [bounds(shard)]
    parent = adapter_folder(parent, "--parent")
    with stoppable() as stop:
        vlm = load(model, dtype, device, revision, quantize)
        shards = map(bounds, lines(stop)) if shard == "-" else iter(asked)
        made = generate_shards(
            vlm, data_set, settings, shards, out=out, parts=parts, parent=parent, should_stop=stop.is_set
        )
        show(made, events)
    if events == "progress":
        tell("".join(f"{b - a} records" for a, b in asked) or "records", out or parts or Path())


def _part_of(shard: str | None) -> tuple[int, int]:
    """ "2/4" -> (2, 4); the whole where there is no shard."""
    part, slash, of = (shard or "1/1").partition("/")
    if not (slash and part.isdecimal() and of.isdecimal()):
        raise ValueError(f"--shard {shard}: write I/N, for example 2/4")
    return int(part), int(of)


def evaluate(
    data: Data,
    out: Out,
    model: Model = str(DEMO_MODEL),
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT folder, or a run directory, to compare with the base.")
    ] = None,
    before: Annotated[
        Path | None, typer.Option(help="PEFT folder that ADAPTER may replace: compared with it, question by question.")
    ] = None,
    trained_on: Annotated[
        list[Path] | None,
        typer.Option(help="A data set that an adapter was aligned on: refuse pictures that are in both. Repeatable."),
    ] = None,
    allow_leak: AllowLeak = False,
    config: ConfigFile = None,
    set_: Set = None,
    seed: Seed = None,
    dtype: DType = "auto",
    device: Device = "auto",
    revision: Revision = None,
    quantize: Quantize = None,
    events: Events = "progress",
) -> None:
    """Evaluate the base, and an adapter beside it, on DATA: both scorers, with real, blank and shuffled images."""
    from hscr.data_set import DataSet
    from hscr.evaluation import evaluate_version
    from hscr.progress import evaluation_table

    settings = configuration("paper", config, [*(set_ or ()), *leak_setting(allow_leak)], seed)
    data_set, learnt = DataSet(data), [DataSet(path) for path in trained_on or ()]
    adapter, before = adapter_folder(adapter), adapter_folder(before, "--before")
    vlm = load(model, dtype, device, revision, quantize)
    with stoppable() as stop:
        made = evaluate_version(
            vlm, data_set, out, settings, adapter=adapter, before=before, learnt=learnt, should_stop=stop.is_set
        )
        show(made, events)
    if events == "progress":
        Console().print(evaluation_table(json.loads((out / "evaluation.json").read_text())))


def ask(
    image: Annotated[
        Path,
        typer.Argument(
            help="PNG, JPEG, WebP, TIFF, BMP or GIF file; DICOM and NIfTI with pip install 'hscr\\[medical]'."
        ),
    ],
    question: Annotated[str, typer.Argument(help="The question.")],
    model: Model = str(DEMO_MODEL),
    adapter: Annotated[Path | None, typer.Option(help="PEFT folder or run directory.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=10)] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    also: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A further image, after the first. Repeatable.")
    ] = None,
    frame: Annotated[
        int | None, typer.Option(min=0, max=999_999, help="Of a DICOM or TIFF file; NIfTI: the time point. From 0.")
    ] = None,
    plane: Annotated[
        str | None, typer.Option(help="Of a NIfTI volume: axial, coronal or sagittal.", show_default="axial")
    ] = None,
    slice_: Annotated[
        int | None,
        typer.Option(
            "--slice",
            min=0,
            max=999_999,
            help="Of a NIfTI volume, from 0: the right, the back or the feet.",
            show_default="the middle",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Centre and width of the grey values shown.", metavar="C,W", show_default="the file's own"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    dtype: DType = "auto",
    device: Device = "auto",
    revision: Revision = None,
    quantize: Quantize = None,
) -> None:
    """Ask one question about one image or several; words are shown with how far they rest on the image (nats)."""
    from dataclasses import asdict

    from hscr.answer import Answerer, AnswerRequest
    from hscr.image_view import parsed_view
    from hscr.images import ImageError, decode_image
    from hscr.progress import grounded_text

    if not question.strip():
        raise ValueError("the question is empty")
    given = {"frame": frame, "plane": plane, "slice": slice_, "window": _window(window)}
    view = parsed_view(given, "image")
    pictures = []
    for path in (image, *(also or ())):
        try:
            pictures.append(decode_image(path, view=view))
        except ImageError as error:
            raise ValueError(f"{path}: {error}") from None
    adapter = adapter_folder(adapter)
    answerer = Answerer(load(model, dtype, device, revision, quantize))
    if adapter is not None:
        answerer.load_adapter("adapter", adapter)
    name = "adapter" if adapter else None
    request = AnswerRequest(pictures, question, name, max_tokens, temperature, seed, grounding="tokens")
    answer = answerer.answer([request])[0]
    if json_:
        told = {name: value for name, value in asdict(answer).items() if name != "grounded"}  # a clock of this process
        typer.echo(json.dumps(told, ensure_ascii=False))
    else:
        Console().print(grounded_text(answer))


def _window(text: str | None) -> list[float] | None:
    """ "40,400" -> [40.0, 400.0]"""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--window {text}: write CENTRE,WIDTH, for example 40,400") from None
