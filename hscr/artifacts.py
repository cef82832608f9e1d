"""Digests, sha256 manifests and atomic files: how a run knows that an input or output is the one it was, and whole.

The digest of a folder is the sha256 of its manifest (`SHA256SUMS`, the format of sha256sum). No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "SHA256SUMS"


def file_digest(path: Path) -> str:
    """`sha256:…` of a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def json_digest(value: Any) -> str:
    """Digest of a value's canonical JSON: sorted keys, no spaces."""
    return bytes_digest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _manifest_text(folder: Path) -> str:
    return _lines({p: file_digest(p) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}, folder)


def _lines(digests: dict[Path, str], folder: Path) -> str:
    return "".join(
        f"{digests[path].removeprefix('sha256:')}  {path.relative_to(folder).as_posix()}\n" for path in sorted(digests)
    )


def write_manifest(folder: Path, known: dict[str, str] | None = None) -> str:
    """Write FOLDER/SHA256SUMS over all files below it; returns the folder's digest. `known`: name -> digest of every file, if at hand."""
    text = (
        _manifest_text(folder)
        if known is None
        else _lines({folder / name: digest for name, digest in known.items()}, folder)
    )
    atomic_write(folder / MANIFEST, text.encode())
    return bytes_digest(text.encode())


def verify_manifest(folder: Path, digest: str | None = None) -> str:
    """The folder's digest after checking every file against its manifest; ValueError where a file is changed, missing or added."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder.name}: has no {MANIFEST}")
    text = path.read_text(encoding="utf-8")
    if text != _manifest_text(folder):
        raise ValueError(f"{folder.name}: files differ from its {MANIFEST}")
    found = bytes_digest(text.encode())
    if digest is not None and digest != found:
        raise ValueError(f"{folder.name}: digest is {found}, expected {digest}")
    return found


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader, or a kill at any moment, sees the old or the new file whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A file to write beside `path` that becomes it when the block ends well: `path` may be read meanwhile, and is never half there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes it when the block ends well, else goes. ValueError where `out` is there and not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out.name} is there and not empty; choose another folder")
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    atomic_write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link of `source`, or a copy where the file system has none (another device, no right to link).

    A file that is there already is left alone. Raises FileExistsError, NotADirectoryError or IsADirectoryError where something else is.
    """
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
