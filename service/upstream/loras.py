"""Which adapters the model server has loaded: named by digest, loaded when first asked for, the least recently used one out first."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hscr.artifacts import verify_manifest
from service.engine import AdapterDamaged
from service.errors import Problem
from service.upstream.server import ModelServer

log = logging.getLogger("hscr.upstream")


class Loras:
    """At most `most` loaded, but for those in use. `data_dir` is the service's data folder, `seen_as` what the server calls it."""

    def __init__(self, server: ModelServer, data_dir: Path, seen_as: str, most: int) -> None:
        self._server, self._data_dir, self._most = server, data_dir.resolve(), most
        self._seen_as = seen_as.rstrip("/")
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._used: Counter[str] = Counter()
        self._lock = asyncio.Lock()

    @property
    def loaded(self) -> int:
        """How many."""
        return len(self._loaded)

    @asynccontextmanager
    async def use(self, digest: str | None, folder: Path | None) -> AsyncIterator[str]:
        """The name that the server answers to for this adapter, the base model's for None; it stays loaded meanwhile. Raises Problem."""
        if digest is None or folder is None:
            yield self._server.model
            return
        name = name_of(digest)
        async with self._lock:
            if name not in self._loaded:
                await self._load(name, digest, folder)
            self._loaded.move_to_end(name)
            self._used[name] += 1
        try:
            yield name
        finally:
            self._used[name] -= 1

    def forget(self, digest: str) -> None:
        """The server lost it: it was started anew."""
        self._loaded.pop(name_of(digest), None)

    def _path(self, folder: Path) -> str:
        """What the server calls the folder. One outside the data folder (a cache of object storage) has one name only."""
        own = folder.resolve()
        if not self._seen_as or not own.is_relative_to(self._data_dir):
            return str(own)
        return f"{self._seen_as}/{own.relative_to(self._data_dir).as_posix()}"

    async def _load(self, name: str, digest: str, folder: Path) -> None:
        try:
            await asyncio.to_thread(verify_manifest, folder, digest)
        except (OSError, ValueError) as error:
            raise AdapterDamaged(digest) from error
        if not await self._server.load_adapter(name, self._path(folder)):
            log.error(
                "the model server loads no adapter %s: it needs --enable-lora, --max-lora-rank, "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and the data folder (HSCR_UPSTREAM_DATA_DIR)",
                digest,
            )
            raise Problem("adapter_not_loadable", "The service's log says what the model server needs for it.")
        self._loaded[name] = None
        for old in [n for n in self._loaded if not self._used[n] and n != name][: len(self._loaded) - self._most]:
            del self._loaded[old]
            await self._server.unload_adapter(old)


def name_of(digest: str) -> str:
    return f"hscr-{digest.rpartition(':')[2][:32]}"
