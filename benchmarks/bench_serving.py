"""`/vqa` over real HTTP beside one request at a time through stock `generate`: `python -m benchmarks.bench_serving [--quick]`.

A random LLaVA of benchmarks/llava.py, answers of 8 to 40 tokens. `generate` is called in a process with nothing beside it: no HTTP, no
queue, no decoding of files; the model has as many threads there as in the service. The service runs as a process, once with whole batches,
once with questions joining between steps. New images are met for the first time; known ones were asked about before, with another question.
The rest runs in this process, in processor time. What has a target stands at the end, beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.child import with_stock_tower
from benchmarks.llava import Shape, report, save_data, save_llava
from benchmarks.served_demo import MODES, mixed_over_http, save_adapters, served_demo
from benchmarks.serving_load import Load, Service, body, percentile
from benchmarks.usual_pictures import usual_pictures
from hscr.answer import Answerer, AnswerRequest
from hscr.image_limits import ImageLimits
from hscr.image_view import View
from hscr.images import decode_image, read_images
from hscr.model import load_model
from service.decoding import Decoders
from service.freed_memory import keep_freed_memory

QUESTIONS = [f"What does this picture show in the {where}?" for where in "left right middle top bottom corner".split()]


def lengths(n: int) -> list[int]:
    """Answers of 8 to 40 tokens, the same mix for all."""
    return [8 + 32 * (i * 7 % 11) // 10 for i in range(n)]


def pictures(folder: Path, n: int, seed: int) -> list[bytes]:
    data = folder / f"pictures-{seed}"
    save_data(data, n, 4, 0, seed)
    return [(data / "images" / f"{i}.png").read_bytes() for i in range(n)]


def opened(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image)).convert("RGB")


def generated(model: Path, images: list[bytes]) -> Load:
    """Each image asked about alone by stock `generate`, its pixels decoded already."""
    vlm = load_model(model, device="cpu")
    with_stock_tower(vlm.base)
    load = Load(0, 0)
    pixels = [opened(image) for image in images]
    start, cpu = time.perf_counter(), time.process_time()
    for image, tokens in zip(pixels, lengths(len(images)), strict=True):
        begin = time.perf_counter()
        text = f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:"
        batch = vlm.processor(images=[image], text=text, return_tensors="pt")
        with torch.no_grad():
            vlm.model.generate(**batch, do_sample=False, max_new_tokens=tokens)
        load.answered.append(time.perf_counter() - begin)
    load.wall_s, load.cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return load


def row(method: str, images: str, clients: object, load: Load, plain: Load) -> dict[str, Any]:
    assert not load.unanswered, "questions failed"
    return {
        "method": method,
        "images": images,
        "clients": clients,
        "answers/s": load.rate,
        "× generate": load.rate / plain.rate,
        "CPU ms an answer": load.cpu_ms,
        "× generate (CPU)": plain.cpu_ms / load.cpu_ms,
        "p50 ms": 1000 * percentile(load.answered, 0.5),
        "p95 ms": 1000 * percentile(load.answered, 0.95),
    }


def throughput(folder: Path, model: Path, clients: list[int], n: int) -> list[dict[str, Any]]:
    """New, known and shared images, by clients, for both ways to schedule; each service sees every image once as new."""
    plain = generated(model, pictures(folder, max(n // 2, 6), 1000))
    rows = [row("generate", "new", 1, plain, plain)]
    services = {m: Service(folder / m, model, scheduling=m, queue_max=256, key_questions_max=256) for m in MODES}
    for mode, service in services.items():
        with service:
            service.closed([body(i, "warm up", 4) for i in pictures(folder, 2, 999)], 1)
            for c in clients:
                images = pictures(folder, max(n, c), c)
                mix = list(zip(images, lengths(len(images)), strict=True))
                rows.append(row(mode, "new", c, service.closed([body(i, QUESTIONS[0], t) for i, t in mix], c), plain))
                known = service.closed([body(i, QUESTIONS[1], t) for i, t in mix], c)
                rows.append(row(mode, "known", c, known, plain))
    return rows


def six(folder: Path, model: Path, n: int) -> list[dict[str, Any]]:
    """Six questions on one image at once, then six on the next: on new images, and on known ones with other questions."""
    shared = pictures(folder, max(n // 6, 1), 2000)
    plain = generated(model, pictures(folder, 12, 1000))  # answers as long, on average
    rows = []
    for mode in MODES:
        with Service(folder / f"six-{mode}", model, scheduling=mode) as service:
            service.closed([body(i, "warm up", 4) for i in pictures(folder, 2, 999)], 1)
            for kind, lead in (("new", ""), ("known", "And now: ")):
                asked = [[body(i, lead + q, t) for q, t in zip(QUESTIONS, lengths(6), strict=True)] for i in shared]
                loads = [service.closed(bodies, 6) for bodies in asked]
                whole = Load(sum(load.wall_s for load in loads), sum(load.cpu_s for load in loads))
                whole.answered = [seconds for load in loads for seconds in load.answered]
                whole.unanswered = sum(load.unanswered for load in loads)
                rows.append(row(mode, f"six on one, {kind}", 6, whole, plain))
    return rows


def overload(folder: Path, model: Path, n: int) -> list[dict[str, Any]]:
    """Questions at four times the best rate, with a queue of 16."""
    with Service(folder / "overload", model, queue_max=16, key_questions_max=1000) as service:
        images = pictures(folder, 8, 3000)
        bodies = [body(images[i % 8], QUESTIONS[i % 6], t) for i, t in enumerate(lengths(n))]
        service.closed(bodies[:16], 8)
        best = service.closed(bodies, 16)
        flood = service.open([b for b in bodies for _ in range(4)], 4 * best.rate)
        stayed = [body(i, QUESTIONS[2], 24) for i in pictures(folder, 8, 3001)]
        alone = service.closed(stayed, 8)
        leavers = [body(i, QUESTIONS[2], 400) for i in pictures(folder, 8, 3002)]

        async def with_leavers() -> None:
            await service.leaving(leavers, 0.3)

        asyncio.run(with_leavers())
        after = service.closed([body(i, QUESTIONS[3], 24) for i in pictures(folder, 8, 3003)], 8)
    assert not flood.unanswered, "a refusal without Retry-After"
    return [
        {
            "best answers/s": best.rate,
            "at 4×: answers/s": flood.rate,
            "of the best": flood.rate / best.rate,
            "answered": len(flood.answered),
            "refused": len(flood.refused),
            "a refusal p50 ms": 1000 * percentile(flood.refused, 0.5),
            "p99 ms": 1000 * percentile(flood.refused, 0.99),
            "8 answers after 8 of 400 tokens left, × without": after.wall_s / alone.wall_s,
        }
    ]


def added(folder: Path, model: Path, n: int) -> list[dict[str, Any]]:
    """What a lone client waits beyond the model's own time, by images known and new; the same questions asked in this process in turn.

    The model's own time is that of the engine's call in a process that does nothing else: the same caches, threads and decoded pixels.
    Counted is what lies between the first byte that a client sends on an open connection and the last that it gets. The known and new image
    are the noise that all of this benchmark asks about; beside them a quarter as many pictures of each usual kind, all new.
    """
    answerer = Answerer(load_model(model, device="cpu"), prefix_cache_bytes=2**30)

    def answered(image: Image.Image, question: str, tokens: int) -> float:
        start = time.perf_counter()
        answerer.answer([AnswerRequest(image, question, max_tokens=tokens)])
        return 1000 * (time.perf_counter() - start)

    files = {"new image": pictures(folder, n + 4, 4000), **usual_pictures(n // 4 + 4)}
    found: dict[str, list[tuple[float, float, float, float, float]]] = {kind: [] for kind in ("known image", *files)}
    with Service(folder / "added", model) as service:

        def ask(kind: str, image: bytes, question: str) -> None:
            start = time.perf_counter()
            pixels = decode_image(image)
            decoded = 1000 * (time.perf_counter() - start)
            own = answered(pixels, question, 16)
            ((client, answer),) = service.alone([body(image, question, 16)])
            told = answer["timing_ms"]
            found[kind].append((1000 * client, told["total"], told["model"], own, decoded))

        for turn in range(n + 4):
            for kind in files:
                if turn < len(files[kind]):
                    ask(kind, files[kind][turn], QUESTIONS[0])
            ask("known image", files["new image"][turn], QUESTIONS[1])
    rows = []
    for kind, measured in found.items():
        client, total, engine, own, decoded = (statistics.median(column) for column in zip(*measured[4:], strict=True))
        rows.append(
            {
                "image": kind,
                "KB": len(files.get(kind, files["new image"])[0]) / 1000,
                "client p50 ms": client,
                "in the service": total,
                "in queue and engine": engine,
                "the model in one process": own,
                "added p50 ms": statistics.median(m[0] - m[3] for m in measured[4:]),
                "of it around the engine": statistics.median(m[0] - m[2] for m in measured[4:]),
                "decoding it here": decoded,
            }
        )
    return rows


def decoding(folder: Path, n: int) -> list[dict[str, Any]]:
    """An image's way through a warm process of the service's pool, and decoding it here; files of another byte each time."""
    rows = []
    with closing(Decoders(1, 2**31, 20)) as pool:
        pool.warm()
        pool.decode(pictures(folder, 1, 7000), ImageLimits(), [View()])
        times: dict[str, list[float]] = {"in a process of the pool": [], "here": []}
        for image in pictures(folder, n, 7001):
            start = time.perf_counter()
            pool.decode([image], ImageLimits(), [View()])
            middle = time.perf_counter()
            read_images([image], ImageLimits(), [View()])
            times["in a process of the pool"].append(1000 * (middle - start))
            times["here"].append(1000 * (time.perf_counter() - middle))
    for where, found in times.items():
        rows.append({"a PNG of 400 × 400 decoded": where, "p50 ms": statistics.median(found), "least": min(found)})
    return rows


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def mixed(folder: Path, model: Path, repeats: int) -> list[dict[str, Any]]:
    """Eight questions, four adapters and the base: one forward for all rows, and one a distinct adapter."""
    answerer = Answerer(load_model(model, device="cpu"))
    for number, adapter in enumerate(save_adapters(folder, model, 4)):
        answerer.load_adapter(str(number), adapter)
    images = [opened(i) for i in pictures(folder, 8, 5000)]
    names = [None, "0", "1", "2", "3", None, "0", "1"]
    requests = [
        AnswerRequest(i, QUESTIONS[0], a, max_tokens=t) for i, a, t in zip(images, names, lengths(8), strict=True)
    ]

    def apart() -> list[Any]:
        said: dict[int, Any] = {}
        for name in dict.fromkeys(names):
            rows = [i for i, r in enumerate(requests) if r.adapter == name]
            said |= dict(zip(rows, answerer.answer([requests[i] for i in rows]), strict=True))
        return [said[i] for i in range(len(requests))]

    def base() -> None:
        answerer.answer([AnswerRequest(r.image, QUESTIONS[0], max_tokens=r.max_tokens) for r in requests])

    assert [a.token_ids for a in apart()] == [a.token_ids for a in answerer.answer(requests)]
    times: dict[str, list[float]] = {"one forward": [], "one a distinct adapter": [], "all on the base": []}
    for _ in range(repeats):
        times["one forward"].append(cpu(lambda: answerer.answer(requests)))
        times["one a distinct adapter"].append(cpu(apart))
        times["all on the base"].append(cpu(base))
    one = statistics.median(times["one forward"])
    return [
        {"way": way, "CPU ms": 1000 * statistics.median(t), "× one forward": statistics.median(t) / one}
        for way, t in times.items()
    ]


def mixed_http(folder: Path, model: Path, n: int, repeats: int) -> list[dict[str, Any]]:
    images = pictures(folder, 8, 5001)
    bodies = [body(images[i % 8], QUESTIONS[i % 6], t) for i, t in enumerate(lengths(2 * n))]
    return mixed_over_http(model, folder, bodies, repeats)


def grounding(folder: Path, model: Path, repeats: int) -> list[dict[str, Any]]:
    """The same question on an image with and without its summary, the image new and known."""
    vlm = load_model(model, device="cpu")
    images = [opened(i) for i in pictures(folder, repeats, 6000)]
    found: dict[tuple[str, str], list[float]] = {}
    for image in images:
        for kind in ("none", "summary"):
            vlm.features._items.clear()
            answerer = Answerer(vlm, prefix_cache_bytes=2**30)

            def ask(question: str, answerer: Answerer = answerer, kind: str = kind, image: Any = image) -> None:
                answerer.answer([AnswerRequest(image, question, max_tokens=24, grounding=kind)])

            found.setdefault(("new", kind), []).append(cpu(lambda ask=ask: ask(QUESTIONS[0])))  # type: ignore[misc]
            found.setdefault(("known", kind), []).append(cpu(lambda ask=ask: ask(QUESTIONS[1])))  # type: ignore[misc]
    rows = []
    for image_kind in ("new", "known"):
        plain, summary = (statistics.median(found[image_kind, k]) for k in ("none", "summary"))
        rows.append({"image": image_kind, "answer CPU ms": 1000 * plain, "with summary": summary / plain})
    return rows


def targets(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The figures that have a target, of the parts that ran; rates and waits are the wall's, so they count on an idle machine only."""
    rows: list[dict[str, Any]] = []

    def told(what: str, figure: float, limit: float, unit: str = "×", most: bool = False) -> None:
        met = figure <= limit if most else figure >= limit
        sign = "≤" if most else "≥"
        rows.append(
            {"figure": what, "measured": f"{figure:.3g} {unit}", "target": f"{sign} {limit:g} {unit}", "met": met}
        )

    measured = [*tables.get("throughput", []), *tables.get("six", [])]
    asked = {(r["method"], r["images"], r["clients"]): r for r in measured}
    for what, cell, limit in (
        ("16 clients, new images, against generate", ("continuous", "new", 16), 1.5),
        ("six questions at once on one new image, against generate", ("continuous", "six on one, new", 6), 6),
        ("six at once on one known image, against generate", ("continuous", "six on one, known", 6), 6),
    ):
        if cell in asked:
            told(what, asked[cell]["× generate"], limit)
            told(f"{what}, processor time", asked[cell]["× generate (CPU)"], limit)
    for r in tables.get("added", []):
        told(f"added to the model's own time, {r['image']}, p50", r["added p50 ms"], 5, "ms", most=True)
        # The part that owes nothing to how fast either side's engine is.
        told(f"of it around the engine, {r['image']}, p50", r["of it around the engine"], 5, "ms", most=True)
    if pooled := tables.get("decoding"):
        more = pooled[0]["p50 ms"] - pooled[1]["p50 ms"]
        told("decoding a PNG in a process of the pool, more than here, p50", more, 5, "ms", most=True)
    for r in tables.get("overload", []):
        told("answers at four times the capacity, of the best", r["of the best"], 0.9)
        told("a refusal, p50", r["a refusal p50 ms"], 50, "ms", most=True)
        told("a refusal, p99", r["p99 ms"], 50, "ms", most=True)
    for r in tables.get("grounding", []):
        told(f"grounding summary, {r['image']} image", r["with summary"], 1.35, most=True)
    for r in tables.get("demo", []):
        if r["method"] == "continuous":
            told("the demo's questions over HTTP, 16 clients", r["answers/s"], 50, "answers/s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few questions: a minute or two")
    parser.add_argument(
        "--only",
        choices=["throughput", "six", "overload", "added", "decoding", "mixed", "mixed_http", "grounding", "demo"],
    )
    parser.add_argument("--questions", type=int, default=32, help="questions a cell")
    parser.add_argument("--out", type=Path, help="folder for the tables as JSON")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the model: here, for `generate`, and in the service alike"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as the service's process does, so that both sides have it
    os.environ["HSCR_ENGINE_THREADS"] = str(given.threads)
    n = 12 if given.quick else given.questions
    clients = [1, 16] if given.quick else [1, 4, 16, 64]
    repeats = 3
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = save_llava(folder / "model", Shape(layers=2, tower_layers=2) if given.quick else Shape())
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "throughput": lambda: throughput(folder, model, clients, n),
            "six": lambda: six(folder, model, n),
            "overload": lambda: overload(folder, model, 2 * n),
            "added": lambda: added(folder, model, 2 * n),
            "decoding": lambda: decoding(folder, 2 * n),
            "mixed": lambda: mixed(folder, model, repeats),
            "mixed_http": lambda: mixed_http(folder, model, n, repeats),
            "demo": lambda: served_demo(folder, n),
            "grounding": lambda: grounding(folder, model, repeats),
        }
        tables: dict[str, list[dict[str, Any]]] = {}
        for name, part in parts.items():
            if given.only in (None, name):
                tables[name] = part()
                report(name, tables[name], given.out / f"{name}.json" if given.out else None)
        if rows := targets(tables):
            report("targets", rows, given.out / "targets.json" if given.out else None)


if __name__ == "__main__":
    main()
