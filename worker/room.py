"""Room on the data folder's disk: below the reserve no job is claimed, and a run is stopped after a checkpoint.

The reserve is what a checkpoint, an adapter and the database (SQLite lies on the same disk) still need for an orderly end.
"""

from __future__ import annotations

import shutil

from service.settings import Settings

CODE = "disk_full"
MESSAGE = "the disk of the data folder is full; free some space: the job then goes on from its last checkpoint, a failed one with /retry"


def has_room(settings: Settings) -> bool:
    """What counts is what a process without special rights may still write."""
    try:
        return shutil.disk_usage(settings.data_dir).free >= settings.disk_reserve_bytes
    except FileNotFoundError:  # made by the first who writes there
        return True
