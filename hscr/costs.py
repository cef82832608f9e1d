"""What the stages of a run really took: seconds and peak memory, added up over its attempts, in RUN/costs.json."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hscr.artifacts import write_json
from hscr.events import Event, Progress
from hscr.model import VLM

NAME = "costs.json"


def measured(run: Path, stage: str, events: Iterator[Event], vlm: VLM) -> Iterator[Event]:
    """Pass a stage's events on and note what it took, also where it stops half-way: `units` done, `seconds`, peak `bytes`.

    Bytes: allocated on a CUDA device; elsewhere the weights and what the process's resident memory grew by. A killed attempt leaves
    nothing.
    """
    path, units, first = run / NAME, 0, None
    memory = _Memory(vlm)
    start = time.monotonic()
    try:
        for event in events:
            if isinstance(event, Progress):
                first = event.done if first is None else first
                units = event.done - first
            yield event
    finally:
        if first is not None:  # a skipped stage costs nothing
            known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
            before = known.get(stage, {"units": 0, "seconds": 0.0, "bytes": 0})
            known[stage] = {
                "units": before["units"] + units,
                "seconds": before["seconds"] + time.monotonic() - start,
                "bytes": max(before["bytes"], memory.peak()),
            }
            write_json(path, known)


class _Memory:
    """The peak from here on; without CUDA and Linux's /proc none is known (0)."""

    def __init__(self, vlm: VLM) -> None:
        self.device = vlm.device
        self.weights = sum(p.numel() * p.element_size() for p in vlm.base.parameters())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").is_file():
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before = _resident("VmRSS")

    def peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return self.weights + max(_resident("VmHWM") - self.before, 0) if self.before else 0


def _resident(name: str) -> int:
    status = Path("/proc/self/status")
    rows = status.read_text().splitlines() if status.is_file() else []
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith(name)), 0)
