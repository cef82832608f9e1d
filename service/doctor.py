"""What `hscr doctor` looks at: an installation and its configuration, each finding with what to do next.

It reads and asks, it changes nothing, and of the model it opens the configuration only. torch is imported for its device. Without the extra
`service` it tells what packages there are.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from service.settings import Settings

OK: Final = "ok"
NOTE: Final = "note"
FAIL: Final = "FAIL"
EXTRAS = {
    "service": "the HTTP service, worker and sweep",
    "medical": "DICOM and NIfTI",
    "data": "parquet",
    "caption": "scores of captions",
    "s3": "artifacts in S3",
    "trace": "OpenTelemetry",
    "quantized": "4-bit weights on CUDA",
    "smolvlm": "SmolVLM's processor",
    "demo": "hscr demo, demo-data and reproduce",
}
# Read by docker-compose.yml, or by one process of ours from another.
OTHER_VARIABLES = {f"HSCR_{name}" for name in "DB_PASSWORD BIND PUBLISH GPUS EXTRAS PARENT_PID".split()}


@dataclass(frozen=True)
class Finding:
    """One line: `FAIL` where something that is needed or configured does not work, `note` for what may be as intended."""

    state: Literal["ok", "note", "FAIL"]
    name: str
    told: str


def findings() -> Iterator[Finding]:
    """Everything, in the order in which one thing needs the other."""
    yield from packages()
    if find_spec("pydantic_settings") is None:
        return
    from service.settings import read_settings

    try:
        settings = read_settings()
    except ValueError as error:
        for line in str(error).splitlines():
            yield Finding(FAIL, "settings", f"{line}; docs/settings.md says what it takes")
        return
    yield from variables_set()
    yield from start(settings)
    yield from device(settings)
    yield from model(settings)
    yield disk(settings)
    yield from database(settings)
    yield broker(settings)


def packages() -> Iterator[Finding]:
    """Versions, and extras with what they are for. What counts is hscr's own metadata."""
    from packaging.requirements import Requirement

    yield Finding(OK, "python", f"{sys.version.split()[0]} ({sys.prefix})")
    yield Finding(OK, "hscr", version("hscr"))
    needed = [Requirement(text) for text in requires("hscr") or ()]
    base = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    for name in ("torch", "transformers", "peft"):
        yield Finding(OK, name, _version(name) or "missing")
    for bad in filter(None, map(_lack, base)):
        yield Finding(FAIL, "packages", f"{bad}; pip install -c constraints.txt hscr (docs/install.md)")
    for extra, purpose in EXTRAS.items():
        own = [r for r in needed if r not in base and r.marker and r.marker.evaluate({"extra": extra})]
        lacks = [lack for lack in map(_lack, own) if lack]
        told = f"{purpose}: {', '.join(lacks)}; pip install -c constraints.txt 'hscr[{extra}]'" if lacks else purpose
        yield Finding(NOTE if lacks else OK, f"extra {extra}", told)


def variables_set() -> Iterator[Finding]:
    """Names only: a value may be a secret. One that nobody reads is most often misspelt."""
    from service.settings import Settings, variables

    known = set(variables().values()) | {
        str(choice)
        for field in Settings.model_fields.values()
        for choice in getattr(field.validation_alias, "choices", ())
    }
    yield Finding(
        OK, "settings", ", ".join(sorted(known & set(os.environ))) or "none is set: all are at their defaults"
    )
    for name in sorted(set(os.environ) - known - OTHER_VARIABLES):
        if name.startswith("HSCR_"):
            yield Finding(NOTE, "settings", f"{name} is no setting; docs/settings.md lists them")


def start(settings: Settings) -> Iterator[Finding]:
    """What the API refuses to start with, and what it only warns of."""
    from service import auth, tracing, webhooks
    from service.artifact_store import open_store
    from service.upstream import server

    for check in (auth.check_settings, webhooks.check_settings, server.check_settings, open_store):
        try:
            check(settings)
        except ValueError as error:
            yield Finding(FAIL, "settings", str(error))
    if tracing.wanted(settings.trace) and find_spec("opentelemetry") is None:
        yield Finding(FAIL, "traces", "asked for and cannot be made: pip install 'hscr[trace]'")


def device(settings: Settings) -> Iterator[Finding]:
    """Where the model would run, and with how much memory."""
    import psutil
    import torch

    from hscr.model import device_and_dtype

    try:
        where, dtype = device_and_dtype(settings.device, settings.dtype)
    except ValueError as error:
        yield Finding(FAIL, "device", f"{error}; set HSCR_DEVICE and HSCR_DTYPE to what is there, or auto")
        return
    kind = str(dtype).removeprefix("torch.")
    if where.type == "cuda":
        free, total = torch.cuda.mem_get_info(where)
        name = torch.cuda.get_device_name(where)
        yield Finding(OK, "device", f"{where}, {name}, {_gib(free)} of {_gib(total)} free, {kind}")
        return
    memory = psutil.virtual_memory()
    yield Finding(OK, "device", f"{where}, {_gib(memory.available)} of {_gib(memory.total)} free, {kind}")
    if where.type == "cpu" and Path("/dev/nvidiactl").exists():
        reason = "torch is a CPU build" if torch.version.cuda is None else "torch finds no CUDA device; see nvidia-smi"
        yield Finding(NOTE if settings.device == "cpu" else FAIL, "device", f"a GPU is here and not used: {reason}")


