"""The main job end to end on real processes: `hscr up`, demo data, kill -9 in every stage, answers over HTTP, stock peft."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from hscr.cli_options import DEMO_MODEL
from hscr.demo.data import build
from hscr.records import read_records
from tests.hscr.test_cli import hscr  # noqa: F401 - a fixture

# Each death costs a worker, a lease and a run's start; that of an evaluation, whose adapter is whole, waits for `make test-all`.
STAGES = ("generating", "optimizing", *(["evaluating"] if os.environ.get("HSCR_THOROUGH") else []))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("demo"), 0, None, {"align": 32, "valid": 12})


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, httpx.Client, Path]]:
    data = tmp_path_factory.mktemp("service")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "HSCR_LEASE_S": "3", "HSCR_RING_AFTER_S": "2", "HSCR_API_KEY": ""}
    with (data / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "up", "--port", str(port), "--data", str(data)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    family = psutil.Process(process.pid)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _until(lambda: _ready(client), 90, lambda: (data / "up.log").read_text())
            yield family, client, data
            children = family.children(recursive=True)
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            assert not psutil.wait_procs(children, timeout=20)[1], "hscr up left processes running"
    finally:
        process.kill()
        process.wait()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _until(condition: Any, limit_s: float, explain: Any = lambda: "") -> Any:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {limit_s} s\n{explain()}")


def _upload(client: httpx.Client, folder: Path, name: str) -> str:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                z.write(path, path.relative_to(folder))
    response = client.post("/datasets", data={"name": name}, files={"file": ("d.zip", archive.getvalue())})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def _events(client: httpx.Client, job: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while True:
        page = client.get(f"/jobs/{job}/events", params={"after": len(events), "limit": 200}).json()
        events += page["data"]
        if not page["has_more"]:
            return events


@pytest.fixture(scope="module")
def finished(
    service: tuple[psutil.Process, httpx.Client, Path], demo: dict[str, Path]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """A job whose worker and supervisor were killed (-9) once in each stage; the job, its events and the stages of the kills."""
    family, client, _ = service
    body = {
        "dataset": _upload(client, demo["align"], "align"),
        "adapter": "e2e",
        "preference": {"batch_size": 4, "similarity": "token_f1"},
        "optimization": {"epochs": 3, "batch_size": 8, "checkpoint_every": 2},
        "evaluation": {"dataset": _upload(client, demo["valid"], "valid"), "batch_size": 4},
    }
    accepted = client.post("/align", json=body)
    assert accepted.status_code == 202, accepted.text
    job = accepted.json()["id"]
    killed = []
    for stage in STAGES:

        def under_way(stage: str = stage) -> bool:
            view = client.get(f"/jobs/{job}").json()
            assert view["status"] in ("queued", "running"), view
            shown = view["progress"] or {}
            return view["status"] == "running" and shown.get("stage") == stage and 0 < shown["done"] < shown["total"]

        _until(under_way, 90, lambda: json.dumps(_events(client, job)[-10:], indent=1))
        workers = [p for p in family.children(recursive=True) if "worker.tasks" in " ".join(p.cmdline())]
        assert len(workers) >= 2, "the worker's main process and its child, the supervisor"
        for process in workers:
            process.kill()
        killed.append(stage)
        psutil.wait_procs(workers, timeout=5)
    view = _until(
        lambda: (v := client.get(f"/jobs/{job}").json())["status"] in ("succeeded", "failed") and v,
        180,
        lambda: json.dumps(_events(client, job)[-10:], indent=1),
    )
    return view, _events(client, job), killed


def test_a_job_whose_worker_dies_in_every_stage_succeeds_once(
    service: tuple[psutil.Process, httpx.Client, Path],
    finished: tuple[dict[str, Any], list[dict[str, Any]], list[str]],
) -> None:
    _, client, _ = service
    job, events, killed = finished
    assert job["status"] == "succeeded", job["error"]
    assert killed == list(STAGES)
    assert job["attempts"] >= 1 + len(STAGES)
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert [e["data"].get("status") for e in events if e["type"] == "status"].count("succeeded") == 1
    assert client.get("/adapters/e2e").json()["last_version"] == 1
    steps = [e["data"]["step"] for e in events if e["type"] == "metrics" and e["data"]["stage"] == "optimizing"]
    assert max(steps) == 12
    assert len(steps) < 2 * 12, "the second attempt went on from a checkpoint instead of starting over"


def test_the_resumed_adapter_is_the_uninterrupted_one(
    service: tuple[psutil.Process, httpx.Client, Path],
    finished: tuple[dict[str, Any], list[dict[str, Any]], list[str]],
    demo: dict[str, Path],
    hscr: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The same configuration through `hscr align`, with no service and no kill, gives the same bytes."""
    _, client, _ = service
    job = finished[0]
    (tmp_path / "config.json").write_text(json.dumps(job["config"] | {"evaluation": {"max_records": 0}}))
    torch.set_num_threads(1)  # as the runs of the service have it
    config = ["--config", tmp_path / "config.json", "--events", "json"]
    code, _, errors = hscr("align", demo["align"], "--out", tmp_path / "run", *config)
    assert code == 0, errors
    _download(client, tmp_path / "served")
    ours = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "served" / "adapter_model.safetensors").read_bytes() == ours


def _download(client: httpx.Client, folder: Path) -> None:
    response = client.get("/adapters/e2e/versions/1/download")
    assert response.status_code == 200
    with zipfile.ZipFile(io.BytesIO(response.content)) as z:
        z.extractall(folder)
    if not (folder / "adapter_config.json").is_file():  # the archive may hold one folder
        inner = next(folder.iterdir())
        for path in inner.iterdir():
            shutil.move(str(path), folder)


def test_stock_peft_gives_the_services_answer_token_for_token(
    service: tuple[psutil.Process, httpx.Client, Path],
    finished: tuple[dict[str, Any], list[dict[str, Any]], list[str]],
    demo: dict[str, Path],
    tmp_path: Path,
) -> None:
    from peft import PeftModel
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    _, client, _ = service
    assert finished[0]["status"] == "succeeded"
    _download(client, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        assert any(tensors.get_tensor(k).abs().sum() > 0 for k in tensors.keys() if "lora_B" in k)  # noqa: SIM118
    processor = AutoProcessor.from_pretrained(DEMO_MODEL)
    model = LlavaForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    records, _ = read_records(demo["valid"])
    for record in records[:8]:
        path = demo["valid"] / record.image
        response = client.post(
            "/vqa",
            files={"image": path.read_bytes()},
            data={"question": record.question, "adapter": "e2e", "max_tokens": "40", "grounding": "tokens"},
        )
        assert response.status_code == 200, response.text
        body = response.json()
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record.question}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        with Image.open(path) as image:
            inputs = processor(images=[image.convert("RGB")], text=prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert body["token_ids"] == ids.tolist()
        assert body["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert body["adapter"]["version"] == 1
        assert len(body["grounding"]["tokens"]) == len(ids)
