"""Where artifacts lie: adapters, reports and data sets, each a folder under its content's digest, with a sha256 manifest over its files.

All who write or read one go through a store; a row points at a folder only when it is whole. Here are the names, the choice by
ARTIFACTS_URL and the store on a local disk, which is the default; service/object_store.py is the one behind an address. No torch, no web
framework, no rows.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from hscr.artifacts import MANIFEST, bytes_digest, verify_manifest, write_manifest
from service.errors import Problem
from service.run_folders import clear_aside
from service.settings import Settings

ADAPTERS, REPORTS, DATASETS = KINDS = ("adapters", "reports", "datasets")
_carriers = ThreadPoolExecutor(
    4, thread_name_prefix="artifacts"
)  # a store that is away keeps none of the other threads


@dataclass(frozen=True)
class Artifact:
    """A stored folder. `files` is the digest of its SHA256SUMS; None where it was stored before that was noted."""

    kind: str
    name: str  # sha256-<hex>
    files: str | None


def adapter(digest: str) -> Artifact:
    return Artifact(ADAPTERS, digest.replace(":", "-"), digest)


def report(name: str) -> Artifact:
    return Artifact(REPORTS, name, name.replace("-", ":", 1))


def data_set(digest: str, files: str | None) -> Artifact:
    """A data set's digest is that of its records and images, whatever files they stand in; hence the second one."""
    return Artifact(DATASETS, digest.replace(":", "-"), files)


class ArtifactStore(Protocol):
    """What a store does. Each call may raise Problem: `artifact_damaged` for what is missing or changed, `artifacts_unavailable`."""

    def put(self, artifact: Artifact, source: Path, *, give: bool = False) -> str:
        """Store a folder that has its manifest; returns the manifest's digest of what is there now. Storing twice is harmless.

        `give`: the caller has just made it and needs it no more; else it is verified and copied. ValueError where it is damaged.
        """

    def at_hand(self, artifact: Artifact) -> Path | None:
        """Its folder where that costs nothing: no network, no reading of files."""

    def fetch(self, artifact: Artifact) -> Path:
        """Its folder on a local disk, to be read soon."""

    def checked(self, artifact: Artifact) -> Path:
        """The same after every byte was verified now."""

    def lent(self, artifact: Artifact, *, check: bool = False) -> AbstractContextManager[Path]:
        """Its folder, which stays as long as the block lasts."""

    def lent_file(self, artifact: Artifact, name: str) -> AbstractContextManager[Path]:
        """One file of it, without the others."""

    def names(self, kind: str) -> list[str]:
        """What is there, whole or not, but for what is being made at this moment."""

    def remove(self, kind: str, name: str) -> bool:
        """Take one away, so that nothing half ever lies under its name; False where it is too young to be called forgotten."""

    def clear(self) -> None:
        """Free what `remove` took away and the disk still holds."""


class LocalStore:
    """Folders on a disk: stored by a rename, read where they lie."""

    def __init__(self, places: dict[str, Path]) -> None:
        self._places = places

    @classmethod
    def below(cls, data_dir: Path) -> LocalStore:
        """The default's layout, and a backup's."""
        root = data_dir / "artifacts"
        return cls({ADAPTERS: root / ADAPTERS, REPORTS: root / REPORTS, DATASETS: data_dir / DATASETS})

    def folder(self, artifact: Artifact) -> Path:
        return self._places[artifact.kind] / artifact.name

    def put(self, artifact: Artifact, source: Path, *, give: bool = False) -> str:
        if not give:
            verify_manifest(source, artifact.files)
        final = self.folder(artifact)
        if not final.exists():
            whole = final.with_name(f".{final.name}.{uuid4().hex[:12]}.tmp")
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                if not (give and _renamed(source, whole)):
                    shutil.copytree(source, whole)
                sync_tree(whole)
                try:
                    whole.rename(final)
                except OSError:
                    if not final.exists():  # else somebody was first; equal digests are equal folders
                        raise
            finally:
                shutil.rmtree(whole, ignore_errors=True)
        if not give:
            return verify_manifest(final, artifact.files)
        manifest = final / MANIFEST
        return bytes_digest(manifest.read_bytes()) if manifest.is_file() else write_manifest(final)

    def at_hand(self, artifact: Artifact) -> Path | None:
        return self.folder(artifact)

    def fetch(self, artifact: Artifact) -> Path:
        folder = self.folder(artifact)
        if not folder.is_dir():
            raise damaged(artifact.kind)
        return folder

    def checked(self, artifact: Artifact) -> Path:
        folder = self.fetch(artifact)
        try:
            verify_manifest(folder, artifact.files)
        except ValueError:
            raise damaged(artifact.kind) from None
        return folder

    @contextmanager
    def lent(self, artifact: Artifact, *, check: bool = False) -> Iterator[Path]:
        yield self.checked(artifact) if check else self.fetch(artifact)

    @contextmanager
    def lent_file(self, artifact: Artifact, name: str) -> Iterator[Path]:
        path = self.folder(artifact) / name
        if not path.is_file():
            raise damaged(artifact.kind)
        yield path

    def names(self, kind: str) -> list[str]:
        root = self._places[kind]
        found = [path.name for path in root.iterdir()] if root.is_dir() else []
        return [name for name in found if not name.startswith((".incoming-", ".gone-"))]

    def remove(self, kind: str, name: str) -> bool:
        path = self._places[kind] / name
        path.rename(path.with_name(f".gone-{uuid4().hex}"))
        return True

    def clear(self) -> None:
        for root in self._places.values():
            clear_aside(root)


def open_store(settings: Settings) -> ArtifactStore:
    """The store of ARTIFACTS_URL; the data folder's own where it is empty. ValueError says what is wrong with the address."""
    url = settings.artifacts_url
    if not url:
        return LocalStore.below(settings.data_dir)
    if "://" not in url or url.startswith("file://"):
        root = Path(url.removeprefix("file://"))
        if not root.is_absolute():
            raise ValueError("ARTIFACTS_URL: give a whole path or an address such as s3://bucket/folder")
        return LocalStore({kind: root / kind for kind in KINDS})
    options = settings.artifacts_options.get_secret_value() if settings.artifacts_options else ""
    cache = str((settings.data_dir / "cache" / "artifacts").resolve())
    return _remote(url, options, cache, settings.artifacts_cache_max_bytes, settings.artifacts_grace_s)


@lru_cache(maxsize=8)  # it remembers what it has verified
def _remote(url: str, options: str, cache: str, cache_max_bytes: int, grace_s: float) -> ArtifactStore:
    from service.object_store import ObjectStore

    return ObjectStore(url, options, Path(cache), cache_max_bytes, grace_s)


async def brought(store: ArtifactStore, artifact: Artifact) -> Path:
    """`fetch` for the event loop: at once where it is at hand, else in one of a few threads of its own."""
    path = store.at_hand(artifact)
    if path is None:
        path = await asyncio.get_running_loop().run_in_executor(_carriers, store.fetch, artifact)
    return path


def damaged(kind: str) -> Problem:
    what = {ADAPTERS: "adapter", REPORTS: "report", DATASETS: "data set"}[kind]
    return Problem("artifact_damaged", f"The stored {what} is missing or fails its digest; restore it from a backup.")


def sync_tree(root: Path) -> None:
    """Bring a folder's files to the disk before its name is: a rename must not outlive the bytes after a power cut."""
    for path in [*root.rglob("*"), root, root.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _renamed(source: Path, target: Path) -> bool:
    """Whether a rename did it: not from one disk to another."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True