def model(settings: Settings) -> Iterator[Finding]:
    """Its folder, or whether the cache has its name. No weights are read."""
    from hscr.families import family_of

    name = settings.model_path
    folder = Path(name)
    if not folder.is_dir():
        cached, may_come = _cached(name, settings.model_revision)
        if cached is None:
            told = "the first use downloads it" if may_come else "copy it here (docs/install.md)"
            told = f"HSCR_MODEL={name} is no folder and not in Hugging Face's cache; {told}"
            yield Finding(NOTE if may_come else FAIL, "model", told)
            return
        folder = cached
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family_of(config.get("model_type"), settings.model_id)
    except (OSError, ValueError, AttributeError) as error:
        told = (
            f"{settings.model_id}: config.json cannot be read ({type(error).__name__}); docs/install.md lists the files"
        )
        yield Finding(FAIL, "model", str(error) if type(error) is ValueError else told)
        return
    lacks = _missing(folder)
    if lacks:
        yield Finding(
            FAIL,
            "model",
            f"{settings.model_id}: lacks {', '.join(lacks)}; copy it again (docs/install.md lists the files)",
        )
    else:
        yield Finding(OK, "model", f"{settings.model_id} ({config['model_type']})")


def disk(settings: Settings) -> Finding:
    """Whether this user may write to the data folder, and a run would begin."""
    place = settings.data_dir.resolve()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(FAIL, "data folder", f"{place} cannot be written to; give it to this user, or set HSCR_DATA_DIR")
    if free < settings.disk_reserve_bytes:
        return Finding(FAIL, "data folder", f"{place}: {_gib(free)} free; no run starts below HSCR_DISK_RESERVE_BYTES")
    return Finding(
        OK, "data folder", f"{place}, {_gib(free)} free" + ("" if there == place else "; made at the first start")
    )


def database(settings: Settings) -> Iterator[Finding]:
    """Whether it answers, at the schema of this version."""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    from service.db import Database, alembic_config

    try:
        address = make_url(settings.database)
    except ArgumentError:
        yield Finding(FAIL, "database", "DATABASE_URL is no address: postgresql://USER:PASSWORD@HOST:PORT/NAME")
        return
    kind = address.get_backend_name()
    if kind == "sqlite" and not Path(address.database or "").exists():
        yield Finding(NOTE, "database", "SQLite, not made yet; the first start does")
        return
    try:
        opened = Database(settings.database)
        try:
            with opened.engine.connect() as connection:
                found = MigrationContext.configure(connection).get_current_revision()
        finally:
            opened.close()
    except (SQLAlchemyError, ImportError, OSError) as error:
        where = f"{kind} at {address.host or 'its file'}"
        yield Finding(
            FAIL, "database", f"{where} does not answer ({type(error).__name__}); is it up, is DATABASE_URL right?"
        )
        return
    scripts = ScriptDirectory.from_config(alembic_config(settings.database))
    head = scripts.get_current_head()
    if found == head:
        yield Finding(OK, "database", f"{kind}, schema {found}")
    elif found is None:
        yield Finding(NOTE, "database", f"{kind}, empty; the first start makes the schema (or: alembic upgrade head)")
    elif found in {script.revision for script in scripts.walk_revisions()}:
        told = f"{kind}, schema {found}, and this version's is {head}; back up, then start hscr up, or alembic upgrade head"
        yield Finding(FAIL, "database", told)
    else:
        told = (
            f"{kind}, schema {found}, which a newer version made; install that one, or restore the backup from before"
        )
        yield Finding(FAIL, "database", told)


def broker(settings: Settings) -> Finding:
    """Whether it answers. Without an address `hscr up` starts one of its own."""
    import redis

    if "redis_url" not in settings.model_fields_set:
        return Finding(NOTE, "broker", "REDIS_URL is not set: hscr up starts one of its own")
    try:
        with redis.Redis.from_url(settings.redis_url, socket_timeout=3, socket_connect_timeout=3) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        return Finding(FAIL, "broker", f"does not answer ({type(error).__name__}); is it up, is REDIS_URL right?")
    return Finding(OK, "broker", "answers")


def _cached(name: str, revision: str | None) -> tuple[Path | None, bool]:
    """The folder in Hugging Face's cache, and whether a first use would fetch it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a path
        return None, False
    return (Path(found).parent, True) if isinstance(found, str) else (None, not HF_HUB_OFFLINE)


def _missing(folder: Path) -> list[str]:
    """Kinds of files that a model's folder lacks."""
    lacks = [] if any(folder.glob("*processor_config.json")) else ["preprocessor_config.json or processor_config.json"]
    lacks += [] if any(folder.glob("tokenizer*")) else ["its tokenizer"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return lacks if any(folder.glob("*.safetensors")) else [*lacks, "model.safetensors"]
    try:
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return [*lacks, "a whole model.safetensors.index.json"]
    return lacks + sorted(part for part in parts if not (folder / part).is_file())


def _lack(requirement: object) -> str | None:
    from packaging.requirements import Requirement

    assert isinstance(requirement, Requirement)
    found = _version(requirement.name)
    if found is None:
        return f"{requirement.name} is missing"
    return (
        None
        if requirement.specifier.contains(found, prereleases=True)
        else f"{requirement} is needed, {found} is there"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"
