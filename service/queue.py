"""The doorbell: the Celery application and the ringing of a job's id. Nothing else ever travels through the broker.

Bells may be lost or doubled: the job's row is the letter. No torch and no web framework here.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES

from service.settings import Settings

TRANSPORT_ALIASES |= dict.fromkeys(("redis", "rediss"), "service.broker:Transport")
TRANSPORT_ALIASES["sentinel"] = "service.broker:SentinelTransport"
QUEUE = "hscr-align"
TASK, HELP_TASK = "hscr.run_job", "hscr.help_job"

# A broker that accepts and never answers would else block a publisher for more than 40 s (measured on Celery 5.7).
_SOCKETS = {"socket_timeout": 5, "socket_connect_timeout": 3, "socket_keepalive": True, "retry_on_timeout": False}


def make_celery(settings: Settings) -> Celery:
    """One task at a time a worker process, no prefetch, JSON only, results ignored, acknowledged on receipt."""
    app = Celery("hscr", broker=settings.redis_url, set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE,
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_publish_retry=False,
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=3,
        broker_transport_options=_SOCKETS,
        # An early-acknowledged task needs no redelivery; the sweep rings again for whatever nobody claimed.
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    return app


def ring(app: Celery, job_id: str) -> None:
    """Put one bell into the queue. Raises kombu's OperationalError where the broker does not take it."""
    app.send_task(TASK, args=[job_id], queue=QUEUE, retry=False, ignore_result=True)


def call_helper(app: Celery, job_id: str) -> None:
    """The same for whoever is idle: this running job has shards to make. In the one queue, so that no worker listens twice."""
    app.send_task(HELP_TASK, args=[job_id], queue=QUEUE, retry=False, ignore_result=True)


def waiting_bells(app: Celery) -> int:
    """How many bells lie in the broker's queue."""
    with app.connection_for_read(connect_timeout=3) as connection:
        channel: Any = connection.default_channel
        return int(channel.client.llen(QUEUE))
