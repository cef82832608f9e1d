"""Decode steps of fixed shape, so that a CUDA graph can replay them: a step's kernels are launched by one call instead of hundreds.

A step works on whole buffers of keys and values, R rows × C columns of rounded sizes; what is not there is masked. All shapes share one
piece of memory a layer, for one cache decodes at a time, so a graph that was captured for a shape serves every later batch of that shape.
Whether a shape is worth it is measured: its first steps are the plain ones, timed; then it is captured, the next steps are timed, inputs
and all, and the faster kind stays. Anything that goes wrong is logged and leaves the plain steps. Knows no model: hscr/plain_decoder.py
passes its layers over what is here.
"""

from __future__ import annotations

import logging
import statistics
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hscr.events import Event, Metrics, Warning_, first_line
from hscr.lora_rows import LoraRows, Ranks
from hscr.prefix import GrowingLayer, joinable

if TYPE_CHECKING:
    from hscr.model import VLM
    from hscr.plain_decoder import PlainDecoder

log = logging.getLogger("hscr.static_steps")
COLUMNS = 256  # sizes of a cache are multiples of it
ROOM = 64  # columns that a batch is given beyond what it holds, at least
MOST = 16  # shapes that are remembered
LASTING = 50  # steps that adapters must have been side by side before theirs are timed: the next rows bring others, a capture is dear
Compute = Callable[[], Tensor]


class _Slots:
    """A layer's keys and values [R, groups, C, d], new ones written at the columns `at` [q]: what a step has in a cache layer's place."""

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        self.keys, self.values, self.at = keys, values, at

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys.index_copy_(2, self.at, keys), self.values.index_copy_(2, self.at, values)


class _StaticLora:
    """What LoraRows says of the rows at hand, the rows' masks in tensors that stay: rows of other adapters only fill them anew."""

    def __init__(self, lora: LoraRows, rows: int) -> None:
        self._lora, self._rows = lora, rows
        self._masks: dict[Ranks, Tensor] = {}

    def joint(self, modules: tuple[str, ...], outs: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None] | None:
        found = self._lora.laid(modules, outs)
        if found is None:
            return None
        down, up, ranks = found
        if ranks not in self._masks:
            self._masks[ranks] = down.new_zeros(self._rows, 1, len(down))
            self._fill(ranks)
        return down, up, self._masks[ranks]

    def fill(self) -> None:
        for ranks in self._masks:
            self._fill(ranks)

    def _fill(self, ranks: Ranks) -> None:
        held = self._masks[ranks]
        own = self._lora.mask(ranks, held.device)
        held.fill_(1) if own is None else held[: len(own)].copy_(own)


class StaticStep:
    """A step of q columns a row over a cache's buffers: its inputs lie in tensors that stay, so `compute` is the same work each time."""

    def __init__(
        self, decoder: PlainDecoder, buffers: Sequence[tuple[Tensor, Tensor]], positions: Tensor, lora: LoraRows | None
    ) -> None:
        """`buffers` by layer [R, groups, C, d]; `positions` [n, q] ([3, n, q]) of any step of this shape."""
        keys, q = buffers[0][0], positions.shape[-1]
        rows, columns = keys.shape[0], keys.shape[2]
        self.decoder = decoder
        self.ids = torch.zeros(rows, q, dtype=torch.long, device=keys.device)
        self.positions = self.ids.expand(*positions.shape[:-2], rows, q).clone()
        self.mask = keys.new_zeros(rows, 1, q, columns)  # to be added
        self.at = torch.zeros(q, dtype=torch.long, device=keys.device)
        self.lora = _StaticLora(lora, rows) if lora is not None else None
        self._cache: Any = SimpleNamespace(layers=[_Slots(k, v, self.at) for k, v in buffers])

    def put(self, ids: Tensor, positions: Tensor, visible: Tensor, low: int, high: int) -> None:
        """A step's inputs: ids [n, q], positions, what its columns see [n, 1, q, W], and where the W − q that are held lie."""
        n, q = ids.shape
        self.ids[:n], self.positions[..., :n, :] = ids, positions
        self.mask.fill_(torch.finfo(self.mask.dtype).min)
        self.mask[:n, :, :, low : high + q].masked_fill_(visible, 0)
        self.mask[n:, :, :, high : high + q] = (
            0  # rows that nobody has: their softmax must be finite, for it is written to the buffers
        )
        torch.arange(high, high + q, out=self.at)
        if self.lora is not None:
            self.lora.fill()

    def compute(self) -> Tensor:
        """Logits [R, q, V]; writes the new columns' keys and values."""
        return self.decoder.pass_columns(self.ids, self.positions, self._cache, self.mask, self.lora)


