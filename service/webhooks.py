"""Webhooks: which addresses may be called, what is said, how it is signed (Standard Webhooks), and the deliveries that wait.

A delivery is a row written in the transaction of the job's transition: it is sent if and only if that happened, at least once, perhaps
twice (`webhook-id` tells). It says which job came to which status and nothing else. Nothing is called that an operator did not allow by
name. The sending is worker/webhooks.py. No web framework here.
"""

from __future__ import annotations

import json
from base64 import b64decode
from datetime import UTC, datetime

import httpx
from sqlalchemy.orm import Session
from standardwebhooks.webhooks import Webhook

from service.db import now
from service.errors import Problem
from service.models import WebhookDelivery, new_id
from service.settings import Settings

TOLD = ("awaiting_review", "succeeded", "failed", "cancelled")  # the statuses that somebody waits for
URL_MAX = 2000
_PORTS = {"http": 80, "https": 443}


def check_settings(settings: Settings) -> None:
    """Refuse to start with hosts but without a secret, or with entries that name no origin. Raises ValueError."""
    for entry in settings.webhook_hosts:
        if _origin(entry) is None:
            raise ValueError(f"HSCR_WEBHOOK_HOSTS: {entry!r} is no origin; write https://host or http://host:port")
    if settings.webhook_hosts and not secrets(settings):
        raise ValueError(
            "HSCR_WEBHOOK_SECRET is not set; webhooks are signed with it: whsec_$(openssl rand -base64 32)"
        )
    if not all(_is_secret(secret) for secret in secrets(settings)):
        raise ValueError("HSCR_WEBHOOK_SECRET: write whsec_ and 24 to 64 bytes in base64; several with spaces between")


def secrets(settings: Settings) -> list[str]:
    """The signing secrets; several while they are being changed, each signs."""
    return settings.webhook_secret.get_secret_value().split() if settings.webhook_secret else []


def _is_secret(text: str) -> bool:
    try:
        return text.startswith("whsec_") and 24 <= len(b64decode(text.removeprefix("whsec_"), validate=True)) <= 64
    except ValueError:
        return False


def check_url(url: str, settings: Settings) -> None:
    """Refuse an address whose scheme, host and port no operator allowed. Raises Problem."""
    if not is_allowed(url, settings):
        raise Problem(
            "webhook_not_allowed", "Ask the operator to add the address's https://host to HSCR_WEBHOOK_HOSTS."
        )


def is_allowed(url: str, settings: Settings) -> bool:
    origin = _origin(url)
    return origin is not None and origin in {_origin(entry) for entry in settings.webhook_hosts}


def _origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port as the client that will call it reads them; None for what no plain address has."""
    if len(url) > URL_MAX or "\\" in url or any(ord(c) <= 32 or ord(c) >= 127 for c in url):
        return None
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return None
    if parsed.scheme not in _PORTS or not parsed.host or parsed.userinfo or parsed.fragment:
        return None
    return parsed.scheme, parsed.host, parsed.port or _PORTS[parsed.scheme]


def enqueue(session: Session, job_id: str, seq: int, url: str, status: str) -> None:
    """A delivery of this transition, due at once; in the transition's transaction."""
    session.add(
        WebhookDelivery(
            id=new_id("msg"),
            job_id=job_id,
            seq=seq,
            event=f"job.{status}",
            url=url,
            status="pending",
            next_at=now(),
        )
    )


def message(delivery: WebhookDelivery) -> str:
    """What is sent: the same bytes in every attempt."""
    data = {"job_id": delivery.job_id, "status": delivery.event.removeprefix("job."), "seq": delivery.seq}
    body = {"type": delivery.event, "timestamp": delivery.created_at.astimezone(UTC).isoformat(), "data": data}
    return json.dumps(body, separators=(",", ":"))


def signed_headers(settings: Settings, message_id: str, body: str, at: datetime) -> dict[str, str]:
    """The headers of the Standard Webhooks specification; `at` is aware and in UTC."""
    signatures = [Webhook(secret).sign(message_id, at, body) for secret in secrets(settings)]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
        "content-type": "application/json",
    }


def redeliver(session: Session, job_id: str, delivery_id: str) -> WebhookDelivery:
    """Send a delivery again, from the first attempt on; its log stays. Raises Problem."""
    delivery = session.get(WebhookDelivery, delivery_id, with_for_update=True)
    if delivery is None or delivery.job_id != job_id:
        raise Problem("delivery_not_found", "The job has no such delivery; GET /jobs/{id}/webhooks lists them.")
    delivery.status, delivery.tries, delivery.next_at = "pending", 0, now()
    return delivery
