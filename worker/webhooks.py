"""Sending webhooks: a thread of the sweep's process takes deliveries that are due, posts them, and notes how it went.

A delivery is claimed by moving its due time, so that two sweeps do not both send it and one whose sender died is sent again. Redirects are
not followed, answers are not read, and an attempt ends after its time however slowly the other side drips. Failures are tried again with
growing pauses, then given up; the log in the row says what happened, by code or kind of error only.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx
from sqlalchemy import select, update

import hscr
from service import webhooks
from service.db import Database, now
from service.models import WebhookDelivery
from service.settings import Settings

log = logging.getLogger("hscr.webhooks")
AT_ONCE = 20
GONE = 410  # the receiver wants no more of this


@dataclass(frozen=True)
class Sent:
    """How one attempt went: the answer's status code, or the kind of error."""

    code: int | None
    error: str | None
    ms: int


def start(database: Database, settings: Settings, stop: threading.Event) -> None:
    """Send what is due until `stop`. A daemon thread: a delivery that the end cuts off is sent again later."""
    try:
        webhooks.check_settings(settings)
    except ValueError as error:
        log.error("no webhook is sent: %s", error)  # the jobs go on
        return

    def work() -> None:
        while not stop.wait(settings.sweep_interval_s):
            try:
                deliver_due(database, settings)
            except Exception as error:  # the thread must not end before its process: tried again in the next round
                log.error("webhooks: %s", type(error).__name__)

    threading.Thread(target=work, daemon=True, name="webhooks").start()


def deliver_due(database: Database, settings: Settings) -> int:
    """Send every delivery whose time has come, many at once; how many attempts were made."""
    with database.read() as session:
        due = (WebhookDelivery.status == "pending", WebhookDelivery.next_at <= now())
        query = select(WebhookDelivery.id).where(*due).order_by(WebhookDelivery.next_at).limit(AT_ONCE)
        ids = session.scalars(query).all()
    claimed = [c for delivery_id in ids if (c := _claim(database, settings, delivery_id)) is not None]
    if claimed:
        asyncio.run(_send_all(database, settings, claimed))
    return len(claimed)


def _claim(database: Database, settings: Settings, delivery_id: str) -> WebhookDelivery | None:
    """Ours until well after the attempt must be over; None where somebody else has it."""
    with database.write() as session:
        taken = session.execute(
            update(WebhookDelivery)
            .where(
                WebhookDelivery.id == delivery_id,
                WebhookDelivery.status == "pending",
                WebhookDelivery.next_at <= now(),
            )
            .values(
                tries=WebhookDelivery.tries + 1,
                attempts=WebhookDelivery.attempts + 1,
                next_at=now() + timedelta(seconds=settings.webhook_timeout_s * 2 + 5),
            )
            .returning(WebhookDelivery.id)
        ).one_or_none()
        return session.get(WebhookDelivery, delivery_id, populate_existing=True) if taken else None


async def _send_all(database: Database, settings: Settings, deliveries: list[WebhookDelivery]) -> None:
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client:
        sent = await asyncio.gather(*(_send(client, settings, delivery) for delivery in deliveries))
    for delivery, how in zip(deliveries, sent, strict=True):
        _note(database, settings, delivery, how)


async def _send(client: httpx.AsyncClient, settings: Settings, delivery: WebhookDelivery) -> Sent:
    if not webhooks.is_allowed(delivery.url, settings):
        return Sent(None, "NotAllowed", 0)
    begin, body = time.monotonic(), webhooks.message(delivery)
    headers = webhooks.signed_headers(settings, delivery.id, body, now())
    headers["user-agent"] = f"hscr/{hscr.__version__}"
    code, error = None, None
    try:
        async with (
            asyncio.timeout(settings.webhook_timeout_s),
            client.stream("POST", delivery.url, content=body, headers=headers) as response,
        ):
            code = response.status_code
    except (httpx.HTTPError, TimeoutError) as failure:
        error = type(failure).__name__
    return Sent(code, error, int((time.monotonic() - begin) * 1000))


def _note(database: Database, settings: Settings, delivery: WebhookDelivery, sent: Sent) -> None:
    """Write down how it went, unless the delivery was claimed again meanwhile."""
    done = sent.code is not None and 200 <= sent.code < 300
    pauses = settings.webhook_pauses_s
    over = sent.code == GONE or sent.error == "NotAllowed" or delivery.tries > len(pauses)
    values: dict[str, Any] = {"status": "delivered" if done else "failed" if over else "pending"}
    values |= {"delivered_at": now()} if done else {}
    values["next_at"] = None if done or over else _later(pauses[delivery.tries - 1])
    entry = {"at": now().isoformat(), "code": sent.code, "error": sent.error, "ms": sent.ms}
    values["log"] = [*delivery.log, entry][-50:]
    with database.write() as session:
        mine = (WebhookDelivery.id == delivery.id, WebhookDelivery.attempts == delivery.attempts)
        session.execute(update(WebhookDelivery).where(*mine).values(**values))
    log.info("webhook %s of %s: %s, now %s", delivery.id, delivery.job_id, sent.code or sent.error, values["status"])


def _later(pause_s: float) -> datetime:
    """After the pause, give or take a tenth: many deliveries that failed together shall not come back together."""
    return now() + timedelta(seconds=pause_s * random.uniform(0.9, 1.1))
