"""One device, two owners: the API's engine and the worker's runs. Each says by a flag that it is there, and a setting says who yields.

A flag is a flock on a file in the data folder, named by the device: the kernel lowers a dead process's flag, so nobody waits for it. Knows
no torch, no rows and no queue.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.settings import Settings

log = logging.getLogger("hscr.device")
SERVING, TRAINING = "serving", "training"
SHARE, SERVE_FIRST, TRAIN_FIRST = "share", "serve_first", "train_first"
LOOK_S = 0.2


@dataclass(frozen=True)
class Device:
    """The device that a deployment's settings name."""

    folder: Path
    name: str
    policy: str

    @classmethod
    def of(cls, settings: Settings) -> Device:
        """By HSCR_DEVICE_NAME, else by what chooses it: two containers of one host see one device so."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("NVIDIA_VISIBLE_DEVICES") or "all"
        name = settings.device_name or f"{settings.device}-{seen}"
        return cls(settings.data_dir / "devices", re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100], settings.device_policy)

    @contextmanager
    def flag(self, what: str, *, alone: bool = False) -> Iterator[int | None]:
        """Raise a flag while the block lasts; its descriptor, for children that hold it too. None where `alone` it cannot be raised."""
        descriptor = self._open(what)
        try:
            yield descriptor if _locked(descriptor, alone=alone) else None
        finally:
            os.close(descriptor)

    def is_up(self, what: str) -> bool:
        """Whether anybody has raised a flag."""
        descriptor = self._open(what)
        try:
            return not _locked(descriptor, alone=True)
        finally:
            os.close(descriptor)

    def _open(self, what: str) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        return os.open(self.folder / f"{self.name}.{what}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


class EngineTurn:
    """The engine's side, in the batcher's thread: load when the device is ours, and with `train_first` step aside for a run.

    `expected_s` is asked now and then how long the run may take yet (None: nobody knows).
    """

    def __init__(
        self,
        device: Device,
        load: Callable[[], None],
        unload: Callable[[], None],
        expected_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._device, self._load, self._unload, self._expected_s = device, load, unload, expected_s
        self.away = False
        self.back_in_s = 60
        self.stop = threading.Event()  # the process is shutting down
        self._looked = 0.0
        self._wanted = False
        self._flag: int | None = None

    def begin(self) -> None:
        """Take the device and load."""
        while not self.stop.is_set():
            # A run that sees the flag goes (serve_first); one that goes first is let go first (train_first).
            if self._device.policy != TRAIN_FIRST or not self._device.is_up(TRAINING):
                self._raise()
                if self._device.policy == SHARE or not self._device.is_up(TRAINING):
                    self._load()
                    self.away = False
                    return
                if self._device.policy == TRAIN_FIRST:
                    self._lower()
            self.away = True
            self._wait()

    def asked(self) -> bool:
        """Whether a run waits for the device."""
        if self._device.policy == TRAIN_FIRST and time.monotonic() - self._looked > LOOK_S:
            self._wanted, self._looked = self._device.is_up(TRAINING), time.monotonic()
        return self._wanted

    def step_aside(self) -> None:
        """Give the device away and come back when it is free."""
        log.info("the engine leaves the device to a run")
        self.away = True
        self._unload()
        self._lower()
        self._wanted = False
        self.begin()
        log.info("the engine is back on the device")

    def _raise(self) -> None:
        if self._flag is None:
            self._flag = self._device._open(SERVING)
            fcntl.flock(self._flag, fcntl.LOCK_SH)

    def _lower(self) -> None:
        if self._flag is not None:
            os.close(self._flag)
            self._flag = None

    def _wait(self) -> None:
        expected = self._expected_s()
        self.back_in_s = 60 if expected is None else max(1, min(86400, round(expected) + 5))  # and the time to load
        until = time.monotonic() + 2
        while time.monotonic() < until and not self.stop.is_set() and self._device.is_up(TRAINING):
            self.stop.wait(LOOK_S)


class RunTurn:
    """A run's side: whether it must wait for the engine, or give the device back to it. `descriptor`: the flag, for the run to inherit."""

    def __init__(self, device: Device, descriptor: int | None) -> None:
        self._device, self.descriptor = device, descriptor

    def must_wait(self) -> bool:
        """The engine has not left yet."""
        return self._device.policy == TRAIN_FIRST and self._device.is_up(SERVING)

    def must_go(self) -> bool:
        """The engine wants the device."""
        return self._device.policy == SERVE_FIRST and self._device.is_up(SERVING)

    def must_fit(self) -> bool:
        """There is an engine beside the run."""
        return self._device.policy == SHARE and self._device.is_up(SERVING)


@contextmanager
def for_run(settings: Settings) -> Iterator[RunTurn | None]:
    """The device for a run while the block lasts; None where it is not to be had now: another run has it, or the engine goes first."""
    device = Device.of(settings)
    if device.policy == SHARE:
        yield RunTurn(device, None)
        return
    with device.flag(TRAINING, alone=True) as descriptor:
        turn = RunTurn(device, descriptor)
        yield None if descriptor is None or turn.must_go() else turn


@contextmanager
def for_helper(settings: Settings) -> Iterator[RunTurn | None]:
    """The same for a helper, which drives no engine away: None too while one has the device that it would leave to a run."""
    device = Device.of(settings)
    if device.policy == TRAIN_FIRST and device.is_up(SERVING):
        yield None  # before the flag is raised, at which the engine would go
        return
    with for_run(settings) as turn:
        yield None if turn is None or turn.must_wait() else turn


def is_accelerator(settings: Settings) -> bool:
    """Whether runs use a device with a memory of its own, as far as can be told without torch."""
    if settings.device == "auto":
        return Path("/dev/nvidiactl").exists()
    return settings.device != "cpu"


def _locked(descriptor: int, *, alone: bool) -> bool:
    """Others' glances at a flag hold it for a moment: look more than once."""
    for again in (True, True, False):
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            if again:
                time.sleep(0.01)
        else:
            return True
    return False
