"""A GPU, random weights in the shape of LLaVA-Med 7B, bfloat16: the main job's halves, naive and TRL beside ours, and serving.

Optimisation in milliseconds a record (cold: tower and reference in it; warm: the second epoch), generation in records a second, peak
memory, the share of the measured matrix-product rate; both attentions on the same records; decode steps plain and captured; and
benchmarks/gpu_serving.py. Every part has its seconds and says where it was cut or failed; the others go on. One command, under nine
minutes: `--seconds` bounds them all. Prints tables and writes them as JSON after every part; benchmarks/gpu_tables.py makes the docs'
tables of it. --shape small runs anywhere and shows that it works.

python -m benchmarks.bench_gpu [--shape 7b|small] [--records 64] [--seconds 460] [--only PART] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_optimize import naive, trl
from benchmarks.child import with_stock_tower
from benchmarks.gpu_serving import CLIENTS, serving
from benchmarks.gpu_tables import markdown
from benchmarks.llava import SHAPE_7B, Shape, machine, processor_of, random_llava, save_data
from hscr.attention_choice import SDPA, Attention, chosen
from hscr.block_attention import why_not
from hscr.config import OptimizationConfig, preset
from hscr.families import family_of
from hscr.feature_cache import FeatureCache
from hscr.images import decode_image
from hscr.model import VLM, add_lora, encode_answer
from hscr.optimize import Item, optimize, score_first
from hscr.preferences import generate
from hscr.similarity import load_similarity

TOKENS, LEVELS = 40, 3
SMALL = Shape(patches=6, layers=2, hidden=64, heads=4, tower_layers=2, tower_hidden=64)
# Seconds of each part where all have what they need; a part gets what is left, and at most this.
PARTS = {"optimise": 110.0, "attention": 70.0, "peers": 90.0, "generate": 70.0, "serving": 140.0}
Rows = list[dict[str, Any]]


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


class Bench:
    """The model, the data and what was measured so far."""

    def __init__(self, folder: Path, shape: Shape, records: int) -> None:
        cuda = torch.cuda.is_available()
        self.folder, self.shape = folder, shape
        self.device, self.dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
        self.made = save_data(folder, records, TOKENS, LEVELS)
        self.processor = processor_of(shape)
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                self.rate = matrix_rate(8192 if cuda else 512, self.dtype)
                self.model: Any = random_llava(shape, self.processor).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        self.weights = sum(p.numel() for p in self.model.model.language_model.parameters())
        self.tables: dict[str, Rows] = {}
        self.missing: dict[str, str] = {}

    def loaded(self) -> VLM:
        """The bare model with empty caches, its decoder and tower as `load_model` leaves them."""
        from hscr.grouped_attention import group_heads
        from hscr.tower import pass_over_unread_layers

        pass_over_unread_layers(self.model)
        group_heads(self.model.model.language_model)
        features = FeatureCache(2 * 2**30 if self.device.type == "cuda" else 2**28)
        family = family_of("llava", "bench")
        return VLM(self.model, self.processor, family, self.device, "random", "random", features=features)

    def open_image(self, record: Any) -> Any:
        return decode_image(self.folder / record.image)

    @contextlib.contextmanager
    def adapted(self, config: OptimizationConfig) -> Iterator[VLM]:
        vlm = self.loaded()
        add_lora(vlm, config, seed=0)
        try:
            yield vlm
        finally:
            self.model = vlm.model.unload()
            self.model.requires_grad_(False).eval()

    def row(
        self,
        table: str,
        what: str,
        n: int,
        seconds: float,
        gib: float,
        *,
        flops: float = 0,
        cut: str = "",
        attention: Attention = SDPA,
    ) -> None:
        row = {
            "what": what,
            "ms a record": 1000 * seconds / max(n, 1),
            "records a second": n / seconds,
            "peak GiB": gib,
            "share of the matrix rate": flops / seconds * n / self.rate if flops else float("nan"),
            "attention": attention.kind if what.startswith("optimise, ours") else "",
            "cut": cut,
        }
        self.tables.setdefault(table, []).append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def optimise(self, seconds: float) -> None:
        """Two epochs of ours."""
        end, config = time.monotonic() + seconds, self.optimization
        prompt = self.shape.patches**2 + 40
        # 2 FLOP a weight and token forward, as many again backward through frozen weights (their own gradients are not computed).
        flops = 4.0 * self.weights * (prompt + (1 + LEVELS) * TOKENS)
        marks: list[float] = []
        done, attention = 0, SDPA

        def epochs() -> None:
            nonlocal done, attention
            marks.append(time.perf_counter())
            out = Path(tempfile.mkdtemp(dir=self.folder))
            for step in optimize(vlm, self.made, self.open_image, config, out):
                done, attention = step.step, step.attention
                if step.step % (step.total // config.epochs) == 0:
                    settle()
                    marks.append(time.perf_counter())
                if time.monotonic() > end:
                    return

        with self.adapted(config) as vlm:
            took, gib, _ = timed(epochs)
        n, all_ = min(done * config.batch_size, 2 * len(self.made)), 2 * len(self.made)
        cut = "" if n == all_ else f"of {all_}"
        self.row(
            "main job", "optimise, ours, two epochs from cold", n, took, gib, flops=flops, cut=cut, attention=attention
        )
        if len(marks) == 3:
            warm = marks[2] - marks[1]
            self.row(
                "main job", "optimise, ours, warm epoch", len(self.made), warm, gib, flops=flops, attention=attention
            )

    def attention(self, seconds: float) -> None:
        """Forward and backward of the first records that share a pass, by either attention, as a long run chooses."""
        config = self.optimization
        texts = [
            (p.record, [p.record.answer, *(level.text for level in p.levels)]) for p in self.made[: config.batch_size]
        ]
        with self.adapted(config) as vlm:
            items = [Item(r, [encode_answer(vlm, r.question, t) for t in ts]) for r, ts in texts]

            def work(blocks: bool) -> None:
                score_first(vlm, items, self.open_image, config.token_budget, config, blocks)

            found = chosen(vlm, "auto", Path(tempfile.mkdtemp(dir=self.folder)), sys.maxsize, work)
        if found.sdpa_ms is None:
            self.missing["attention"] = why_not(vlm) or "not measured"
            return
        flex = float("nan") if found.flex_ms is None else found.flex_ms
        row = {"SDPA ms": found.sdpa_ms, "flex ms": flex, "chosen": found.kind, "why": found.why or ""}
        self.tables["attention"] = [row]

    def peers(self, seconds: float) -> None:
        """naive and TRL on a few records: they take as long as they take, so what does not fit is left out."""
        end, config, few = time.monotonic() + seconds, self.optimization, self.made[: max(len(self.made) // 16, 2)]
        with self.adapted(config) as vlm:
            with_stock_tower(vlm.base)  # for TRL too: it has the same one
            took, gib, _ = timed(lambda: naive(vlm, self.folder, few, config))
        self.row("main job", "optimise, naive", 2 * len(few), took, gib)
        for checkpointing in (True, False):
            name = f"optimise, TRL DPOTrainer{'' if checkpointing else ', no checkpointing'}"
            if time.monotonic() > end:
                self.missing[name] = "no time left"
                continue
            data = self.folder / f"trl-{checkpointing}"
            self.model.model.language_model.set_attn_implementation("sdpa")  # TRL as it comes
            with contextlib.redirect_stdout(io.StringIO()):
                save_data(data, len(few), TOKENS, LEVELS)
                trainer = trl(self.model, self.processor, data, LEVELS, checkpointing=checkpointing)
            try:
                took, gib, _ = timed(trainer.train)
                self.row("main job", name, 2 * len(few), took, gib)
            except torch.OutOfMemoryError:
                self.missing[name] = "out of memory"
            finally:
                self.model = trainer.model.unload()
                self.model.requires_grad_(False).eval()
                self.model.activation_checkpointing_disable()
                del trainer

    def generate(self, seconds: float) -> None:
        records = [p.record for p in self.made]
        for continuation in ("splice", "redecode"):
            end = time.monotonic() + seconds / 2
            preference = preset("recommended").preference
            wanted = dataclasses.replace(
                preference,
                continuation=continuation,
                max_new_tokens=TOKENS,
                similarity="token_f1",
                batch_size=min(preference.batch_size, max(len(records) // 2, 1)),
            )
            vlm, done = self.loaded(), 0

            def work(vlm: VLM = vlm, wanted: Any = wanted, end: float = end) -> None:
                nonlocal done
                for _ in generate(vlm, records, self.open_image, wanted, load_similarity("token_f1")):
                    done += 1
                    if done % wanted.batch_size == 0 and time.monotonic() > end:
                        return

            took, gib, _ = timed(work)
            cut = "" if done == len(records) else f"of {len(records)}"
            self.row("main job", f"generate, ours, {continuation}", done, took, gib, cut=cut)
            self.told_steps(f"generate, {continuation}", vlm)

    def told_steps(self, where: str, vlm: VLM) -> None:
        """What was measured of decode steps, plain and captured, where they are captured."""
        steps, vlm.static_steps = vlm.static_steps, None
        if steps is not None:
            self.tables.setdefault("decode steps", []).extend({"in": where, **choice} for choice in steps.choices)
            if steps.off is not None:
                self.missing[f"captured steps in: {where}"] = steps.off

    def serving(self, seconds: float) -> None:
        cuda = self.device.type == "cuda"
        self.tables["serving"] = []
        serving(
            self.loaded,
            self.folder / "adapters",
            seconds,
            self.tables["serving"].append,
            lambda mode, vlm: self.told_steps(f"serving, {mode}", vlm),
            clients=CLIENTS if cuda else CLIENTS[:2],
            each=2 if cuda else 1,
            prefix_bytes=8 * 2**30 if cuda else 2**28,
        )

    @property
    def optimization(self) -> OptimizationConfig:
        return dataclasses.replace(preset("recommended").optimization, epochs=2, batch_size=min(16, len(self.made)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("7b", "small"), default="7b")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=460, help="for all parts")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.shape == "7b" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --shape small runs on a CPU")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), SHAPE_7B if args.shape == "7b" else SMALL, args.records)
        for name in PARTS if args.only is None else [args.only]:
            left = args.seconds - (time.monotonic() - start)
            if left < PARTS[name] / 4:
                bench.missing[name] = "no time left"
            else:
                try:
                    getattr(bench, name)(min(left, PARTS[name]))
                except Exception as error:  # on a machine that nobody has seen yet the other parts are worth having
                    traceback.print_exc()
                    bench.missing[name] = f"failed: {type(error).__name__}"
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            rates = f"matrix products {bench.rate / 1e12:.4g} TFLOP/s, {bench.weights / 1e9:.3g} G weights"
            found = {
                "name": f"{args.shape}: {rates}",
                "machine": machine(),
                "tables": bench.tables,
                "missing": bench.missing,
            }
            if args.json is not None:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(markdown(found))
    if any(why.startswith("failed") for why in bench.missing.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
