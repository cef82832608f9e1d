"""Image features and prompt tokens kept by digest: in memory, and below it on disk across runs.

What the frozen tower and projector make of an image depends on its pixels, the processor and the model alone, so a run over known images
never runs the tower. On disk a feature file's folder names model and processor (their digest), dtype and kind of device; its name is the
digest of the pixels. Everything there may be deleted at any time.
"""

from __future__ import annotations

import os
import tempfile
import time
import zlib
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hscr.artifacts import json_digest

UNUSED_S = 30 * 86400  # what nobody read for so long goes: features come from health data


class FeatureCache:
    """Tensors by digest (projected image features; token ids of prompts), least recently used out first, bounded in bytes.

    Where `disk` is given, what is put goes there too, and what memory has no more is read from there.
    """

    def __init__(self, max_bytes: int = 512 * 2**20, disk: DiskFeatures | None = None) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self.hits = self.misses = 0
        self.disk = disk
        self._items: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str) -> Tensor | None:
        if key in self._items:
            self.hits += 1
            self._items.move_to_end(key)
            return self._items[key]
        found = self.disk.get(key) if self.disk is not None else None
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self._hold(key, found)
        return found

    def put(self, key: str, features: Tensor) -> None:
        if key in self._items:
            return
        if self.disk is not None:
            self.disk.put(key, features)
        self._hold(key, features.detach().clone())  # a view would keep the whole tower batch alive

    def _hold(self, key: str, features: Tensor) -> None:
        if features.nbytes > self.max_bytes:
            return
        self._items[key] = features
        self.n_bytes += features.nbytes
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= self._items.popitem(last=False)[1].nbytes


class DiskFeatures:
    """A folder of features, one safetensors file each, bounded in bytes over all models: those longest unread go first.

    Any number of processes may share the folder. A file that is damaged, or goes while it is read, counts as not there; a disk that takes
    no more ends the writing, not the run.
    """

    def __init__(self, folder: Path, *, identity: object, device: torch.device, max_bytes: int) -> None:
        self.folder = folder
        self.device = device
        self.max_bytes = max_bytes
        self._own = folder / json_digest(identity).removeprefix("sha256:")[:32]
        self._written = 0
        self._full = False
        self._trim()

    def _path(self, key: str) -> Path:
        return self._own / f"{key.removeprefix('sha256:')}.safetensors"

    def get(self, key: str) -> Tensor | None:
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                features: Tensor = file.get_tensor("features")
                whole = (file.metadata() or {}).get("crc32") == _crc32(features)
            if not whole:  # a power cut may leave a file of the right size full of zeros
                return None
            os.utime(path)  # read now: the last to go
        except (OSError, SafetensorError):
            return None
        return features.to(self.device)

    def put(self, key: str, features: Tensor) -> None:
        path = self._path(key)
        if self._full or path.exists():
            return
        features = features.detach().cpu().contiguous()
        try:
            self._own.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=self._own, suffix=".tmp", delete=False) as file:
                file.write(save({"features": features}, {"crc32": _crc32(features)}))
            os.replace(file.name, path)
        except OSError:
            self._full = True
            return
        self._written += features.nbytes
        if self._written > self.max_bytes // 16:  # counting the folder costs: not at each file
            self._trim()

    def _trim(self) -> None:
        """Delete what was unread too long, then the longest unread until a sixteenth below the bound is free to write."""
        self._written = 0
        files = []
        for path in self.folder.glob("*/*"):
            try:
                stat = path.stat()
            except OSError:  # another process trims too
                continue
            files.append((stat.st_mtime, stat.st_size, path))
        left, oldest = sum(size for _, size, _ in files), time.time() - UNUSED_S
        for used, size, path in sorted(files):
            if used >= oldest and left <= self.max_bytes - self.max_bytes // 16:
                break
            path.unlink(missing_ok=True)
            left -= size


def _crc32(features: Tensor) -> str:
    return str(zlib.crc32(features.contiguous().view(torch.uint8).numpy().data))


def features_folder() -> Path | None:
    """Where features are kept: HSCR_FEATURE_CACHE (`off`: nowhere), else hscr/features in the user's cache folder."""
    given = os.environ.get("HSCR_FEATURE_CACHE", "")
    if given == "off":
        return None
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hscr" / "features"
