"""`hscr backup` and `hscr restore`: a whole service as one folder, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli_admin import Data, of_service, settings_of

if TYPE_CHECKING:
    from service.backup import Report


def backup(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist yet.")],
    data: Data = None,
) -> None:
    """Copy database, data sets, adapters and reports into one folder with checksums, while the service runs."""
    from service.backup import backup as make

    report = make(of_service(data), out)
    _tell(report)
    for job in report.busy:
        typer.secho(f"{job}: was under way; in the backup it begins anew", err=True)
    for digest in report.damaged:
        typer.secho(f"{digest}: is missing or not what it was, and is not in the backup whole", err=True, fg="red")
    raise typer.Exit(1 if report.damaged else 0)


def restore(
    source: Annotated[Path, typer.Argument(help="Folder that `hscr backup` wrote.")],
    data: Data = None,
) -> None:
    """Bring a backup back into an empty data folder and an empty database; every byte and the audit are checked."""
    from service.backup import restore as bring

    _tell(bring(settings_of(data), source))


def _tell(report: Report) -> None:
    shown = ("datasets", "jobs", "adapter_versions", "audit")
    typer.echo(", ".join(f"{report.counts[name]} {name.replace('_', ' ')}" for name in shown))
    typer.echo(f"audit: {report.audit}")
