"""The console script `hscr`: the method's own commands (hscr/cli.py) and those that start the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hscr.cli import app, run_app
from service.cli_admin import audit_app, keys_app
from service.cli_backup import backup, restore
from service.cli_doctor import doctor

app.add_typer(keys_app, name="keys")
app.add_typer(audit_app, name="audit")
app.command()(backup)
app.command()(restore)
app.command()(doctor)


@app.command()
def up(
    port: Annotated[int, typer.Option(help="Port of the HTTP service.", min=1, max=65535, envvar="HSCR_PORT")] = 8000,
    data: Annotated[
        Path,
        typer.Option(help="Folder that holds everything: database, data sets, adapters, logs.", envvar="HSCR_DATA_DIR"),
    ] = Path("hscr-data"),
    model: Annotated[
        str, typer.Option(help="Base model: Hugging Face name or folder. Default: the demo model.", envvar="HSCR_MODEL")
    ] = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on. Anything but loopback needs HSCR_API_KEY.", envvar="HSCR_HOST")
    ] = "127.0.0.1",
) -> None:
    """Serve on this machine: API, worker, sweep, broker and database in one, until Ctrl-C."""
    from service.settings import read_settings
    from service.up import Up, UpError

    settings = read_settings(port=port, data_dir=data, host=host, model=model)
    try:
        code = Up(settings, say=typer.echo).run()
    except UpError as error:
        typer.secho(str(error), err=True, fg="red")
        code = error.code
    raise typer.Exit(code)


@app.command()
def demo(
    data: Annotated[Path, typer.Option(help="Folder for the demo's data set, service and report.")] = Path("data"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """The whole main job on this machine: data, service, align, ask, table and report."""
    from service.demo import DemoError, run_demo

    try:
        run_demo(data, seed)
    except DemoError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from None


def main() -> None:
    run_app(app)


if __name__ == "__main__":
    main()
