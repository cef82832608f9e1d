"""`hscr doctor`: the findings of service/doctor.py as lines, and an exit code."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Look at this installation and its configuration; exit code 1 where something that is needed or configured does not work."""
    from service.doctor import FAIL, NOTE, findings

    failed = 0
    for finding in findings():
        failed += finding.state == FAIL
        color = {FAIL: "red", NOTE: "yellow"}.get(finding.state, "green")
        typer.echo(f"{typer.style(f'{finding.state:5}', fg=color)} {finding.name:16} {finding.told}")
    raise typer.Exit(1 if failed else 0)
