"""The tables of docs/performance.md from what bench_gpu wrote: `python -m benchmarks.gpu_tables FILE`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.llava import table


def markdown(measured: dict[str, Any]) -> str:
    """Every table under its name, the machine above them; what was cut or failed is named below."""
    parts = [f"{measured['name']}\n{measured['machine']}"]
    for name, rows in measured["tables"].items():
        if rows:
            parts.append(f"**{name}**\n\n" + table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows]))
    parts += [f"{name}: {why}" for name, why in measured["missing"].items()]
    return "\n\n".join(parts) + "\n"


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    print(markdown(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
