"""Uploads of foreign PEFT adapters: a zip in, a version out, with every check made before anything loads it (hscr/foreign_adapter.py).

What is refused leaves nothing behind. The base's shapes are asked of a child process, once. No torch and no web framework here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import IO
from uuid import uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from hscr import foreign_adapter
from hscr.artifacts import write_manifest
from service import adapters, artifact_store, audit
from service.archive import ArchiveLimits, flatten, unpack
from service.artifact_store import ArtifactStore
from service.db import Database
from service.errors import Problem
from service.models import AdapterVersion
from service.retention import artifacts_held
from service.settings import Settings, without_secrets

_KEPT = frozenset({".safetensors", ".json"}) | foreign_adapter.PICKLES


def upload(
    database: Database, settings: Settings, store: ArtifactStore, by: str, name: str, file: IO[bytes]
) -> tuple[AdapterVersion, bool]:
    """The version and whether it is new: the same weights under the same name are the version that is there. Raises Problem."""
    incoming = settings.data_dir / "datasets" / f".incoming-{uuid4().hex}"  # where the sweep leaves it alone
    incoming.mkdir(parents=True)
    try:
        most = settings.adapter_max_bytes
        unpack(file, incoming / "upload", ArchiveLimits(most, 1000, most), _KEPT)
        (incoming / "upload").mkdir(exist_ok=True)  # a zip of nothing that is kept
        try:
            found = foreign_adapter.check(
                flatten(incoming / "upload"), lambda: base_shapes(settings.model_path, settings.model_revision)
            )
        except ValueError as error:
            raise Problem("invalid_adapter", f"{error}.") from None
        plain = incoming / "plain"
        foreign_adapter.write_plain(found, plain, settings.model_id)
        digest = write_manifest(plain)
        with artifacts_held(settings.data_dir, database):
            store.put(artifact_store.adapter(digest), plain, give=True)
            config = {"optimization": {"lora_rank": found.rank, "lora_alpha": found.alpha}}
            with database.write() as session:
                return _register(session, by, name, digest, settings.model_id, config)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


@cache
def base_shapes(model: str, revision: str | None) -> dict[str, tuple[int, int]]:
    """The base's linear layers. Raises Problem."""
    done = subprocess.run(
        [sys.executable, "-m", "hscr.base_shapes", model, *([revision] if revision else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=without_secrets(),
        cwd=Path(foreign_adapter.__file__).parent.parent,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        raise Problem("base_unknown", "The served base model's layers cannot be read; GET /readyz says more.")
    return {name: (shape[0], shape[1]) for name, shape in json.loads(done.stdout).items()}


def _register(
    session: Session, by: str, name: str, digest: str, model: str, config: dict[str, dict[str, int]]
) -> tuple[AdapterVersion, bool]:
    number = adapters.next_version(session, name)  # its row lock orders uploads of one name
    query = select(AdapterVersion).where(AdapterVersion.adapter_name == name, AdapterVersion.digest == digest)
    known = session.scalars(query.order_by(AdapterVersion.version)).first()
    if known is not None:
        session.expunge(known)
        session.rollback()  # the number is not used up
        return known, False
    version = AdapterVersion(
        adapter_name=name, version=number, source="upload", digest=digest, model=model, config=config, metrics={}
    )
    session.add(version)
    session.flush()
    audit.record(session, by, "version.upload", f"{name}:{number}", digest=digest)
    return version, True
