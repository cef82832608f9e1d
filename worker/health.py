"""`python -m worker.health`: exit 0 where the broker answers and a Celery worker runs in this container. No torch."""

from __future__ import annotations

import sys

import psutil
import redis

from service.settings import settings_or_exit


def healthy() -> bool:
    """Remote control is switched off on purpose, so the process itself is looked for instead of being pinged through the broker."""
    with redis.Redis.from_url(settings_or_exit().redis_url, socket_timeout=3, socket_connect_timeout=3) as client:
        try:
            client.ping()
        except redis.RedisError:
            return False
    return any("worker.tasks" in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


if __name__ == "__main__":
    sys.exit(0 if healthy() else 1)
