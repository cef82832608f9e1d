"""The command line of the method: import, split, align, generate, evaluate, tables, ask, export, import-llava-med,
demo-data, demo-model. It needs no service.

Heavy imports stand inside the commands, so that `hscr --help` answers at once. `align` is also what the service's worker runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hscr.config import PRESETS, AlignConfig, preset
from hscr.events import Error, Event, Stopped, to_line
from hscr.progress import draw

if TYPE_CHECKING:
    from hscr.model import VLM

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped after a checkpoint, the same command goes on
DEMO_MODEL = Path(__file__).parent / "demo" / "model"

app = typer.Typer(
    name="hscr",
    help="Align medical vision-language models so that they answer from the image (HSCR, arXiv 2506.00805).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(stderr=True)

Data = Annotated[
    Path, typer.Argument(help="Data set: a folder with records.jsonl and its images, or the .jsonl itself.")
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Hugging Face name or local folder [default: the demo model].")
]
Revision = Annotated[str | None, typer.Option(help="Revision of a Hugging Face name; pin it.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
DType = Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16, float16.")]
Quantize = Annotated[
    str | None, typer.Option(help="4bit: the language model in NF4 (CUDA; pip install 'hscr[quantized]').")
]
Preset = Annotated[str, typer.Option(help=f"Configuration to start from: {', '.join(PRESETS)}.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="JSON file laid over the preset.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="One field, e.g. -s optimization.lr=1e-4. Repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random streams.")]
AllowLeak = Annotated[
    bool, typer.Option("--allow-leak", help="Evaluate although pictures are in the data to align on too.")
]
Events = Annotated[str, typer.Option(help="progress: bars on stderr. json: typed events as JSON lines on stdout.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Run directory; the same command resumes an interrupted run there.")
]


def configuration(base: str, file: Path | None, sets: Iterable[str] | None, seed: int | None = None) -> AlignConfig:
    """Preset, then file, then single fields. ValueError names the field that is wrong."""
    config = preset(base)
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--config: no such file: {file.name}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--config: {file.name} is not JSON: {error}") from error
        config = AlignConfig.from_dict(values, config)
    for item in sets or ():
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: write field=value")
        try:
            value: Any = json.loads(text)
        except ValueError:
            value = text
        for key in reversed(name.split(".")):
            value = {key: value}
        config = AlignConfig.from_dict(value, config)
    return config if seed is None else AlignConfig.from_dict({"seed": seed}, config)


def leak_setting(allow: bool) -> list[str]:
    """--allow-leak as a --set: the flag only ever loosens what the configuration says."""
    return ["evaluation.allow_leak=true"] if allow else []


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """SIGTERM and the first Ctrl-C ask the run to stop after its next checkpoint; the second Ctrl-C stops it at once.

    A run that a supervisor started (HSCR_PARENT_PID) dies with it: a killed supervisor's run must never write beside the next attempt.
    """
    stop = threading.Event()

    def ask(signum: int, frame: object) -> None:
        if stop.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        console.print("stopping after a checkpoint…")

    before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    parent = int(os.environ.get("HSCR_PARENT_PID", "0"))
    if parent:

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(EXIT_STOPPED)

        threading.Thread(target=watch, daemon=True).start()
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _show(events: Iterable[Event], mode: str) -> None:
    """Print events as JSON lines, or draw them as progress bars."""
    if mode == "json":
        for event in events:
            sys.stdout.write(to_line(event) + "\n")
            sys.stdout.flush()
    elif mode == "progress":
        draw(events, console)
    else:
        raise ValueError("--events: must be progress or json")


def _load(model: str, dtype: str, device: str, revision: str | None, quantize: str | None) -> VLM:
    from transformers.utils import logging

    from hscr.model import load_model, set_threads

    logging.disable_progress_bar()
    set_threads()
    return load_model(model, dtype=dtype, device=device, revision=revision, quantize=quantize)


@app.command()
def align(
    data: Data,
    out: Out,
    model: Model = str(DEMO_MODEL),
    eval_data: Annotated[Path | None, typer.Option("--eval", help="Data set to evaluate base and adapter on.")] = None,
    preset_name: Annotated[str, typer.Option("--preset", help=f"Start from: {', '.join(PRESETS)}.")] = "recommended",
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
    events: Events = "progress",
) -> None:
    """Align MODEL on DATA: graded wrong answers from the model itself, multi-level optimisation, an evaluated LoRA adapter."""
    from hscr.align import align as run
    from hscr.data_set import DataSet

    settings = configuration(preset_name, config, [*(set_ or ()), *leak_setting(allow_leak)], seed)
    data_set, evaluation = DataSet(data), DataSet(eval_data) if eval_data else None
    for row in data_set.rejected[:20]:
        console.print(f"[yellow]line {row.line} left out:[/] {escape(row.reason)}")
    vlm = _load(model, dtype, device, revision, quantize)
    with _stoppable() as stop:
        made = run(
            vlm, data_set, out, settings, evaluation_data=evaluation, stop_after=stop_after, should_stop=stop.is_set
        )
        _show(made, events)
    if events == "progress":
        console.print(f"adapter: [bold]{out / 'adapter'}[/]   report: [bold]{out / 'report.html'}[/]")
        if (out / "evaluation.json").is_file():
            from hscr.progress import evaluation_table

            Console().print(evaluation_table(json.loads((out / "evaluation.json").read_text())))


@app.command()
def generate(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSONL file of preference records to write.")],
    model: Model = str(DEMO_MODEL),
    preset_name: Annotated[str, typer.Option("--preset", help=f"Start from: {', '.join(PRESETS)}.")] = "recommended",
    config: ConfigFile = None,
    set_: Set = None,
    seed: Seed = None,
    dtype: DType = "auto",
    device: Device = "auto",
    revision: Revision = None,
    quantize: Quantize = None,
) -> None:
    """Only the graded wrong answers: preference records as JSONL, to look at or to train elsewhere (see export)."""
    from rich.progress import track

    from hscr.data_set import DataSet
    from hscr.preferences import generate as make
    from hscr.records import write_jsonl
    from hscr.similarity import load_similarity

    settings, data_set = configuration(preset_name, config, set_, seed), DataSet(data)
    vlm, similarity = _load(model, dtype, device, revision, quantize), load_similarity(settings.preference.similarity)
    made = make(vlm, data_set.records, data_set.open_images, settings.preference, similarity, settings.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, track(made, "generating", total=len(data_set.records), console=console))
    console.print(f"{len(data_set.records)} records: [bold]{out}[/]")


@app.command()
def evaluate(
    data: Data,
    out: Out,
    model: Model = str(DEMO_MODEL),
    adapter: Annotated[Path | None, typer.Option(help="PEFT folder to compare with the base.")] = None,
    trained_on: Annotated[
        Path | None,
        typer.Option(help="The data set that the adapter was aligned on: refuse pictures that are in both."),
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
    from dataclasses import asdict

    from hscr.align import evaluation_run
    from hscr.answer import Answerer
    from hscr.artifacts import file_digest, json_digest
    from hscr.data_set import DataSet
    from hscr.leaks import check_evaluation, refuse_own_data
    from hscr.progress import evaluation_table
    from hscr.run_dir import RunDir

    settings = configuration("paper", config, [*(set_ or ()), *leak_setting(allow_leak)], seed)
    data_set, learnt = DataSet(data), DataSet(trained_on) if trained_on else None
    if adapter is not None and not settings.evaluation.allow_leak:
        refuse_own_data(adapter, data_set.digest)
    answerer = Answerer(
        _load(model, dtype, device, revision, quantize), dropout_ratio=settings.preference.dropout_ratio
    )
    policies: dict[str, str | None] = {"base": None}
    weights = None
    if adapter is not None:
        answerer.load_adapter("adapter", adapter)
        policies["adapter"], weights = "adapter", file_digest(adapter / "adapter_model.safetensors")
    inputs = json_digest([data_set.digest, answerer.vlm.digest, weights, asdict(settings.evaluation), settings.seed])
    run = RunDir(out)
    with run.locked(), _stoppable() as stop:
        if learnt is not None:
            for event in check_evaluation(run, learnt, data_set, allow=settings.evaluation.allow_leak):
                _show([event], events)
        if not run.is_done("evaluating", inputs):
            events_ = evaluation_run(answerer, data_set, policies, run, inputs, settings, should_stop=stop.is_set)
            _show(events_, events)
            run.finish("evaluating", ["predictions.jsonl", "evaluation.json"])
    if events == "progress":
        Console().print(evaluation_table(json.loads((out / "evaluation.json").read_text())))


@app.command()
def tables(
    run: Annotated[Path, typer.Argument(help="Run directory of align or evaluate, or a predictions.jsonl.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write all tables to.")] = None,
    set_: Set = None,
) -> None:
    """Compute every table of an evaluation again from its stored predictions, under its own settings: no model, no images."""
    from hscr.artifacts import write_json
    from hscr.evaluate import read_predictions, summarize
    from hscr.progress import evaluation_table

    path = run / "predictions.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise ValueError(f"{run.name}: no predictions.jsonl there; run `hscr align --eval` or `hscr evaluate` first")
    evaluation = path.with_name("evaluation.json")
    stored = json.loads(evaluation.read_text(encoding="utf-8")).get("settings", {}) if evaluation.is_file() else {}
    sets = [*(f"evaluation.{name}={json.dumps(value)}" for name, value in stored.items()), *(set_ or ())]
    settings = configuration("paper", None, sets)
    summary = summarize(read_predictions(path), settings.evaluation)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, summary)
    Console().print(evaluation_table(summary))


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP file.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    model: Model = str(DEMO_MODEL),
    adapter: Annotated[Path | None, typer.Option(help="PEFT folder.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096)] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=10)] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    also: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A further image, after the first. Repeatable.")
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
    from hscr.images import decode_image
    from hscr.progress import grounded_text

    pictures = [decode_image(path) for path in (image, *(also or ()))]
    answerer = Answerer(_load(model, dtype, device, revision, quantize))
    if adapter is not None:
        answerer.load_adapter("adapter", adapter)
    name = "adapter" if adapter else None
    request = AnswerRequest(pictures, question, name, max_tokens, temperature, seed, grounding="tokens")
    answer = answerer.answer([request])[0]
    if json_:
        typer.echo(json.dumps(asdict(answer), ensure_ascii=False))
    else:
        Console().print(grounded_text(answer))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory, or a preferences.jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSONL file to write.")],
    form: Annotated[str, typer.Option("--format", help="trl, hscr, ms-swift or llama-factory.")] = "trl",
) -> None:
    """Write a run's preference records for other trainers."""
    from hscr.export import write_export
    from hscr.records import read_preferences

    path = run / "preferences.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise ValueError(f"{run.name}: no preferences.jsonl there; run `hscr align` or `hscr generate` first")
    out.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"{write_export(read_preferences(path), form, out)} rows: [bold]{out}[/]")


