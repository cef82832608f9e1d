"""What decoding in a process of its own adds to a PNG's time: medians. `python -m benchmarks.bench_decoding`."""

from __future__ import annotations

import io
import statistics
import time

import numpy as np
from PIL import Image

from hscr.images import ImageLimits, View, decode_image
from service.decoding import Decoders


def main(rounds: int = 40) -> None:
    decoders = Decoders(1, 2 * 2**30, 20)
    for side in (336, 512, 1024):
        out = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(out, "PNG")
        times: dict[str, list[float]] = {"here": [], "process": []}
        for _ in range(rounds):
            begin = time.perf_counter()
            decode_image(out.getvalue())
            middle = time.perf_counter()
            decoders.decode([out.getvalue()], ImageLimits(), [View()])
            times["here"].append(middle - begin)
            times["process"].append(time.perf_counter() - middle)
        here, there = (1000 * statistics.median(times[name]) for name in ("here", "process"))
        print(f"{side} x {side}: {here:.1f} ms here, {there:.1f} ms in a process, {there - here:.1f} ms more")
    decoders.close()


if __name__ == "__main__":
    main()
