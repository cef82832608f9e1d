"""Artifacts behind an address (S3, or whatever fsspec reaches), with a bounded cache of folders in the data folder.

Object stores have no rename: a folder's files go up under its digest, its manifest last, and what has no manifest is not there. What comes
down is verified file by file against the manifest, and the manifest against the digest that the row holds, before anybody sees it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import fsspec

from hscr.artifacts import MANIFEST, bytes_digest, verify_manifest
from service.artifact_store import DATASETS, Artifact, damaged
from service.errors import Problem

log = logging.getLogger("hscr.artifacts")
MARK = "hscr-artifacts.json"  # at the root: where it is missing the bucket is, not one artifact
REST_S = 5.0  # after a failure to reach the store, callers are refused at once for so long
SPARED_S = 600.0  # what was asked for so lately stays in the cache
_S3 = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 20,
        "retries": {"max_attempts": 1},
        # Not all that speak S3 do these as Amazon does (rclone's fail a large object); here every file is verified by its sha256.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
}


class ObjectStore:
    """A store behind `url`. `cache_max_bytes` bounds what is kept on the local disk, `grace_s` spares young objects from collection."""

    def __init__(self, url: str, options: str, cache: Path, cache_max_bytes: int, grace_s: float) -> None:
        given = _options(options)
        if url.startswith(("s3://", "s3a://")):
            given = _S3 | given
        try:
            self._fs, root = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **given)
        except ImportError:
            hint = "pip install 'hscr[s3]'" if url.startswith("s3") else "install its fsspec package"
            raise ValueError(f"ARTIFACTS_URL: {url.partition('://')[0]}:// is not installed here; {hint}") from None
        except (ValueError, TypeError):
            raise ValueError("ARTIFACTS_URL or ARTIFACTS_OPTIONS: fsspec does not know them") from None
        if hasattr(self._fs, "retries"):
            self._fs.retries = 2
        self._root = root.rstrip("/")
        self._cache, self._cache_max_bytes, self._grace_s = cache, cache_max_bytes, grace_s
        self._verified: set[Path] = set()  # cached folders that this process has read whole
        self._turns: defaultdict[Artifact, threading.Lock] = defaultdict(threading.Lock)
        self._manifests: OrderedDict[Artifact, dict[str, str]] = OrderedDict()
        self._away_until = 0.0

    def put(self, artifact: Artifact, source: Path, *, give: bool = False) -> str:
        if not give:
            verify_manifest(source, artifact.files)
        manifest = (source / MANIFEST).read_bytes()
        files = sorted(p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file())
        files.remove(MANIFEST)
        sizes = {name: (source / name).stat().st_size for name in files}
        with self._reached():
            there = self._whole_there(artifact, _entries(manifest), sizes)
            if there is not None:
                self._fs.pipe_file(
                    self._key(artifact, MANIFEST), there
                )  # young again: no collector takes it for forgotten
                return bytes_digest(there)
            if not self._fs.exists(f"{self._root}/{MARK}"):
                self._fs.pipe_file(f"{self._root}/{MARK}", json.dumps({"format": 1}).encode())
            self._fs.put([str(source / name) for name in files], [self._key(artifact, name) for name in files])
            if self._sizes(artifact) != sizes:
                raise OSError("the store holds other sizes than were sent")
            self._fs.pipe_file(self._key(artifact, MANIFEST), manifest)
        if give:
            self._keep(artifact, source)
        return bytes_digest(manifest)

    def at_hand(self, artifact: Artifact) -> Path | None:
        path = self._place(artifact)
        if path in self._verified and path.is_dir():
            _touch(path)
            return path
        return None

    def fetch(self, artifact: Artifact) -> Path:
        with self._turns[artifact]:
            path = self.at_hand(artifact) or self._verified_copy(artifact)
            return path or self._download(artifact)

    def checked(self, artifact: Artifact) -> Path:
        with self._turns[artifact]:
            return self._verified_copy(artifact) or self._download(artifact)

    @contextmanager
    def lent(self, artifact: Artifact, *, check: bool = False) -> Iterator[Path]:
        with ExitStack() as stack:
            while True:
                path = self.checked(artifact) if check else self.fetch(artifact)
                with suppress(FileNotFoundError):  # it left the cache in between
                    stack.enter_context(_held(path, fcntl.LOCK_SH))
                    break
            yield path

    @contextmanager
    def lent_file(self, artifact: Artifact, name: str) -> Iterator[Path]:
        folder = self.at_hand(artifact)
        if folder is not None and (folder / name).is_file():
            yield folder / name
            return
        digest = self._manifest(artifact).get(name)
        if digest is None:
            raise damaged(artifact.kind)
        with self._incoming() as scratch:
            path = scratch / PurePosixPath(name).name
            with self._reached(artifact):
                self._fs.get_file(self._key(artifact, name), str(path))
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise damaged(artifact.kind)
            yield path

    def names(self, kind: str) -> list[str]:
        with self._reached():
            try:
                return [PurePosixPath(key).name for key in self._fs.ls(f"{self._root}/{kind}", detail=False)]
            except FileNotFoundError:
                return []

    def remove(self, kind: str, name: str) -> bool:
        prefix = f"{self._root}/{kind}/{name}"
        with self._reached():
            found: dict[str, dict[str, Any]] = self._fs.find(prefix, detail=True)
            newest = max((_modified(info) for info in found.values()), default=0.0)
            if not found or time.time() - newest < self._grace_s:
                return False
            keys = sorted(
                found, key=lambda key: not key.endswith(f"/{MANIFEST}")
            )  # the manifest first: now it is not there
            with suppress(FileNotFoundError):
                self._fs.rm_file(keys[0])
                if keys[1:]:
                    self._fs.rm(keys[1:])
        return True

    def clear(self) -> None:
        """Nothing to free: objects are gone at once."""

    # The store

    @contextmanager
    def _reached(self, artifact: Artifact | None = None) -> Iterator[None]:
        """Turn what goes wrong on the way into a Problem; what is missing means damage only where the store itself is there."""
        if time.monotonic() < self._away_until:
            raise unavailable()
        try:
            yield
        except Problem:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            if artifact is not None and isinstance(error, FileNotFoundError) and self._is_there():
                raise damaged(artifact.kind) from None
            # Its kind only: the text may hold an address with what opens it.
            log.warning("the artifact store does not answer as it should: %s", type(error).__name__)
            self._away_until = time.monotonic() + REST_S
            raise unavailable() from None

    def _is_there(self) -> bool:
        with suppress(Exception):
            return bool(self._fs.exists(f"{self._root}/{MARK}"))
        return False

    def _key(self, artifact: Artifact, name: str) -> str:
        return f"{self._root}/{artifact.kind}/{artifact.name}/{name}"

    def _sizes(self, artifact: Artifact) -> dict[str, int]:
        """The objects under an artifact's name, but for the manifest."""
        prefix = f"{self._root}/{artifact.kind}/{artifact.name}/"
        found: dict[str, dict[str, Any]] = self._fs.find(prefix.rstrip("/"), detail=True)
        sizes = {key.lstrip("/").removeprefix(prefix.lstrip("/")): info["size"] for key, info in found.items()}
        sizes.pop(MANIFEST, None)
        return sizes

    def _whole_there(self, artifact: Artifact, mine: dict[str, str], sizes: dict[str, int]) -> bytes | None:
        """The manifest that is stored already, where its objects are too, and as large as the same files here.

        A data set's may be another one: an earlier version of this program may have written the same records in other words.
        """
        try:
            there: bytes = self._fs.cat_file(self._key(artifact, MANIFEST))
        except FileNotFoundError:
            return None
        if artifact.kind != DATASETS and bytes_digest(there) != artifact.files:
            return None
        entries, found = _entries(there), self._sizes(artifact)
        same = all(
            found[name] == sizes[name] for name in found.keys() & sizes.keys() if entries.get(name) == mine[name]
        )
        return there if same and found.keys() == entries.keys() else None

    def _manifest(self, artifact: Artifact) -> dict[str, str]:
        """Name -> sha256 of an artifact's files, by a manifest that was verified."""
        if artifact in self._manifests:
            return self._manifests[artifact]
        with self._reached(artifact):
            text: bytes = self._fs.cat_file(self._key(artifact, MANIFEST))
        if artifact.files is not None and bytes_digest(text) != artifact.files:
            raise damaged(artifact.kind)
        entries = _entries(text)
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in entries):
            raise damaged(artifact.kind)
        self._manifests[artifact] = entries
        if len(self._manifests) > 4:
            self._manifests.popitem(last=False)
        return entries

    def _download(self, artifact: Artifact) -> Path:
        names = [MANIFEST, *self._manifest(artifact)]
        with self._incoming() as scratch:
            folder = scratch / artifact.name
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with self._reached(artifact):
                self._fs.get([self._key(artifact, name) for name in names], [str(folder / name) for name in names])
            try:
                verify_manifest(folder, artifact.files)
            except ValueError:
                raise damaged(artifact.kind) from None
            return self._keep(artifact, folder)

    # The cache

    def _place(self, artifact: Artifact) -> Path:
        return self._cache / artifact.kind / artifact.name

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        scratch = self._cache / f".incoming-{uuid4().hex}"
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _keep(self, artifact: Artifact, folder: Path) -> Path:
        """Take a verified folder into the cache, and let go of what was not asked for longest."""
        path = self._place(artifact)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(path)
            self._verified.add(path)
        except OSError:
            # Another process was first, whose folder is read before its first use here, or the folder lies on another disk: it comes
            # down when it is asked for.
            pass
        _touch(path)
        self._evict()
        return path

    def _verified_copy(self, artifact: Artifact) -> Path | None:
        """The cached folder after its files were read; None where there is none, or what there was is spoilt and gone."""
        path = self._place(artifact)
        if not path.is_dir():
            return None
        try:
            verify_manifest(path, artifact.files)
        except (ValueError, OSError):
            self._verified.discard(path)
            _discard(path)
            return None
        self._verified.add(path)
        _touch(path)
        return path

    def _evict(self) -> None:
        """Least lately used first, and nothing that is lent or was asked for in the last minutes."""
        for left in self._cache.glob(".incoming-*"):
            if time.time() - left.stat().st_mtime > 86400:  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        folders = []
        for path in self._cache.glob("*/sha256-*"):
            with suppress(FileNotFoundError):
                size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                folders.append((path.stat().st_mtime, size, path))
        total = sum(size for _, size, _ in folders)
        for used, size, path in sorted(folders):
            if total <= self._cache_max_bytes or time.time() - used < SPARED_S:
                return
            with suppress(BlockingIOError, FileNotFoundError), _held(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                _discard(path)
                total -= size


def unavailable() -> Problem:
    detail = "The artifact store does not answer, or refuses its credentials. Try again in a while."
    return Problem("artifacts_unavailable", detail, headers={"Retry-After": "30"})


@contextmanager
def _held(path: Path, how: int) -> Iterator[None]:
    """A flock on the folder itself. FileNotFoundError where it went meanwhile, BlockingIOError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        if os.stat(path).st_ino != os.fstat(descriptor).st_ino:
            raise FileNotFoundError
        yield
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    gone = path.parent.parent / f".incoming-{uuid4().hex}"
    with suppress(FileNotFoundError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _touch(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.utime(path)


def _modified(info: dict[str, Any]) -> float:
    """When an object was last written, in seconds; now where its file system does not tell, so that it is never old."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.replace(tzinfo=value.tzinfo or UTC).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()


def _entries(manifest: bytes) -> dict[str, str]:
    """Name -> sha256, as SHA256SUMS writes them."""
    lines = (line.partition("  ") for line in manifest.decode(errors="replace").splitlines())
    return {name: digest for digest, _, name in lines}


def _options(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text or "{}")
    except json.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise ValueError('ARTIFACTS_OPTIONS: give a JSON object, as {"endpoint_url": "https://…", "key": "…"}')
    return given
