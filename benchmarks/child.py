"""One measured run in a process of its own: its processor time (one thread), and the peak of resident memory over what was there before."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def measured(work: Callable[[], dict[str, float]]) -> None:
    """Run `work` and print, as JSON, what it returns, with `seconds` and `peak_mb` (Linux: the high-water mark, set back before)."""
    before = _memory_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "peak_mb": (_memory_kb("VmHWM") - before) / 1024} | result), flush=True)


def _memory_kb(name: str) -> int:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return int(line.split()[1])


def run(module: str, arguments: Sequence[object]) -> dict[str, float]:
    """`python -m module arguments` with one thread; the JSON of its last line."""
    environment = os.environ | {
        "HSCR_FEATURE_CACHE": "off",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def with_stock_tower(model: Any) -> None:
    """What ours is measured against computes every layer, as the stock model does (hscr/tower.py)."""
    for module in model.modules():
        vars(module).pop("forward", None)


def interleaved(calls: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, dict[str, float]]:
    """Every call in turn, `repeats` times, so that a slow spell of the machine meets all alike; medians."""
    found: dict[str, defaultdict[str, list[float]]] = {name: defaultdict(list) for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            for key, value in call().items():
                found[name][key].append(value)
    return {name: {key: statistics.median(v) for key, v in values.items()} for name, values in found.items()}


def arguments_of(description: str, add: Callable[[Any], None]) -> Any:
    """The command line of a benchmark: --quick, --repeats, --json, and what `add` adds."""
    import argparse

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small form")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows here")
    parser.add_argument("--child", nargs="*", default=None, help="one measured run, for the benchmark itself")
    add(parser)
    return parser.parse_args()
