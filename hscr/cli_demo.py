"""The commands of the demonstration: demo-data, demo-model, reproduce."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hscr.cli_options import DEMO_MODEL, console, tell


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
        tell(name, folder)
    if baselines:
        from hscr.demo.baselines import baselines as guess

        typer.echo(json.dumps(guess(folders["test"], folders["pretrain"]), indent=1))


def demo_model(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Train it again from nothing (under 30 minutes).")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write the rebuilt model to.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Show the demo base model's card, or make the model again from the data."""
    if not rebuild:
        typer.echo((DEMO_MODEL / "README.md").read_text(encoding="utf-8"))
        return
    if out is None:
        raise ValueError("demo-model: --rebuild writes a model; say where with --out FOLDER")
    from hscr.demo.base import rebuild as make
    from hscr.progress import bars, by_name

    with bars(console) as progress:
        make(out, seed, by_name(progress))
    tell("model", out)


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
    tell("tables and figures", out / "reproduction.html")
