"""`hscr demo`: the whole main job as a client of the service, on real MRI slices, and an honest reading of the outcome.

Builds the demo data, starts `hscr up`, uploads over HTTP, aligns, follows the events, asks base and new version the same questions with
real, blank and shuffled images, prints a table and writes a page. Knows the HTTP contract only: nothing here reaches into the service.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import connect_sse
from PIL import Image
from rich.console import Console
from rich.table import Table

from hscr.config import EvaluationConfig
from hscr.demo.data import build
from hscr.evaluate import derangement
from hscr.predictions import CONDITIONS, Prediction
from hscr.progress import bars, by_name, evaluation_table
from hscr.records import VQARecord, read_records
from hscr.report import image_uri, render
from hscr.scoring import is_right, score
from hscr.tables import summarize

# So many test questions tell a gain of 4 points from none, so many valid ones carry a threshold (docs/experiments.md).
SPLITS = {"align": 480, "valid": 300, "test": 480}
CLIENTS = 10  # calls at once, of two answers each: enough to keep the engine's batches full
WATCHED = ("open/grounded_words", "closed/strict")
console = Console()


class DemoError(Exception):
    """A part of the demonstration failed; the message says which, with what it logged."""


def run_demo(data: Path, seed: int) -> None:
    """Run the demonstration in `data` (data set, service state and report); raises DemoError with the log's tail where a part fails."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # also where a shell started this in the background with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    started = time.monotonic()
    with bars(console) as progress:
        folders = build(data / "dataset", seed, by_name(progress), SPLITS)
    with _service(data / "service") as client:
        job, version = _align(client, folders, seed)
        records, _ = read_records(folders["test"])
        predictions = _ask_all(client, folders["test"], records, version)
    summary = summarize(predictions, EvaluationConfig())
    console.print(evaluation_table(summary))
    console.print(_side_by_side(records, predictions))
    lines = [*conclusions(summary), flag_line(version, predictions)]
    for line in lines:
        console.print(f"• {line}")
    page = data / "report.html"
    page.write_text(_page(folders["test"], records, predictions, summary, lines, job, version), encoding="utf-8")
    console.print(f"report: [bold]{page}[/]   ({time.monotonic() - started:.0f} s)")


@contextmanager
def _service(data: Path) -> Iterator[httpx.Client]:
    """`hscr up` as a process of its own, ready to answer; stopped with everything it started when the block ends, however it ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data.mkdir(parents=True, exist_ok=True)
    log = data / "up.log"
    command = [sys.executable, "-m", "service.cli", "up", "--port", str(port), "--data", str(data)]
    with log.open("wb") as out:
        # Its own session: a Ctrl-C in the terminal reaches this process only, which then stops the service in order.
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HSCR_API_KEY": ""},
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            with console.status("starting the service: Valkey, worker, sweep, API…"):
                _wait_ready(client, process, log)
            console.print(f"service: http://127.0.0.1:{port}   docs while the demo runs: http://127.0.0.1:{port}/docs")
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError("the service did not start:\n" + log.read_text(errors="replace")[-2000:])
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise DemoError(f"the service was not ready within {limit_s:.0f} s:\n" + log.read_text(errors="replace")[-2000:])


def _checked(response: httpx.Response) -> Any:
    if response.is_error:
        problem = response.json()
        raise DemoError(f"{response.request.url.path}: {problem.get('title')}: {problem.get('detail')}")
    return response.json()


def _upload(client: httpx.Client, name: str, folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        archive = shutil.make_archive(f"{scratch}/{name}", "zip", folder)
        with open(archive, "rb") as file:
            made = _checked(
                client.post("/datasets", data={"name": name, "format": "hscr"}, files={"file": (f"{name}.zip", file)})
            )
    console.print(f"uploaded {name}: data set {made['id']} with {made['n_records']} records")
    return str(made["id"])


def _align(client: httpx.Client, folders: dict[str, Path], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Upload, POST /align, follow the server-sent events to the end; the job and the version that it made."""
    dataset = _upload(client, "demo-align", folders["align"])
    evaluation = _upload(client, "demo-valid", folders["valid"])
    body = {
        "dataset": dataset,
        "adapter": "demo",
        "preset": "demo",
        "evaluation": {"dataset": evaluation, "counterfactual": False},  # this program asks with other images itself
        "seed": seed,
    }
    job = _checked(client.post("/align", json=body))
    with bars(console) as progress:
        show = by_name(progress)
        done: dict[str, tuple[int, int]] = {}
        with connect_sse(
            client, "GET", f"/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}, timeout=None
        ) as source:
            for event in source.iter_sse():
                if not event.data:  # the stream opens with a `retry:` line alone
                    continue
                data = json.loads(event.data)["data"]
                if event.event == "progress":
                    done[data["stage"]] = (data["done"], data["total"])
                    show(data["stage"], *done[data["stage"]])
                elif event.event == "metrics" and "loss" in data["values"] and data["stage"] in done:
                    show(data["stage"], *done[data["stage"]], {"loss": data["values"]["loss"]})
                elif event.event == "warning":
                    progress.console.print(f"[yellow]warning:[/] {data['message']}")
    job = _checked(client.get(f"/jobs/{job['id']}"))
    if job["status"] != "succeeded":
        raise DemoError(f"the job {job['status']}: {job.get('error')}")
    made = job["lineage"]["adapter"]
    version = _checked(client.get(f"/adapters/{made['name']}/versions/{made['version']}"))
    console.print(f"adapter version demo:{version['version']} ({version['digest'][:19]}…)")
    return job, version


