"""Prometheus metrics of one API process. Labels are routes, statuses and fixed words: never an id, never anything from a request's body.

What jobs did is counted from the database (service/job_counts.py): worker and sweep are other processes, and may be on other machines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from service.db import Database
from service.decoding import DecodeStats
from service.job_counts import JobCounts
from service.models import STATUSES, Job, now


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "hscr_http_requests", "Requests by route and status", ["method", "route", "status"], registry=r
        )
        self.seconds = Histogram("hscr_http_request_seconds", "Time to the response's end", ["route"], registry=r)
        self.refusals = Counter("hscr_refusals", "Refused requests by the problem's code", ["code"], registry=r)
        self.oldest = Gauge("hscr_jobs_oldest_queued_seconds", "Age of the job that waits longest", registry=r)
        self.jobs = Gauge("hscr_jobs", "Jobs by status", ["status"], registry=r)
        self.entered = Counter("hscr_job_entries", "Jobs that came to a status", ["status"], registry=r)
        self.lost = Counter(
            "hscr_job_attempts_ended", "Attempts that ended without an end of the job", ["reason"], registry=r
        )
        self.batch_size = Histogram(
            "hscr_vqa_batch_size", "Questions answered together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=r
        )
        self.refused = Counter("hscr_vqa_refused", "Questions refused because the queue was full", registry=r)
        self.queue_depth = Gauge("hscr_vqa_queue_depth", "Questions waiting", registry=r)
        self.queue_oldest = Gauge("hscr_vqa_queue_oldest_seconds", "Age of the question that waits longest", registry=r)
        self.first_token = Histogram(
            "hscr_vqa_first_token_seconds",
            "From a question's coming to its first token; to its answer where a model is asked whole batches",
            buckets=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6),
            registry=r,
        )
        self._counts = JobCounts()
        r.register(_Gpu())

    def watch_queue(self, depth: Callable[[], float], oldest_s: Callable[[], float]) -> None:
        self.queue_depth.set_function(depth)
        self.queue_oldest.set_function(oldest_s)

    def watch_engine(self, stats: Callable[[], dict[str, int]]) -> None:
        """Counts of the engine by name (Stats of service/engine.py or service/upstream/engine.py)."""
        self.registry.register(_Engine(stats))

    def watch_decoders(self, stats: Callable[[], DecodeStats]) -> None:
        self.registry.register(_Decoders(stats))

    def scrape(self, database: Database) -> bytes:
        """The text format, with the jobs counted now."""
        with database.read() as session:
            rows = session.execute(select(Job.status, func.count()).group_by(Job.status)).all()
            oldest = session.scalar(select(func.min(Job.queued_at)).where(Job.status == "queued"))
            entered, lost = self._counts.more(session)
        self.oldest.set(max(0.0, (now() - oldest).total_seconds()) if oldest else 0)
        counts = dict(rows)
        for status in STATUSES:
            self.jobs.labels(status).set(counts.get(status, 0))
            self.entered.labels(status).inc(entered[status])
        for reason, n in lost.items():
            self.lost.labels(reason).inc(n)
        return generate_latest(self.registry)


_NOW = {"adapters", "adapter_bytes", "prefix_bytes"}  # of the engine's counts those that also fall


class _Engine(Collector):
    def __init__(self, stats: Callable[[], dict[str, int]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        for name, value in self._stats().items():
            family = GaugeMetricFamily if name in _NOW else CounterMetricFamily
            yield family(f"hscr_engine_{name}", f"The engine's {name.replace('_', ' ')}", value)


class _Decoders(Collector):
    def __init__(self, stats: Callable[[], DecodeStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        s = self._stats()
        yield GaugeMetricFamily("hscr_decode_processes", "Processes that may decode images", s.processes)
        yield GaugeMetricFamily("hscr_decode_busy", "Of them those at work", s.busy)
        yield CounterMetricFamily("hscr_decode_orders", "Orders given to them", s.orders)
        yield CounterMetricFamily("hscr_decode_refused", "Images that were refused", s.refused)
        yield CounterMetricFamily("hscr_decode_lost", "Processes that crashed, stalled or swelled", s.lost)
        yield CounterMetricFamily("hscr_decode_no_room", "Orders that found no free process in time", s.no_room)


class _Gpu(Collector):
    """Memory of the CUDA devices; no sample where torch isn't loaded or sees none. It never loads torch itself."""

    def collect(self) -> Iterator[Any]:
        memory = GaugeMetricFamily("hscr_gpu_memory_bytes", "By the engine", labels=["device", "kind"])
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(device)
                memory.add_metric([str(device), "allocated"], torch.cuda.memory_allocated(device))
                memory.add_metric([str(device), "reserved"], torch.cuda.memory_reserved(device))
                memory.add_metric([str(device), "free"], free)
                memory.add_metric([str(device), "total"], total)
        yield memory
