"""The key under which UIDs of uploaded DICOM files are remapped: HSCR_UID_KEY, else a secret made once in the data folder.

Under one key files of one study stay together over all uploads. Whoever has it can tell whether a UID that they know is here, so it is in
no backup. Logs and the database never see it.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from service.settings import Settings

FILE = "uid.key"


def uid_key(settings: Settings) -> bytes:
    """The operator's key, or the data folder's."""
    given = settings.uid_key
    return given.get_secret_value().encode() if given is not None else of_folder(settings.data_dir)


def of_folder(data_dir: Path) -> bytes:
    """32 random bytes, the same for every process that asks: whoever makes the file first has made it for all."""
    path = data_dir / FILE
    if not path.is_file():
        data_dir.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{FILE}.{uuid4().hex}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path.read_bytes()
