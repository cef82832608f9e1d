"""How time and memory grow: records 250 → 4,000, tokens 200 → 4,000 a record, and generation in 1 and 2 processes.

Flat milliseconds a record and flat memory mean linear time in records; memory may grow with the tokens of a record, not faster.

python -m benchmarks.bench_scale [--quick] [--repeats 3] [--json FILE] [--processes RECORDS: that table only]
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks.bench_optimize import configuration
from benchmarks.child import arguments_of, interleaved, measured, run
from benchmarks.llava import Shape, report, save_data, save_llava
from hscr.config import preset
from hscr.images import decode_image
from hscr.model import add_lora, load_model
from hscr.optimize import optimize
from hscr.parts import shard_bounds
from hscr.preferences import generate
from hscr.records import read_preferences, read_records
from hscr.similarity import load_similarity

SMALL = Shape(patches=6, layers=2, hidden=64, heads=4, tower_layers=2, tower_hidden=64)


def child(what: str, model: Path, data: Path, shard: str) -> None:
    """Generate on a share of the records, or optimise on all for one epoch."""
    torch.set_num_threads(1)
    vlm = load_model(model)
    start_s, began = time.process_time(), time.monotonic()
    work = {"generate": lambda: generating(vlm, data, shard), "optimize": lambda: optimizing(vlm, data)}[what]

    def done() -> dict[str, float]:
        made = float(work())
        return {"records": made, "start_s": start_s, "began": began, "ended": time.monotonic()}

    measured(done)


def generating(vlm, data: Path, shard: str) -> int:  # type: ignore[no-untyped-def]
    records, _ = read_records(data)
    config = dataclasses.replace(preset("recommended").preference, similarity="token_f1")
    part, of = map(int, shard.split("/"))
    start, stop = shard_bounds(len(records), config.batch_size, part, of)
    made = generate(
        vlm,
        records,
        lambda r: decode_image(data / r.image),
        config,
        load_similarity("token_f1"),
        start=start,
        stop=stop,
    )
    return sum(1 for _ in made)


def optimizing(vlm, data: Path) -> int:  # type: ignore[no-untyped-def]
    preferences = list(read_preferences(data / "preferences.jsonl"))
    config = dataclasses.replace(configuration(), epochs=1, batch_size=16)
    add_lora(vlm, config, seed=0)
    for _ in optimize(vlm, preferences, lambda r: decode_image(data / r.image), config, Path(tempfile.mkdtemp())):
        pass
    return len(preferences)


def main() -> None:
    only = "only generation of so many records in 1 and 2 processes"
    args = arguments_of("How time and memory grow.", lambda p: p.add_argument("--processes", type=int, help=only))
    if args.child:
        what, model, data, shard = args.child
        child(what, Path(model), Path(data), shard)
        return
    sizes = (64, 256) if args.quick else (250, 1000, 4000)
    sides = (13, 28) if args.quick else (13, 28, 44, 62)
    repeats = 1 if args.quick else args.repeats
    rows: list[dict[str, object]] = []

    def call(what: str, model: Path, data: Path, shard: str = "1/1") -> dict[str, float]:
        return run("benchmarks.bench_scale", ["--child", what, model, data, shard])

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = save_llava(folder / "small", SMALL)
        if args.processes:
            save_data(folder / str(args.processes), args.processes, 16, 3)
            report("Generation in processes", processes(folder, args.processes, repeats), args.json)
            return
        for n in sizes:
            save_data(folder / str(n), n, 16, 3)
        for what in ("generate", "optimize"):
            found = interleaved({str(n): partial(call, what, model, folder / str(n)) for n in sizes}, repeats)
            for n in sizes:
                cost = found[str(n)]
                rows.append(
                    {
                        "what": what,
                        "records": n,
                        "visual tokens": SMALL.patches**2,
                        "ms a record": 1000 * cost["seconds"] / n,
                        "peak MB": cost["peak_mb"],
                    }
                )
        for side in sides:
            shape = dataclasses.replace(SMALL, patches=side)
            model, data = save_llava(folder / f"side{side}", shape), folder / f"tokens{side}"
            save_data(data, 8, 16, 3)
            for what in ("generate", "optimize"):
                cost = interleaved({what: partial(call, what, model, data)}, repeats)[what]
                rows.append(
                    {
                        "what": what,
                        "records": 8,
                        "visual tokens": side**2,
                        "ms a record": 1000 * cost["seconds"] / 8,
                        "peak MB": cost["peak_mb"],
                    }
                )
        report("Growth: processor time a record, peak memory", rows, args.json)
        report("Generation in processes", processes(folder, sizes[-1], repeats), None)


def processes(folder: Path, n: int, repeats: int) -> list[dict[str, object]]:
    """One process, and two at once on a half each: the clock with their starts and without, and the processor time of both parts.

    Without: from when the first has its model until the last is done. Processor time tells work that is added from a core that is not had.
    """
    model, data = folder / "small", folder / str(n)

    def whole(of: int) -> dict[str, float]:
        start = time.perf_counter()
        with ThreadPoolExecutor(of) as pool:
            shards = [f"{part}/{of}" for part in range(1, of + 1)]
            made = list(
                pool.map(lambda s: run("benchmarks.bench_scale", ["--child", "generate", model, data, s]), shards)
            )
        clock = time.perf_counter() - start
        assert sum(m["records"] for m in made) == n
        return {
            "clock": clock,
            "work": max(m["ended"] for m in made) - min(m["began"] for m in made),
            "processor": sum(m["seconds"] for m in made),
            "starts": sum(m["start_s"] for m in made),
        }

    found = interleaved({"1": lambda: whole(1), "2": lambda: whole(2)}, repeats)
    return [
        {
            "processes": int(k),
            "clock s": v["clock"],
            "speed": found["1"]["clock"] / v["clock"],
            "without starts": v["work"],
            "its speed": found["1"]["work"] / v["work"],
            "processor s": v["processor"],
            "of starts": v["starts"],
        }
        for k, v in found.items()
    ]


if __name__ == "__main__":
    main()