@dataclass
class _Shape:
    """What is known of steps of one shape: seconds of plain and of captured ones, the step, and whether it is used."""

    side: object | None
    plain: list[float] = field(default_factory=list)
    captured: list[float] = field(default_factory=list)
    step: StaticStep | None = None
    replay: Compute | None = None
    dropped: bool = False


class StaticSteps:
    """The steps of a model that are captured, by shape, and the memory that their caches share. Not thread-safe.

    `capture` turns a step's work into something that repeats it on the same tensors (`cuda_graph`); `samples` steps of each kind are
    timed before one is preferred, none where `samples` is 0.
    """

    def __init__(self, capture: Callable[[Compute], Compute], samples: int = 3) -> None:
        self.capture, self.samples = capture, samples
        self.off: str | None = None  # why nothing is captured any more
        self.choices: list[dict[str, float]] = []  # what was measured, for events
        self._shapes: OrderedDict[tuple[Any, ...], _Shape] = OrderedDict()
        self._memory: list[tuple[Tensor, Tensor]] = []  # a layer's keys and values, flat
        self._inner: list[tuple[int, int]] = []  # groups and d of each
        self._owner: weakref.ref[DynamicCache] | None = None
        self._side: object | None = None  # the adapters that lay side by side in the last step
        self._steps_beside = 0  # how many steps had them

    def logits(
        self,
        plain: Compute,
        decoder: PlainDecoder,
        ids: Tensor,
        positions: Tensor,
        visible: Tensor,
        cache: DynamicCache,
        lora: LoraRows | None,
    ) -> Tensor:
        """Logits [n, q, V] of a step of new columns ids [n, q] that see `visible` bool [n, 1, q, W], W columns with the new ones.

        `plain` computes them the plain way. Afterwards the cache holds W columns, whichever way was taken.
        """
        lasts = self._lasts(lora) if lora is not None else True
        owner = self._owner() if self._owner is not None else None
        if self.off is not None or not lasts or not joinable(cache) or (owner is not None and owner is not cache):
            return plain()
        side = lora.side if lora is not None else None
        size = self._size(cache, *ids.shape)
        shape = self._shape((*size, ids.shape[1], id(side)), side)
        if shape.dropped:
            return plain()
        if len(shape.plain) < self.samples:
            start = _now(ids.device)
            logits = plain()
            shape.plain.append(_now(ids.device) - start)
            return logits
        timed = len(shape.captured) < self.samples
        try:
            start = _now(ids.device) if timed else 0.0
            if not self._place(cache, size):
                shape.dropped = True
                return plain()
            layers = _layers(cache)
            if shape.step is None:
                with torch.inference_mode(False):  # tensors of that mode could be written to in that mode only
                    shape.step = StaticStep(decoder, self._views(size), positions, lora if side is not None else None)
            shape.step.put(ids, positions, visible, *layers[0].span)  # before a capture, which computes to warm up
            if shape.replay is None:
                timed = False  # a capture happens once, what is timed in every step
                with torch.inference_mode(False), torch.no_grad():
                    shape.replay = self.capture(shape.step.compute)
            logits = shape.replay()
            if timed:
                shape.captured.append(_now(ids.device) - start)
                self._choose(shape, size, ids.shape[1])
        except Exception as error:  # out of memory too: the plain step needs less
            self.off = first_line(error)
            log.warning("decode steps are not captured any more, the plain ones go on: %s", self.off)
            self.clear()
            return plain()
        for layer in layers:
            layer.wrote(ids.shape[1])
        return logits[: len(ids)]

    def clear(self) -> None:
        """Let go of graphs and memory. Steps and their decoder know each other: by themselves they would wait for the garbage collector."""
        self._shapes.clear()
        self._memory, self._owner, self._side = [], None, None

    def _lasts(self, lora: LoraRows) -> bool:
        """Whether the rows at hand have no adapters, or such as have lain side by side for a while; shapes of others are let go of."""
        if lora.held is not self._side:
            self._side, self._steps_beside = lora.held, 0
            for old in [k for k, s in self._shapes.items() if s.side is not None and s.side is not self._side]:
                del self._shapes[old]
        if lora.side is None:
            return True
        self._steps_beside += 1
        return self._steps_beside > LASTING

    def _shape(self, key: tuple[Any, ...], side: object | None) -> _Shape:
        if key not in self._shapes:
            self._shapes[key] = _Shape(side)
            if len(self._shapes) > MOST:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(key)
        return self._shapes[key]

    def _size(self, cache: DynamicCache, n: int, q: int) -> tuple[int, int]:
        """Rows and columns of the buffers that hold this cache and q more columns: as long as they do, those that it lies in."""
        first = _layers(cache)[0]
        if self._memory and (held := first.buffers) and held[0].data_ptr() == self._memory[0][0].data_ptr():
            rows, columns = held[0].shape[0], held[0].shape[2]
            if n <= rows <= 4 * rounded_rows(n) and columns >= first.span[1] + q:
                return rows, columns
        low, high = first.span
        columns = high - low + max(q, first.room, ROOM)
        return rounded_rows(n), -(-columns // COLUMNS) * COLUMNS

    def _place(self, cache: DynamicCache, size: tuple[int, int]) -> bool:
        """Let the cache lie in the shared memory, laid out in rows and columns of this size; False where that would take too much."""
        layers = _layers(cache)
        if not self._allocate(size, [t for layer in layers for t in (layer.keys, layer.values)]):
            return False
        for layer, own in zip(layers, self._views(size), strict=True):
            held = layer.buffers
            if not held or held[0].data_ptr() != own[0].data_ptr() or held[0].shape != own[0].shape:
                layer.lie_in(own)
        self._owner = weakref.ref(cache)
        return True

    def _allocate(self, size: tuple[int, int], like: Sequence[Any]) -> bool:
        """Memory for buffers of this size, whose rows are like these tensors [n, groups, T, d]: a quarter of what is free, at most."""
        self._inner = [(t.shape[1], t.shape[3]) for t in like]
        needed = [size[0] * size[1] * groups * d for groups, d in self._inner]
        held = [t.numel() for pair in self._memory for t in pair]
        if len(held) == len(needed) and all(a >= b for a, b in zip(held, needed, strict=True)):
            return True
        if like[0].device.type == "cuda":
            n_bytes = sum(n * t.element_size() for n, t in zip(needed, like, strict=True))
            where = like[0].device
            idle = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(
                where
            )  # kept by torch, used by nobody
            if n_bytes > (torch.cuda.mem_get_info(where)[0] + idle) / 4:
                return False
        for shape in self._shapes.values():  # their graphs are of the old memory
            shape.step = shape.replay = None
        self._memory = []
        with torch.inference_mode(False):
            flat = [torch.zeros(n, dtype=t.dtype, device=t.device) for n, t in zip(needed, like, strict=True)]
        self._memory = list(zip(flat[::2], flat[1::2], strict=True))
        return True

    def _views(self, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the beginning of its memory as keys and values [rows, groups, columns, d]."""
        rows, columns = size
        flat = [t for pair in self._memory for t in pair]
        with torch.inference_mode(False):
            views = [
                t[: rows * columns * groups * d].view(rows, groups, columns, d)
                for t, (groups, d) in zip(flat, self._inner, strict=True)
            ]
        return list(zip(views[::2], views[1::2], strict=True))

    def _choose(self, shape: _Shape, size: tuple[int, int], q: int) -> None:
        """Once enough was timed: the captured step stays if it is the faster one."""
        if len(shape.captured) < self.samples:
            return
        plain, captured = (1000 * statistics.median(times) for times in (shape.plain, shape.captured))
        shape.dropped = captured >= plain
        if shape.dropped:
            shape.step = shape.replay = None
        self.choices.append({"rows": size[0], "columns": size[1], "new": q, "plain_ms": plain, "captured_ms": captured})
        log.info(
            "a decode step of %d × %d new columns over %d: %.2f ms plain, %.2f ms captured; %s",
            *(size[0], q, size[1], plain, captured, "plain" if shape.dropped else "captured"),
        )


def captured_events(vlm: VLM, stage: str) -> Iterator[Event]:
    """What a stage that is over tells of its captured steps: medians over shapes; their memory is given back."""
    steps, vlm.static_steps = vlm.static_steps, None
    if steps is None:
        return
    steps.clear()  # who answers may keep the decoder, and the decoder keeps them
    if steps.choices:
        plain, captured = ([c[name] for c in steps.choices] for name in ("plain_ms", "captured_ms"))
        values = {
            "decode/shapes": float(len(plain)),
            "decode/shapes_captured": float(sum(c < p for p, c in zip(plain, captured, strict=True))),
            "decode/plain_ms": statistics.median(plain),
            "decode/captured_ms": statistics.median(captured),
        }
        yield Metrics(stage, 0, values)
    if steps.off is not None:
        yield Warning_("cuda_graphs", f"decode steps went on without CUDA graphs: {steps.off}")


def rounded_rows(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …: at most a third of a step's rows is nobody's."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= n else power


def cuda_graph(compute: Compute) -> Compute:
    """Capture a step as a CUDA graph: warmed up on a side stream, as torch asks for, then recorded, not run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads of a service may call CUDA meanwhile (its memory gauge): they are not this capture's matter.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = compute()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def _layers(cache: DynamicCache) -> list[GrowingLayer]:
    layers: list[Any] = cache.layers
    return layers


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