@app.command("import-llava-med")
def import_llava_med(
    source: Annotated[Path, typer.Argument(help="Folder of the original checkpoint (model_type llava_mistral).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist yet.")],
    vision_tower: Annotated[
        str | None, typer.Option(help="CLIP folder or name, where the checkpoint carries no vision tower.")
    ] = None,
) -> None:
    """Convert the original LLaVA-Med v1.5 checkpoint to a Hugging Face folder that --model takes; every tensor is accounted for."""
    from rich.progress import track
    from transformers.utils import logging

    from hscr.import_llava_med import plan_import
    from hscr.llava_med_write import REPORT, write_import

    logging.set_verbosity_error()
    plan = plan_import(source, vision_tower)
    for _ in track(write_import(plan, out), "importing", total=len(plan.moves), console=console):
        pass
    size = sum(m.n_bytes for m in plan.moves) / 1e9
    console.print(
        f"{len(plan.moves)} tensors ({size:.1f} GB) moved, {len(plan.unused)} not needed, none missing, none unknown; "
        f"<image> is token {plan.config.image_token_id} of {plan.config.text_config.vocab_size}"
    )
    console.print(
        f"model: [bold]{escape(str(out))}[/]   every tensor: [bold]{escape(str(out / REPORT))}[/]", soft_wrap=True
    )


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder or file of a public layout, a CSV or JSONL with its images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the data set to.")],
    form: Annotated[
        str, typer.Option("--format", help="auto, vqa-rad, slake, pathvqa, llava, trl, hf-parquet or table.")
    ] = "auto",
    split: Annotated[str | None, typer.Option(help="Only this split: train, valid or test [default: all].")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Languages to keep [default: en]. Repeatable.")] = None,
) -> None:
    """Make a data set of VQA-RAD, SLAKE, PathVQA, LLaVA conversations, TRL pairs, CSV or JSONL; import.json lists what was left out."""
    from hscr.importing import import_data

    report = import_data(source, out, layout=form, split=split, languages=language or ("en",))
    for row in report.rejected[:20]:
        console.print(f"[yellow]{escape(row['file'])} {row['line']} left out:[/] {escape(row['reason'])}")
    if len(report.rejected) > 20:
        console.print(f"… and {len(report.rejected) - 20} more; import.json lists them all")
    counts = ", ".join(f"{number} {name}" for name, number in report.counts.items())
    console.print(f"{report.source['format']}: {counts}: [bold]{out}[/]")


