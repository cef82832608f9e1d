"""docs/settings.md, made from service/settings.py: every variable with its type, default and meaning.

`python -m service.settings_page` prints it. What a setting is stands once, below its field in `Settings`; here stand only the groups, and
the variables that others read.
"""

from __future__ import annotations

import ast
import inspect
import sys
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from service.settings import Settings, variables

# The first field of each group, in the order of `Settings`.
GROUPS = {
    "data_dir": "Where things lie, and how long",
    "host": "Address, keys, logs",
    "model": "Model, device, what answers",
    "upstream_url": "Another model server (`HSCR_ENGINE=openai`)",
    "scheduling": "The local engine and its queue",
    "run_command": "Jobs, worker and sweep",
    "webhook_hosts": "Webhooks",
    "connections_max": "Limits of what is sent, and of what reads it",
}
HEAD = """# Settings
Made from `service/settings.py`: `python -m service.settings_page > docs/settings.md`. API, worker, sweep and migrations read the same
variables from their environment, `hscr up` and its children too. Units stand in the names: `_s` seconds, `_bytes` bytes. `null` lifts a
limit where the type says so. What a run learns with is not here but in `hscr.config` (README).
"""
OTHERS = """
## Read by others
| Variable | |
| --- | --- |
| `CUDA_VISIBLE_DEVICES` | the GPUs of a process; also names the device that engine and jobs share (`HSCR_DEVICE_NAME`) |
| `HF_HOME`, `HF_HUB_OFFLINE=1` | where Hugging Face's cache lies; nothing is asked of the internet ([install.md](install.md)) |
| `TMPDIR` | where uploads are spooled: a folder on the data folder's disk |
| `OTEL_EXPORTER_OTLP_ENDPOINT` | where traces go ([observability.md](observability.md)) |
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` … | of S3, where `ARTIFACTS_OPTIONS` does not say them ([storage.md](storage.md)) |
| `HSCR_DB_PASSWORD`, `HSCR_BIND`, `HSCR_PUBLISH`, `HSCR_GPUS` | only [Compose](operations.md#under-docker-compose) reads them |
| `HSCR_EXTRAS`, `TORCH_INDEX` | what its image is built with (`Dockerfile`) |
"""


def page() -> str:
    """The whole page as Markdown."""
    meanings, names = _docstrings(), variables()
    lines = [HEAD.rstrip()]
    for field, info in Settings.model_fields.items():
        if field in GROUPS:
            lines += ["", f"## {GROUPS[field]}", "| Variable | Type | Default | |", "| --- | --- | --- | --- |"]
        lines.append(f"| `{names[field]}` | {_type(info)} | {_default(info)} | {meanings.get(field, '')} |")
    return "\n".join(lines) + "\n" + OTHERS


def _docstrings() -> dict[str, str]:
    """The text below each field. pydantic can do this too (`use_attribute_docstrings`), but at every start of every process, for 40 ms."""
    (body,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                found[name] = inspect.cleandoc(meaning).replace("\n", " ")
    return found


def _type(info: FieldInfo) -> str:
    kinds = [info.annotation]
    if isinstance(info.annotation, UnionType) or typing.get_origin(info.annotation) is typing.Union:
        kinds = list(typing.get_args(info.annotation))
    # A secret or a text without a value is simply not set; of a number it is the end of a limit.
    told = [_kind(kind) for kind in kinds if kind is not type(None)]
    told += ["`null`"] if type(None) in kinds and not {str, SecretStr} & set(kinds) else []
    signs = {"ge": "≥", "gt": ">", "min_length": "characters ≥"}
    limits = [
        f"{sign} {getattr(rule, name)}" for rule in info.metadata for name, sign in signs.items() if hasattr(rule, name)
    ]
    return " or ".join(told) + (f", {', '.join(limits)}" if limits else "")


def _kind(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " \\| ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return "list"
    return {int: "whole number", float: "number", bool: "true, false", Path: "folder", SecretStr: "secret"}.get(
        kind, "text"
    )


def _default(info: FieldInfo) -> str:
    value = info.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        if value and isinstance(value[0], (int, float)):
            return f"`{value}`"
        words = " ".join("python" if word == sys.executable else str(word) for word in value)
        return f"`{words}`" if words else ""
    if value in (None, ""):
        return "`null`" if value is None and "`null`" in _type(info) else ""
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value} ({value >> 30} GiB)" if value % 2**30 == 0 else f"{value} ({value >> 20} MiB)"
    if isinstance(value, (int, float)):
        return f"{value:.0f}" if value == int(value) else str(value)
    return f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
