"""Serving on a loaded model, in this process: the service's own batcher and engine, asked by threads that each wait for their answer.

Beside it stock `generate`, one image at a time. Whole batches and questions that join; images that are new and such that were asked about
before; six questions on one image; adapters mixed in one load. No HTTP: benchmarks/bench_serving.py measures what that adds. Every cell has
its share of seconds and says where it was cut: fewer questions then, never another way to count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.bench_serving import QUESTIONS, lengths
from benchmarks.child import with_stock_tower
from benchmarks.serving_load import percentile
from hscr.adapter_folder import save_adapter
from hscr.artifacts import verify_manifest
from hscr.config import AlignConfig
from hscr.model import VLM, add_lora
from hscr.tower import pass_over_unread_layers
from service.batcher import Batcher
from service.engine import LocalEngine, Question
from service.settings import Settings

CLIENTS = (1, 4, 16, 64)
MODES: dict[str, Literal["static", "continuous"]] = {"whole batches": "static", "joining": "continuous"}
Adapters = list[tuple[str, Path]]  # digest and folder


@dataclass
class Cell:
    """What came of the questions of one cell: seconds to the answer and to its first token, of the wall in all, tokens said."""

    wall_s: float = 0.0
    answered: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    asked: int = 0

    def row(self, method: str, images: str, clients: int, generate: Cell | None) -> dict[str, Any]:
        rate = len(self.answered) / self.wall_s
        plain = rate if generate is None else len(generate.answered) / generate.wall_s
        return {
            "method": method,
            "images": images,
            "clients": clients,
            "answers/s": rate,
            "× generate": rate / plain,
            "tokens/s": self.tokens / self.wall_s,
            "first token p50 ms": 1000 * percentile(self.first, 0.5),
            "first token p95 ms": 1000 * percentile(self.first, 0.95),
            "answer p50 ms": 1000 * percentile(self.answered, 0.5),
            "answer p95 ms": 1000 * percentile(self.answered, 0.95),
            "answers": len(self.answered),
            "cut": f"of {self.asked}" if len(self.answered) < self.asked else "",
        }


def pictures(n: int, seed: int) -> list[Image.Image]:
    """Noise of 400 × 400, each its own."""
    noise = (np.random.default_rng([seed, i]).integers(0, 255, (400, 400, 3), dtype=np.uint8) for i in range(n))
    return [Image.fromarray(pixels) for pixels in noise]


def questions(
    images: Sequence[Image.Image], text: int | None, adapters: Sequence[tuple[str, Path] | None] = (None,)
) -> list[Question]:
    """A question an image, answers of 8 to 40 tokens; `text` None: six on each. Adapters by turns."""
    texts = QUESTIONS if text is None else [QUESTIONS[text]]
    pairs = [(image, one) for image in images for one in texts]
    out = []
    for i, ((image, one), n) in enumerate(zip(pairs, lengths(len(pairs)), strict=True)):
        digest, folder = adapters[i % len(adapters)] or (None, None)
        out.append(Question((image,), one, digest, folder, max_tokens=n, temperature=0, seed=0, grounding="none"))
    return out


def generated(vlm: VLM, images: Sequence[Image.Image], seconds: float) -> Cell:
    """Each image asked about alone by stock `generate`. The time to its first token is that of an answer of one token, once more."""
    decoder = vlm.decoder
    kind_before = decoder.config._attn_implementation
    decoder.set_attn_implementation("sdpa")  # stock attention too
    with_stock_tower(vlm.base)
    cell, end = Cell(asked=len(images)), time.monotonic() + seconds
    device, kind = vlm.device, vlm.base.dtype

    def said(image: Image.Image, n: int) -> tuple[float, int]:
        begin = time.perf_counter()
        batch = vlm.processor(images=[image], text=f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:", return_tensors="pt")
        batch = {k: t.to(device, kind if t.is_floating_point() else None) for k, t in batch.items()}
        with torch.no_grad():
            ids = vlm.model.generate(**batch, do_sample=False, max_new_tokens=n).tolist()  # tolist waits for the device
        return time.perf_counter() - begin, len(ids[0]) - batch["input_ids"].shape[1]

    said(images[0], 2)
    for image, n in zip(images, lengths(len(images)), strict=True):
        took, tokens = said(image, n)
        cell.answered.append(took)
        cell.tokens += tokens
        if time.monotonic() > end:
            break
    cell.wall_s = sum(cell.answered)
    cell.first = [said(image, 1)[0] for image in images[:3]]
    decoder.set_attn_implementation(kind_before)
    pass_over_unread_layers(vlm.base)
    return cell


class Served:
    """The service's batcher before its engine, on a model that is loaded; `with` starts and ends its thread."""

    def __init__(self, vlm: VLM, mode: str, prefix_bytes: int) -> None:
        self.settings = Settings(
            scheduling=MODES[mode], batch_max=64, batch_tokens_max=2**16, queue_max=256, prefix_cache_max_bytes=prefix_bytes
        )  # fmt: skip
        self.engine = LocalEngine(self.settings)
        self._first: list[float] = []
        s = self.settings
        self.batcher: Batcher[Question, Any] = Batcher(
            self.engine,
            batch_max=s.batch_max,
            window_s=s.batch_window_s,
            queue_max=s.queue_max,
            tokens_max=s.batch_tokens_max,
            setup=lambda: self.engine.use(vlm),
            on_first=self._first.append,
        )

    def __enter__(self) -> Served:
        self.batcher.start()
        assert self.batcher.ready.wait(60), self.batcher.failure
        return self

    def __exit__(self, *_: object) -> None:
        self.batcher.close()
        self.engine.unload()

    def closed(self, asked: Sequence[Question], clients: int, seconds: float) -> Cell:
        """`clients` threads, each asking its next question once it has its answer, until all are asked or the time is up."""
        cell, waiting, lock = Cell(asked=len(asked)), list(asked), threading.Lock()
        failures: list[Exception] = []
        self._first.clear()
        start = time.monotonic()

        def client() -> None:
            while time.monotonic() - start < seconds:
                with lock:
                    if not waiting or failures:
                        return
                    question = waiting.pop(0)
                begin = time.perf_counter()
                try:
                    answer = self.batcher.submit(question).result(timeout=300)
                except Exception as error:
                    failures.append(error)
                    return
                with lock:
                    cell.answered.append(time.perf_counter() - begin)
                    cell.tokens += answer.completion_tokens

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        cell.wall_s, cell.first = time.monotonic() - start, list(self._first)
        return cell