@app.command()
def split(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the parts to.")],
    shares: Annotated[str, typer.Option(help="Parts and their shares.")] = "train=.8,valid=.1,test=.1",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Split DATA by group (patient, study): a group, a picture and its near copies stay in one part."""
    from hscr.splits import parse_shares, split_data

    summary = split_data(data, out, parse_shares(shares), seed)
    for name, part in summary["parts"].items():
        console.print(f"{name}: {part['records']} records, {part['groups']} groups: [bold]{out / name}[/]")
    if summary["records_without_group"]:
        console.print(
            f"[yellow]{summary['records_without_group']} records name no group:[/] two pictures of one patient may part"
        )


@app.command("demo-data")
def demo_data(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the splits to.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    baselines: Annotated[bool, typer.Option(help="Also print what can be guessed without the image.")] = False,
) -> None:
    """Build the demo data: questions about real brain MRI slices whose answers can be checked (see its card)."""
    from hscr.demo.data import build
    from hscr.progress import bars, by_name

    with bars(console) as progress:
        folders = build(out, seed, by_name(progress))
    for name, folder in folders.items():
        console.print(f"{name}: [bold]{folder}[/]")
    if baselines:
        from hscr.demo.baselines import baselines as guess

        typer.echo(json.dumps(guess(folders["test"], folders["pretrain"]), indent=1))


@app.command("demo-model")
def demo_model(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Train it again from nothing (under 30 minutes).")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the rebuilt model to.")] = DEMO_MODEL,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Show the demo base model's card, or make the model again from the data."""
    if not rebuild:
        typer.echo((DEMO_MODEL / "README.md").read_text(encoding="utf-8"))
        return
    from hscr.demo.base import rebuild as make
    from hscr.progress import bars, by_name

    with bars(console) as progress:
        make(out, seed, by_name(progress))
    console.print(f"model: [bold]{out}[/]")


@app.command()
def reproduce(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of cells and tables; the same command goes on there.")
    ] = Path("reproduction"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Two seeds and four arms (under 10 minutes) in place of everything.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Cells at a time, one thread each.")] = 2,
) -> None:
    """Compare HSCR with its baselines and ablations on the demo benchmark, over seeds, as the paper does (CPU, under 90 minutes)."""
    from hscr.progress import bars, by_name
    from hscr.reproduction.plan import FULL, QUICK
    from hscr.reproduction.run import reproduce as run

    with bars(console) as progress:
        run(out, QUICK if quick else FULL, processes, by_name(progress))
    console.print(f"tables and figures: [bold]{out / 'reproduction.html'}[/]")


def main() -> None:
    """Run the command line; bad input ends with one clear line and exit code 2, a stop after a checkpoint with 75."""
    run_app(app)


def run_app(application: typer.Typer) -> None:
    """Map the library's errors to exit codes, in the form (`error` event or line) that the command prints."""
    as_json = "--events=json" in sys.argv or "--events json" in " ".join(sys.argv)
    try:
        application()
    except (ValueError, ArithmeticError) as error:
        code = "bad_input" if isinstance(error, ValueError) else "diverged"
        message = str(error)
        if as_json:
            sys.stdout.write(to_line(Error(code, message)) + "\n")
        else:
            console.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
    except Stopped:
        console.print("stopped; the same command goes on from the last checkpoint")
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        sys.exit(130)
