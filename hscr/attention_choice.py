"""Which attention scores answers in an optimisation, SDPA under masks or packed rows by blocks: chosen once a run, kept with it.

On CUDA both are timed, forward and backward, on the first records that share a pass of the run, and the faster is taken; elsewhere, and
where a family's masks or anything else stand against blocks, it is SDPA. Policy and reference take the same: in bfloat16 they differ by up
to 0.04 nats. Knows no loss: whoever optimises hands in the work.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from hscr.artifacts import write_json
from hscr.block_attention import why_not
from hscr.events import Event, Metrics, Warning_, first_line
from hscr.model import VLM

T = TypeVar("T")
NAME = "attention.json"
WORTH = 200  # records scored in a run, from which on a kernel that takes half a minute to compile may pay
log = logging.getLogger("hscr.attention")


@dataclass(frozen=True)
class Attention:
    """`kind` sdpa or flex, and what led to it: milliseconds of both where they were timed, or why there was no choice."""

    kind: str
    sdpa_ms: float | None = None
    flex_ms: float | None = None
    why: str | None = None

    @property
    def blocks(self) -> bool:
        return self.kind == "flex"


SDPA = Attention("sdpa")


def attention_events(stage: str, attention: Attention) -> Iterator[Event]:
    """What a run tells of its attention: the times where both were taken, and a warning where something stood against flex."""
    ms = {"attention/sdpa_ms": attention.sdpa_ms, "attention/flex_ms": attention.flex_ms}
    timed = {name: value for name, value in ms.items() if value is not None}
    if timed:
        yield Metrics(stage, 0, {**timed, "attention/flex": float(attention.blocks)})
    if attention.why is not None:
        yield Warning_("attention", f"attention is SDPA's, not flex_attention's: {attention.why}")


def check_attention(vlm: VLM, wanted: str) -> None:
    """ValueError where `flex` is asked for and this model on this device cannot have it."""
    if wanted == "flex" and (reason := why_not(vlm)):
        raise ValueError(f"optimization.attention: flex is not possible here: {reason}; `auto` takes what is")


def chosen(vlm: VLM, wanted: str, folder: Path, n_scored: int, work: Callable[[bool], object]) -> Attention:
    """The attention of a run whose `folder` keeps it. `wanted`: auto, sdpa or flex. `work(blocks)` scores the run's first records with
    gradients; `n_scored` records are scored in all. A reference that another attention computed is deleted."""
    path, reference = folder / NAME, folder / "reference.json"
    if path.is_file():
        kept = Attention(**json.loads(path.read_text()))
        reason = why_not(vlm) if kept.blocks else None
        if reason is None:
            return kept
        found = Attention("sdpa", why=reason)  # the run has moved to another machine
        reference.unlink(missing_ok=True)
    elif wanted == "sdpa" or why_not(vlm) is not None or reference.is_file():
        return SDPA  # a reference without a choice is SDPA's
    elif wanted == "flex":
        found = Attention("flex")
    elif n_scored < WORTH:
        return SDPA
    else:
        found = _measured(work)
    write_json(path, asdict(found))
    return found


def _measured(work: Callable[[bool], object]) -> Attention:
    """SDPA first: what it needs is needed whatever comes of flex."""
    sdpa = _ms(work, False)
    try:
        flex = _ms(work, True)
    except Exception as error:  # no compiler, no kernel for this shape, out of memory: the other way works
        return Attention("sdpa", sdpa, why=first_line(error))
    log.info("attention: %.1f ms with SDPA, %.1f ms with flex_attention", sdpa, flex)
    return Attention("flex" if flex < sdpa else "sdpa", sdpa, flex)


def _ms(work: Callable[[bool], object], blocks: bool) -> float:
    """The faster of two, after one that compiles and warms up."""
    times = []
    for _ in range(3):
        _settle()
        start = time.perf_counter()
        work(blocks)
        _settle()
        times.append(1000 * (time.perf_counter() - start))
    return min(times[1:])


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Guarded:
    """A run's attention, which becomes SDPA where flex fails in the middle."""

    def __init__(self, attention: Attention, folder: Path | None) -> None:
        self.attention, self._folder = attention, folder

    def __call__(self, run: Callable[[], T]) -> T:
        """run(), again with SDPA where it fails with flex. Running out of memory, an image that cannot be read and a record that fits no
        device are not this one's matter."""
        try:
            return run()
        except (torch.OutOfMemoryError, OSError, ValueError):
            raise
        except Exception as error:
            if not self.attention.blocks:
                raise
            failed = Attention("sdpa", self.attention.sdpa_ms, self.attention.flex_ms, first_line(error))
        self.agree([failed])
        return run()

    def agree(self, others: Sequence[Attention]) -> None:
        """SDPA from now on where flex has failed in any of the processes that share a step."""
        failed = next((a for a in others if not a.blocks), None)
        if failed is None or not self.attention.blocks:
            return
        self.attention = failed
        log.warning("flex_attention failed, going on with SDPA: %s", failed.why)
        if self._folder is not None:  # the first process of several keeps it
            write_json(self._folder / NAME, asdict(failed))
