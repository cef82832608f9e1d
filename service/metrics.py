"""Prometheus metrics of one API process. Labels are routes, statuses and fixed words: never an id, never anything from a request's body."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select

from service.db import Database
from service.models import STATUSES, Job, now


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "hscr_http_requests", "Requests by route and status", ["method", "route", "status"], registry=r
        )
        self.seconds = Histogram("hscr_http_request_seconds", "Time to the response's end", ["route"], registry=r)
        self.oldest = Gauge("hscr_jobs_oldest_queued_seconds", "Age of the job that waits longest", registry=r)
        self.jobs = Gauge("hscr_jobs", "Jobs by status", ["status"], registry=r)
        self.batch_size = Histogram(
            "hscr_vqa_batch_size", "Questions answered together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=r
        )
        self.refused = Counter("hscr_vqa_refused", "Questions refused because the queue was full", registry=r)
        self.queue_depth = Gauge("hscr_vqa_queue_depth", "Questions waiting", registry=r)

    def watch_queue(self, depth: Callable[[], float]) -> None:
        self.queue_depth.set_function(depth)

    def scrape(self, database: Database) -> bytes:
        """The text format, with the jobs counted now."""
        with database.read() as session:
            rows = session.execute(select(Job.status, func.count()).group_by(Job.status)).all()
            oldest = session.scalar(select(func.min(Job.queued_at)).where(Job.status == "queued"))
        self.oldest.set(max(0.0, (now() - oldest).total_seconds()) if oldest else 0)
        counts = dict(rows)
        for status in STATUSES:
            self.jobs.labels(status).set(counts.get(status, 0))
        return generate_latest(self.registry)
