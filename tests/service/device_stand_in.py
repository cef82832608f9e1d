"""`python -m tests.service.device_stand_in PORT DEVICE`: an API whose engine echoes, with a file in the place of a device's memory.

Whoever uses the device makes the file, and fails where it is there already; so two users at once are seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from service.app import create_app
from service.settings import Settings
from tests.service.test_vqa import Echo


class OnDevice(Echo):
    device: Path

    def load(self) -> None:
        with self.device.open("x") as file:
            file.write("engine")
        super().load()

    def unload(self) -> None:
        self.device.unlink()


if __name__ == "__main__":
    settings = Settings(port=int(sys.argv[1]))
    engine = OnDevice(settings)
    engine.device = Path(sys.argv[2])
    uvicorn.run(create_app(settings, engine), host="127.0.0.1", port=settings.port, access_log=False)
