"""The command line of the method: its commands by name, and how a command's end becomes an exit code. It needs no service."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from hscr import __version__, cli_data, cli_demo, cli_model
from hscr.cli_events import EXIT_STOPPED, refuse
from hscr.cli_options import console
from hscr.disk import is_full
from hscr.events import Stopped

EXIT_BAD_INPUT = 2
METHOD, DATA, DEMO = "The method", "Data and models", "Demonstration"  # groups of the help

app = typer.Typer(
    name="hscr",
    help="Align medical vision-language models so that they answer from the image (HSCR, arXiv 2506.00805).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hscr {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


app.command(rich_help_panel=METHOD)(cli_model.align)
app.command(rich_help_panel=METHOD)(cli_model.plan)
app.command(rich_help_panel=METHOD)(cli_model.generate)
app.command(rich_help_panel=METHOD)(cli_model.evaluate)
app.command(rich_help_panel=METHOD)(cli_data.tables)
app.command(rich_help_panel=METHOD)(cli_model.ask)
app.command(rich_help_panel=METHOD)(cli_data.export)
app.command("import", rich_help_panel=DATA)(cli_data.import_)
app.command(rich_help_panel=DATA)(cli_data.split)
app.command("import-llava-med", rich_help_panel=DATA)(cli_data.import_llava_med)
app.command("demo-data", rich_help_panel=DEMO)(cli_demo.demo_data)
app.command("demo-model", rich_help_panel=DEMO)(cli_demo.demo_model)
app.command(rich_help_panel=DEMO)(cli_demo.reproduce)


def main() -> None:
    """Run the command line; bad input ends with one clear line and exit code 2, a stop after a checkpoint with 75."""
    run_app(app)


def run_app(application: typer.Typer) -> None:
    """Map the library's errors to exit codes, in the form (`error` event or line) that the command prints."""
    try:
        application()
    except (ValueError, ArithmeticError) as error:
        _refuse("bad_input" if isinstance(error, ValueError) else "diverged", str(error))
    except Stopped:
        console.print("stopped; the same command goes on from the last checkpoint")
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not is_full(error):
            raise
        _refuse("disk_full", "the disk is full; free some space, and the same command goes on from where it was")


def _refuse(code: str, message: str) -> NoReturn:
    refuse(code, message)
    sys.exit(EXIT_BAD_INPUT)
