"""`hscr keys …` and `hscr audit …`: keys and the audit at the database itself, for whoever may read it. They need no running service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.db import Database
    from service.settings import Settings

keys_app = typer.Typer(help="API keys of the service: create, list, rotate, revoke.", no_args_is_help=True)
audit_app = typer.Typer(
    help="The audit of every change: verify that no entry was changed or removed.", no_args_is_help=True
)

Data = Annotated[
    Path | None,
    typer.Option(help="The service's data folder; or set DATABASE_URL.", envvar="HSCR_DATA_DIR", show_default=False),
]
KeyId = Annotated[str, typer.Argument(help="The key's id: key_…")]


def settings_of(data: Path | None) -> Settings:
    """The settings, with the folder of --data. Raises ValueError."""
    from service.settings import read_settings

    return read_settings(data_dir=data) if data else read_settings()


def of_service(data: Path | None) -> Settings:
    """The settings of a service that is there already: nothing is created for a mistyped folder. Raises ValueError."""
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    from service.db import has_schema

    settings = settings_of(data)
    try:
        there = has_schema(settings.database)
    except ArgumentError:
        raise ValueError("DATABASE_URL: is no address: postgresql://USER:PASSWORD@HOST:PORT/NAME") from None
    except (SQLAlchemyError, ImportError) as error:
        kind = type(error).__name__
        raise ValueError(
            f"the database does not answer ({kind}): is it up, is DATABASE_URL right? `hscr doctor` looks further"
        ) from None
    if not there:
        if settings.database_url:
            raise ValueError("DATABASE_URL: that database holds no service; start one on it first, or name another")
        raise ValueError(
            f"no service in {settings.data_dir.resolve()}: name its data folder with --data (HSCR_DATA_DIR), or set DATABASE_URL; "
            "`hscr up` makes a new one"
        )
    return settings


@contextmanager
def _database(data: Path | None) -> Iterator[Database]:
    """The service's database, brought to the newest schema. A refusal ends as one clear line."""
    from service.db import Database, upgrade
    from service.errors import Problem

    settings = of_service(data)
    upgrade(settings.database)
    database = Database(settings.database)
    try:
        yield database
    except Problem as problem:
        raise ValueError(problem.detail) from None
    finally:
        database.close()


@keys_app.command("create")
def create(
    scope: Annotated[list[str], typer.Option(help="vqa, align or admin. Repeatable.")],
    name: Annotated[str, typer.Option(help="What it is for.")] = "key",
    expires_days: Annotated[float | None, typer.Option(help="It ends after this time.", min=0.001)] = None,
    waiting_max: Annotated[int | None, typer.Option(help="Most of its jobs that wait.", min=0)] = None,
    running_max: Annotated[int | None, typer.Option(help="Most of its jobs that run at once.", min=1)] = None,
    data: Data = None,
) -> None:
    """Make a key and print its secret, this once. From the first key on, callers on this machine need one too."""
    from service import keys

    with _database(data) as database, database.write() as session:
        key, secret = keys.create(
            session,
            "cli",
            name=name,
            scopes=scope,
            expires_s=expires_days * 86400 if expires_days else None,
            waiting_max=waiting_max,
            running_max=running_max,
        )
    typer.echo(f"{key.id}  {', '.join(key.scopes)}", err=True)
    typer.echo(secret)


@keys_app.command("list")
def list_(data: Data = None) -> None:
    """Keys with their scopes, state and last use."""
    from sqlalchemy import select

    from service.db import now
    from service.models import ApiKey

    with _database(data) as database, database.read() as session:
        for key in session.scalars(select(ApiKey).order_by(ApiKey.id)):
            ended = key.expires_at is not None and key.expires_at <= now()
            state = "revoked" if key.revoked_at else "expired" if ended else "active"
            used = f"{key.last_used_at:%Y-%m-%d %H:%M} UTC" if key.last_used_at else "never used"
            typer.echo(f"{key.id}  {key.shown}…  {state:8}{','.join(key.scopes):16}{used:22}{key.name}")


@keys_app.command("rotate")
def rotate(
    key_id: KeyId,
    keep_hours: Annotated[float, typer.Option(help="The old secret goes on this long.", min=0, max=720)] = 0,
    data: Data = None,
) -> None:
    """A new secret for a key, printed this once; its jobs and limits stay its own."""
    from service import keys

    with _database(data) as database, database.write() as session:
        _, secret = keys.rotate(session, "cli", key_id, keep_hours * 3600)
    typer.echo(secret)


@keys_app.command("revoke")
def revoke(key_id: KeyId, data: Data = None) -> None:
    """The key opens nothing from now on. Its jobs go on."""
    from service import keys

    with _database(data) as database, database.write() as session:
        keys.revoke(session, "cli", key_id)
    typer.echo("revoked", err=True)


@audit_app.command("verify")
def verify(
    expect: Annotated[
        str | None, typer.Option(help="NUMBER:DIGEST as an earlier verify printed it: finds a cut-off end too.")
    ] = None,
    data: Data = None,
) -> None:
    """Walk the whole chain; exit code 1 where an entry was changed or is missing."""
    from service import audit

    number, _, digest = (expect or "").partition(":")
    if expect and not (number.isdigit() and digest.startswith("sha256:")):
        raise ValueError("--expect: write NUMBER:sha256:… as `hscr audit verify` prints it")
    with _database(data) as database, database.read() as session:
        seen = audit.verify(session, (int(number), digest) if expect else None)
    for finding in seen.findings:
        typer.secho(finding, err=True, fg="red")
    typer.echo(f"{seen.entries} entries; the last is {seen.number}:{seen.digest}")
    raise typer.Exit(1 if seen.findings else 0)
