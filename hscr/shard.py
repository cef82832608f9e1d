"""Parts of a generation, or the whole, made by themselves into files: what `hscr generate` does. Stops between batches and goes on.

What is half done lies in a hidden folder beside the result, and is gone when the result is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from hscr import __version__
from hscr.artifacts import file_digest, json_digest
from hscr.config import AlignConfig
from hscr.data_set import DataSet
from hscr.events import Event, Rate, Result, Stage, Stopped
from hscr.model import VLM, require_images
from hscr.parent import as_parent, on_top_of
from hscr.parts import made_already, part_name
from hscr.preferences import generate
from hscr.records import PreferenceRecord
from hscr.run_dir import PartialFile, RunDir
from hscr.similarity import Similarity, load_similarity
from hscr.static_steps import captured_events
from hscr.token_budget import TokenBudget, out_of_memory

STAGE = "generating"


def generation_inputs(vlm: VLM, data: DataSet, config: AlignConfig, parent: Path | None) -> str:
    """Digest of what preferences are made from."""
    return json_digest([data.digest, vlm.digest, asdict(config.preference), config.seed, *on_top_of(parent)])


def part_inputs(vlm: VLM, data: DataSet, config: AlignConfig, parent: Path | None) -> str:
    """The same, and what may round differently elsewhere: parts of one file must be one worker's, byte for byte."""
    made_by = [__version__, str(vlm.base.dtype), vlm.device.type]
    return json_digest([generation_inputs(vlm, data, config, parent), *made_by])


def batch_lengths(n: int, size: int) -> list[int]:
    """How many of n records each batch has."""
    return [min(size, n - start) for start in range(0, n, size)]


def batches_made(
    vlm: VLM, data: DataSet, config: AlignConfig, similarity: Similarity, budget: TokenBudget, start: int, stop: int
) -> Iterator[list[PreferenceRecord]]:
    """The preferences of records [start, stop), a batch at a time. `budget` shrinks where the device runs out of memory."""
    made = generate(
        vlm,
        data.records,
        data.open_images,
        config.preference,
        similarity,
        config.seed,
        start=start,
        stop=stop,
        budget=budget,
    )
    while batch := list(islice(made, config.preference.batch_size)):
        yield batch


def generate_shards(
    vlm: VLM,
    data: DataSet,
    config: AlignConfig,
    shards: Iterable[tuple[int, int]],
    *,
    out: Path | None = None,
    parts: Path | None = None,
    parent: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Make the preferences of records [start, stop) (`shard_bounds`) into the file `out`, or into the folder `parts` (hscr/parts.py).

    For each of `shards` in turn, which may become known while it works: what they share is loaded once. Yields events; the last of a
    shard is a Result with the file's digest, or, where the part is there already, a skipped Stage. Raises Stopped after `should_stop()`;
    ValueError for bad input, and where another process is making the same.
    """
    folder = out.parent if out is not None else parts
    if folder is None:
        raise ValueError("name the file or the folder of parts to write to")
    require_images(vlm, max(len(r.images) for r in data.records))
    making = _Making(
        vlm,
        data,
        config,
        part_inputs(vlm, data, config, parent),
        load_similarity(config.preference.similarity),
        TokenBudget(config.preference.token_budget),
        out,
        folder,
        should_stop,
    )
    with as_parent(vlm, parent):
        for start, stop in shards:
            yield from making.shard(start, stop)
    yield from captured_events(vlm, STAGE)


@dataclass(frozen=True)
class _Making:
    """What the shards of one call share; the budget stays as small as one of them made it."""

    vlm: VLM
    data: DataSet
    config: AlignConfig
    inputs: str
    similarity: Similarity
    budget: TokenBudget
    out: Path | None
    folder: Path
    should_stop: Callable[[], bool]

    def shard(self, start: int, stop: int) -> Iterator[Event]:
        inputs, out, folder, budget = self.inputs, self.out, self.folder, self.budget
        size = self.config.preference.batch_size
        if out is None and made_already(folder, inputs, start, stop):
            yield Stage(STAGE, "skipped")
            return
        name = out.name if out is not None else f"{inputs.removeprefix('sha256:')[:16]}.{start}-{stop}"
        scratch = RunDir(folder / f".{name}.partial")
        with scratch.locked():
            yield Stage(STAGE, "started")
            resumed = scratch.start(STAGE, json_digest([inputs, start, stop]))
            partial = PartialFile(
                scratch.path / "preferences.partial.jsonl", batch_lengths(stop - start, size), resume=resumed
            )
            position = min(start + partial.done * size, stop)
            rate = Rate(STAGE, stop - start, position - start)
            yield rate.at(position - start)
            tokens = budget.tokens
            for batch in batches_made(self.vlm, self.data, self.config, self.similarity, budget, position, stop):
                partial.append(batch)
                position += len(batch)
                if budget.tokens < tokens:
                    yield out_of_memory("preference", tokens := budget.tokens)
                yield rate.at(position - start)
                if position < stop and self.should_stop():
                    raise Stopped(STAGE)
            digest = file_digest(partial.path)
            partial.rename(out if out is not None else folder / part_name(inputs, start, stop, digest))
            shutil.rmtree(scratch.path)
        yield Stage(STAGE, "completed")
        yield Result(None, digest, {"records": stop - start})
