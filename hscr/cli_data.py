"""The commands that read and write files only: import, split, tables, export, import-llava-med. No model answers here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hscr.cli_options import Data, Set, configuration, console, tell


def import_(
    source: Annotated[Path, typer.Argument(help="Folder or file of a public layout, a CSV or JSONL with its images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the data set to.")],
    form: Annotated[
        str, typer.Option("--format", help="auto, vqa-rad, slake, pathvqa, llava, openai, trl, hf-parquet or table.")
    ] = "auto",
    split: Annotated[
        str | None, typer.Option(help="Only this split: train, valid or test.", show_default="all")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Languages to keep. Repeatable.", show_default="en")
    ] = None,
) -> None:
    """Make a data set of VQA-RAD, SLAKE, PathVQA, LLaVA conversations, TRL pairs, CSV or JSONL; import.json lists what was left out."""
    from hscr.importing import import_data

    report = import_data(source, out, layout=form, split=split, languages=language or ("en",))
    for row in report.rejected[:20]:
        console.print(f"[yellow]{escape(row['file'])} {row['line']} left out:[/] {escape(row['reason'])}")
    if len(report.rejected) > 20:
        console.print(f"… and {len(report.rejected) - 20} more; import.json lists them all")
    counts = ", ".join(f"{number} {name}" for name, number in report.counts.items())
    tell(f"{report.source['format']}: {counts}", out)


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
        tell(f"{name}: {part['records']} records, {part['groups']} groups", out / name)
    if summary["records_without_group"]:
        console.print(
            f"[yellow]{summary['records_without_group']} records name no group:[/] two pictures of one patient may part"
        )


def tables(
    run: Annotated[Path, typer.Argument(help="Run directory of align or evaluate, or a predictions.jsonl.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write all tables to.")] = None,
    set_: Set = None,
) -> None:
    """Compute every table of an evaluation again from its stored predictions, under its own settings: no model, no images."""
    from hscr.artifacts import write_json
    from hscr.predictions import read_predictions
    from hscr.progress import evaluation_table
    from hscr.tables import summarize

    path = run / "predictions.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise ValueError(f"{run.name}: no predictions.jsonl there; run `hscr align --eval` or `hscr evaluate` first")
    evaluation = path.with_name("evaluation.json")
    stored = json.loads(evaluation.read_text(encoding="utf-8")).get("settings", {}) if evaluation.is_file() else {}
    sets = [*(f"evaluation.{name}={json.dumps(value)}" for name, value in stored.items()), *(set_ or ())]
    settings = configuration("paper", None, sets)
    predictions = read_predictions(path)
    if not predictions:
        raise ValueError(f"{run.name}: its predictions.jsonl is empty, so there is nothing to put into a table")
    summary = summarize(predictions, settings.evaluation)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, summary)
    Console().print(evaluation_table(summary))


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
    tell(f"{write_export(read_preferences(path), form, out)} rows", out)


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
    tell("model", out)
    tell("every tensor", out / REPORT)
