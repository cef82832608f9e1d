"""The main job's two halves on a GPU, with random weights in the shape of LLaVA-Med 7B, in bfloat16; naive and TRL beside ours.

Prints a table and writes it as JSON: optimisation in milliseconds a record (cold: tower and reference in it; warm: the second epoch),
generation in records a second, peak memory, and what share of the measured matrix-product rate the work reaches. One command, under nine
minutes on one H100; --shape small runs anywhere and shows that it works.

python -m benchmarks.bench_gpu [--shape 7b|small] [--records 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_optimize import naive, trl
from benchmarks.llava import SHAPE_7B, Shape, processor_of, random_llava, report, save_data
from hscr.config import OptimizationConfig, preset
from hscr.families import family_of
from hscr.images import decode_image
from hscr.model import VLM, add_lora
from hscr.optimize import optimize
from hscr.preferences import generate
from hscr.records import PreferenceRecord
from hscr.similarity import load_similarity

TOKENS, LEVELS = 40, 3


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(size: int, dtype: torch.dtype) -> float:
    """FLOP/s of size³ products, the best of five runs of ten."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        settle()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        settle()
        best = min(best, time.perf_counter() - start)
    return 10 * 2 * size**3 / best


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, peak GiB, result."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    settle()
    start = time.perf_counter()
    result = work()
    settle()
    return time.perf_counter() - start, peak(), result


def our_epochs(vlm: VLM, data: Path, made: list[PreferenceRecord], config: OptimizationConfig) -> list[float]:
    """Seconds of each epoch; the first with cold caches, the reference in it."""
    out = Path(tempfile.mkdtemp(dir=data))
    marks = [time.perf_counter()]
    for step in optimize(vlm, made, lambda r: decode_image(data / r.image), config, out):
        if step.step % (step.total // config.epochs) == 0:
            settle()
            marks.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Optimisation and generation on a GPU, random weights.")
    parser.add_argument("--shape", choices=("7b", "small"), default="7b")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if args.shape == "7b" and not cuda:
        raise SystemExit("no CUDA device here; --shape small runs on a CPU")
    shape = (
        SHAPE_7B
        if args.shape == "7b"
        else Shape(patches=6, layers=2, hidden=64, heads=4, tower_layers=2, tower_hidden=64)
    )
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        made = save_data(data, args.records, TOKENS, LEVELS)
        processor = processor_of(shape)
        torch.set_default_dtype(dtype)
        with device:
            rate = matrix_rate(8192 if cuda else 512, dtype)
            model = random_llava(shape, processor).requires_grad_(False).eval()
        torch.set_default_dtype(torch.float32)
        weights = sum(p.numel() for p in model.model.language_model.parameters())

        def loaded() -> VLM:
            return VLM(model, processor, family_of("llava", "bench"), device, "random", "random")

        def row(what: str, n: int, seconds: float, gib: float, flops: float) -> None:
            rows.append(
                {
                    "what": what,
                    "ms a record": 1000 * seconds / n,
                    "records a second": n / seconds,
                    "peak GiB": gib,
                    "share of the matrix rate": flops / seconds * n / rate if flops else float("nan"),
                }
            )
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)

        prompt = shape.patches**2 + 40
        # 2 FLOP a weight and token forward, as many again backward through frozen weights (their own gradients are not computed).
        step_flops = 4.0 * weights * (prompt + (1 + LEVELS) * TOKENS)
        config = dataclasses.replace(preset("recommended").optimization, epochs=2, batch_size=16)
        few = made[: max(args.records // 16, 2)]
        vlm = loaded()
        add_lora(vlm, config, seed=0)
        seconds, gib, epochs = timed(lambda: our_epochs(vlm, data, made, config))
        row("optimise, ours, two epochs from cold", 2 * len(made), seconds, gib, step_flops)
        row("optimise, ours, warm epoch", len(made), epochs[-1], gib, step_flops)
        seconds, gib, _ = timed(lambda: naive(vlm, data, few, config))
        row("optimise, naive", 2 * len(few), seconds, gib, 0)
        vlm.model = vlm.model.unload()
        for checkpointing in (True, False):
            name = f"optimise, TRL DPOTrainer{'' if checkpointing else ', no checkpointing'}"
            with contextlib.redirect_stdout(io.StringIO()):
                save_data(data / name, len(few), TOKENS, LEVELS)
                trainer = trl(model, processor, data / name, LEVELS, checkpointing=checkpointing)
            try:
                seconds, gib, _ = timed(trainer.train)
                row(name, 2 * len(few), seconds, gib, 0)
            except torch.OutOfMemoryError:
                rows.append({**dict.fromkeys(rows[0], "out of memory"), "what": name})
            model = trainer.model.unload()
            del trainer
        model.requires_grad_(False).eval()
        records = [p.record for p in made]
        for continuation in ("splice", "redecode"):
            wanted = dataclasses.replace(
                preset("recommended").preference,
                continuation=continuation,
                max_new_tokens=TOKENS,
                similarity="token_f1",
            )
            work = generate(
                loaded(), records, lambda r: decode_image(data / r.image), wanted, load_similarity("token_f1")
            )
            seconds, gib, _ = timed(lambda: list(work))  # noqa: B023
            row(f"generate, ours, {continuation}", len(records), seconds, gib, 0)
        report(
            f"{args.shape}: matrix products {rate / 1e12:.4g} TFLOP/s, {weights / 1e9:.3g} G weights", rows, args.json
        )


if __name__ == "__main__":
    main()
