"""The service as a process under load over real HTTP: started, asked by many clients at once or at a given rate, timed, stopped.

Times are the wall's and, beside them, the service's processor time: another load on the machine does not change that.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.child import ROOT


@dataclass
class Load:
    """What a load came to: seconds of the wall and of the service's processors, seconds an answer took, and refusals with theirs."""

    wall_s: float
    cpu_s: float
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    unanswered: int = 0  # refused without Retry-After, or failed otherwise
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.answered) / self.wall_s

    @property
    def cpu_ms(self) -> float:
        """Processor time an answer."""
        return 1000 * self.cpu_s / max(len(self.answered), 1)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


class Service:
    """`python -m service.serve` on a fresh data folder; `with` starts and ends it."""

    def __init__(self, folder: Path, model: Path, **settings: object) -> None:
        from service.db import upgrade
        from service.up import _free_port

        folder.mkdir(parents=True, exist_ok=True)
        self.address = f"http://127.0.0.1:{(port := _free_port())}"
        upgrade(f"sqlite:///{folder / 'hscr.db'}")
        given = {"DATA_DIR": folder, "MODEL": model, "PORT": port, "DEVICE": "cpu", "FEATURE_CACHE": "off"} | settings
        self._environment = os.environ | {f"HSCR_{name.upper()}": str(value) for name, value in given.items()}
        self._environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def __enter__(self) -> Service:
        self._line: HTTPConnection | None = None
        command = [sys.executable, "-m", "service.serve"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stderr=subprocess.DEVNULL)
        for _ in range(1200):
            try:
                if httpx.get(f"{self.address}/readyz").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        self.__exit__()
        raise RuntimeError("the service did not become ready")

    def __exit__(self, *raised: object) -> None:
        if self._line is not None:
            self._line.close()
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def cpu_s(self) -> float:
        """Processor time of the service and the processes that decode its images."""
        total = 0.0
        parent = psutil.Process(self._process.pid)
        for process in (parent, *parent.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system
        return total

    def upload(self, name: str, folder: Path) -> str:
        """Register a PEFT folder as an adapter: what a question calls it."""
        with tempfile.TemporaryDirectory() as scratch:
            packed = Path(shutil.make_archive(f"{scratch}/{name}", "zip", folder)).read_bytes()
        address = f"{self.address}/adapters/{name}/versions"
        answer = httpx.post(address, files={"file": ("adapter.zip", packed)}, timeout=300).raise_for_status()
        return f"{name}:{answer.json()['version']}"

    def alone(self, bodies: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
        """Each asked when the last is answered, on one open connection: seconds from its first byte to its answer's last, and the answer.

        What the client spends on writing and reading JSON, and on opening connections, is its own and does not count.
        """
        if self._line is None:
            self._line = HTTPConnection(self.address.removeprefix("http://"), timeout=600)
            self._line.connect()
            self._line.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        told = []
        for data in _written(bodies):
            start = time.perf_counter()
            self._line.request("POST", "/vqa", data, {"Content-Type": "application/json"})
            answer = self._line.getresponse().read()
            told.append((time.perf_counter() - start, json.loads(answer)))
        return told

    def closed(self, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
        """So many clients, each asking the next question when its last is answered."""
        return asyncio.run(self._measured(self._closed(bodies, clients)))

    def open(self, bodies: Sequence[dict[str, Any]], rate: float, seed: int = 0) -> Load:
        """Questions that come at `rate` a second whatever happened to those before, at random (Poisson)."""
        return asyncio.run(self._measured(self._open(bodies, rate, seed)))

    async def _measured(self, work: Any) -> Load:
        cpu = self.cpu_s()
        load: Load = await work
        load.cpu_s = self.cpu_s() - cpu
        return load

    async def _closed(self, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
        load, left = Load(0, 0), _written(bodies)[::-1]

        async def client(http: httpx.AsyncClient) -> None:
            while left:
                await self._ask(http, left.pop(), load)

        async with self._http() as http:
            start = time.perf_counter()
            await asyncio.gather(*(client(http) for _ in range(clients)))
            load.wall_s = time.perf_counter() - start
        return load

    async def _open(self, bodies: Sequence[dict[str, Any]], rate: float, seed: int) -> Load:
        load, stream = Load(0, 0), random.Random(seed)
        async with self._http() as http:
            tasks = []
            written = _written(bodies)
            start = time.perf_counter()
            for body in written:
                tasks.append(asyncio.create_task(self._ask(http, body, load)))
                await asyncio.sleep(stream.expovariate(rate))
            await asyncio.gather(*tasks)
            load.wall_s = time.perf_counter() - start
        return load

    async def leaving(self, bodies: Sequence[dict[str, Any]], after_s: float) -> int:
        """Ask, and leave after so many seconds; how many were answered before."""
        async with self._http() as http:
            tasks = [asyncio.create_task(http.post("/vqa", json=body)) for body in bodies]
            done, gone = await asyncio.wait(tasks, timeout=after_s)
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            return len(done)

    def _http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        return httpx.AsyncClient(base_url=self.address, timeout=600, limits=limits)

    async def _ask(self, http: httpx.AsyncClient, body: bytes, load: Load) -> None:
        start = time.perf_counter()
        response = await http.post("/vqa", content=body, headers={"Content-Type": "application/json"})
        took = time.perf_counter() - start
        if response.status_code == 200:
            load.answered.append(took)
            load.answers.append(response.json())
        elif response.status_code == 503 and "retry-after" in response.headers:
            load.refused.append(took)
        else:
            load.unanswered += 1


def _written(bodies: Sequence[dict[str, Any]]) -> list[bytes]:
    """Before the clock runs: a megabyte of JSON takes a client longer to write than the service to refuse, and all clients share a loop."""
    return [json.dumps(body).encode() for body in bodies]


def body(image: bytes, question: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    encoded = base64.b64encode(image).decode()
    return {"image": {"base64": encoded}, "question": question, "max_tokens": max_tokens} | more
