"""What the service makes of adapters over HTTP: `hscr demo`'s questions on its own model, and four adapters beside the base in one load.

The demo asks base and adapter alike with real, blank and shuffled images, grounding with the real ones; here the adapter is a random one.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import hscr.demo
from benchmarks.serving_load import Load, Service, body, percentile
from hscr.config import OptimizationConfig
from hscr.demo.data import build
from hscr.evaluate import derangement
from hscr.model import add_lora, load_model
from hscr.records import read_records

CLIENTS = 16
MODES = ("static", "continuous")


def save_adapters(folder: Path, model: Path, n: int, strength: float = 0.02) -> list[Path]:
    """PEFT folders with random weights."""
    made = []
    for seed in range(n):
        vlm = load_model(model, device="cpu")
        add_lora(vlm, OptimizationConfig(lora_rank=16), seed=seed)
        with torch.no_grad():
            for name, p in vlm.model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, strength)
        vlm.model.save_pretrained(str(folder / f"adapter-{seed}"), safe_serialization=True)
        made.append(folder / f"adapter-{seed}")
    return made


def demo_questions(data: Path, adapter: str) -> list[dict[str, Any]]:
    """The demo's questions, base and version asked by themselves, so that an answer is a request (the demo asks both in one)."""
    records, _ = read_records(data)
    files = [(data / record.image).read_bytes() for record in records]
    other, blank = derangement(len(records), 0), io.BytesIO()
    Image.new("RGB", Image.open(io.BytesIO(files[0])).size).save(blank, "PNG")
    shown = {"real": files, "blank": [blank.getvalue()] * len(files), "shuffled": [files[i] for i in other]}
    return [
        body(image, record.question, 64, grounding="summary" if condition == "real" else "none", **named)
        for condition, images in shown.items()
        for named in ({}, {"adapter": adapter})
        for record, image in zip(records, images, strict=True)
    ]


def served_demo(folder: Path, n: int, blocks: int = 3) -> list[dict[str, Any]]:
    """Six questions on each of n slices a block, both ways to schedule in turn."""
    model = Path(hscr.demo.__file__).parent / "model"
    (adapter,) = save_adapters(folder / "demo", model, 1, strength=0.005)
    loads: dict[str, list[Load]] = {mode: [] for mode in MODES}
    services = {m: Service(folder / f"demo-{m}", model, scheduling=m, key_questions_max=256) for m in MODES}
    with services["static"], services["continuous"]:
        names = {m: s.upload("demo", adapter) for m, s in services.items()}
        for seed in range(blocks):
            data = build(folder / f"slices-{seed}", seed, None, {"test": n})["test"]
            for mode, service in services.items():
                loads[mode].append(service.closed(demo_questions(data, names[mode]), CLIENTS))
    assert not any(load.unanswered or load.refused for own in loads.values() for load in own)
    rows = []
    for mode, own in loads.items():
        answered = [s for load in own for s in load.answered]
        rows.append(
            {
                "method": mode,
                "answers/s": len(answered) / sum(load.wall_s for load in own),
                "best block": max(load.rate for load in own),
                "CPU ms an answer": 1000 * sum(load.cpu_s for load in own) / len(answered),
                "least": min(load.cpu_ms for load in own),
                "p50 ms": 1000 * percentile(answered, 0.5),
                "p95 ms": 1000 * percentile(answered, 0.95),
            }
        )
    return rows


def mixed_over_http(model: Path, folder: Path, bodies: list[dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """The same questions from 16 clients to the base alone, and to the base and four adapters in turn, in one service."""
    cells: dict[str, list[float]] = {"all on the base": [], "four adapters and the base": []}
    with Service(folder / "mixed", model, queue_max=256, key_questions_max=256) as service:
        names = [service.upload(f"a{i}", a) for i, a in enumerate(save_adapters(folder / "mixed", model, 4))]
        turns: list[dict[str, Any]] = [{}, *({"adapter": name} for name in names)]
        mixes: dict[str, list[dict[str, Any]]] = {"all on the base": [{}], "four adapters and the base": turns}
        for _ in range(1 + repeats):  # the first brings images and adapters in
            for way, mix in mixes.items():
                load = service.closed([b | mix[i % len(mix)] for i, b in enumerate(bodies)], CLIENTS)
                assert not load.unanswered
                cells[way].append(load.cpu_ms)
    base = min(cells["all on the base"][1:])
    return [{"asked": w, "CPU ms an answer": min(c[1:]), "× base": min(c[1:]) / base} for w, c in cells.items()]