def _ask_all(client: httpx.Client, folder: Path, records: list[VQARecord], version: dict[str, Any]) -> list[Prediction]:
    """Every question to the base and to the version in one call, with its image, a blank one and another slice's."""
    tasks = [(c, n) for c in CONDITIONS for n in range(len(records))]
    other = derangement(len(records), 0)
    blank = io.BytesIO()
    with Image.open(folder / records[0].image) as first:
        Image.new("RGB", first.size).save(blank, "PNG")
    out: dict[tuple[str, str, int], Prediction] = {}

    async def ask(http: httpx.AsyncClient, gate: asyncio.Semaphore, number: int) -> None:
        condition, row = tasks[number]
        record, shown = records[row], records[other[row] if condition == "shuffled" else row]
        image = blank.getvalue() if condition == "blank" else (folder / shown.image).read_bytes()
        body: dict[str, Any] = {
            "image": {"base64": base64.b64encode(image).decode()},
            "question": record.question,
            "grounding": "summary" if condition == "real" else "none",
            "compare": f"demo:{version['version']}",
        }
        async with gate:
            base = _checked(await http.post("/vqa", json=body))
        for policy, answer in (("base", base), ("adapter", base["compare"])):
            text = answer["answer"]
            out[condition, policy, row] = Prediction(
                policy,
                condition,
                record.id,
                text,
                score(record, text),
                answer["grounding"]["score"] if condition == "real" else None,
                question=record.question,
                group=record.group,
                reference=record.answer,
            )

    async def ask_every() -> None:
        gate = asyncio.Semaphore(CLIENTS)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as http:
            with bars(console) as progress:
                task = progress.add_task("asking /vqa", total=len(tasks), note="real, blank, shuffled")
                for done in asyncio.as_completed([ask(http, gate, n) for n in range(len(tasks))]):
                    await done
                    progress.advance(task)

    asyncio.run(ask_every())
    return [out[c, p, n] for c in CONDITIONS for p in ("base", "adapter") for n in range(len(records))]


def conclusions(summary: dict[str, Any]) -> list[str]:
    """The outcome in plain words, good or bad."""
    names = {"open/grounded_words": "words that only the image can give", "closed/strict": "closed questions"}
    lines = []
    for metric in WATCHED:
        v = summary["verdict"][metric]
        gain = v["gain"]
        size = f"{100 * gain['mean']:+.1f} points [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
        text = {
            "better": f"On {names[metric]} the adapter beats the base: {size}.",
            "tie": f"On {names[metric]} adapter and base cannot be told apart: {size}.",
            "worse": f"On {names[metric]} the adapter is worse than the base: {size}.",
        }[v["result"]]
        if v["result"] == "better":
            text += _without(v, "blank", "blank images") + _without(v, "shuffled", "another slice's image")
        lines.append(text)
    return lines


def flag_line(version: dict[str, Any], predictions: list[Prediction]) -> str:
    """What the version's threshold, found on other questions, does to the answers of this test; or why there is none."""
    grounding = version["grounding"]
    threshold = grounding["threshold"]
    if threshold is None:
        return f"No grounding score is flagged, for the version has no threshold: {grounding['reason']}."
    rights: dict[bool, list[bool]] = {True: [], False: []}
    for p in predictions:
        right = is_right(p.scores) if (p.policy, p.condition) == ("adapter", "real") else None
        if right is not None and p.grounding is not None:
            rights[p.grounding < threshold].append(right)
    judged = sum(map(len, rights.values()))
    kept, flagged = (
        f"{100 * sum(part) / len(part):.0f} %" if part else "none" for part in (rights[False], rights[True])
    )
    return (
        f"The version's threshold, from the questions of `valid`, is {threshold:.4f} nats: {len(rights[True])} of its {judged} answers "
        f"here score lower and are flagged (with `abstain` withheld). Right are {kept} of those kept, {flagged} of those flagged."
    )


def _without(v: dict[str, Any], condition: str, name: str) -> str:
    gain = v[f"{condition}_gain"]
    size = f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
    if v[f"gone_when_{condition}"]:
        return f" With {name} the gain is gone, as it should be: {size}."
    return f" With {name} a gain remains, which it should not: {size}."


def _side_by_side(records: list[VQARecord], predictions: list[Prediction], n: int = 6) -> Table:
    table = Table(title="answers that differ, in file order")
    for column in ("question", "reference", "base", "adapter"):
        table.add_column(column, overflow="fold")
    for record, base, adapter in _differing(records, predictions)[:n]:
        table.add_row(record.question, record.answer, base.text, adapter.text)
    return table


def _differing(
    records: list[VQARecord], predictions: list[Prediction]
) -> list[tuple[VQARecord, Prediction, Prediction]]:
    said = {(p.policy, p.id): p for p in predictions if p.condition == "real"}
    rows = [(r, said["base", r.id], said["adapter", r.id]) for r in records]
    return [row for row in rows if row[1].text != row[2].text]


def _page(
    folder: Path,
    records: list[VQARecord],
    predictions: list[Prediction],
    summary: dict[str, Any],
    lines: list[str],
    job: dict[str, Any],
    version: dict[str, Any],
) -> str:
    answers = []
    for record, base, adapter in _differing(records, predictions)[:24]:
        with Image.open(folder / record.image) as image:
            answers.append({"record": record, "image": image_uri(image), "base": base, "adapter": adapter})
    return render(
        "demo.html",
        evaluation=summary,
        lines=lines,
        answers=answers,
        job=job,
        version=version,
        config=job.get("config", {}),
    )