def save_adapters(vlm: VLM, folder: Path, n: int) -> Adapters:
    """Finished adapters with random weights, by their digest; the model is as it was."""
    config, made = AlignConfig(), []
    for seed in range(n):
        add_lora(vlm, config.optimization, seed)
        try:
            with torch.no_grad():
                for name, p in vlm.model.named_parameters():
                    if "lora_B" in name:
                        p.normal_(0, 0.005)
            save_adapter(vlm, folder / str(seed), config, {"model": vlm.digest, "data": "random"})
        finally:
            vlm.model = vlm.model.unload()
            vlm.model.requires_grad_(False)
        made.append((verify_manifest(folder / str(seed)), folder / str(seed)))
    return made


def serving(
    load: Callable[[], VLM],
    folder: Path,
    seconds: float,
    told: Callable[[dict[str, Any]], None],
    over: Callable[[str, VLM], None] = lambda mode, vlm: None,
    *,
    clients: Sequence[int] = CLIENTS,
    each: int = 2,
    prefix_bytes: int = 2**30,
) -> None:
    """Tell the table's rows as they are measured, within about `seconds`: `each` questions a client and cell.

    `load` gives a model whose caches are empty; `over` gets that of each way to schedule when it was asked everything.
    """
    start, cells = time.monotonic(), 1 + len(MODES) * (2 * len(clients) + 3)
    adapters = save_adapters(load(), folder, 4)
    left = seconds - (time.monotonic() - start)
    share = left / cells
    plain = generated(load(), pictures(max(2 * each, 4), 1), share)
    told(plain.row("generate", "new", 1, None))
    for mode in MODES:
        vlm = load()
        with Served(vlm, mode, prefix_bytes) as served:

            def cell(
                images: str,
                n: int,
                asked: list[Question],
                served: Served = served,
                mode: str = mode,
                share: float = share,
            ) -> None:
                told(served.closed(asked, n, share).row(mode, images, n, plain))

            served.closed(questions(pictures(5, 2), 0, [None, *adapters]), 2, share)  # warm up, load adapters
            for n in clients:
                new = pictures(max(each * n, 4), 10 + n)
                cell("new", n, questions(new, 0))
                cell("known", n, questions(new, 1))
            few, many = pictures(max(each, 2), 3), max(clients)
            cell("six questions on one", 6, questions(few, None))
            known = pictures(max(each * many, 4), 10 + many)
            cell("known, base", many, questions(known, 2))
            cell("known, base and 4 adapters", many, questions(known, 2, [None, *adapters]))
        over(mode, vlm)
