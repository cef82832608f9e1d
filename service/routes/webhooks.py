"""The delivery log of a job's webhook."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Path
from pydantic import BaseModel, Field
from sqlalchemy import select

from service import audit, jobs, webhooks
from service.models import WebhookDelivery
from service.pages import AfterDelivery, Limit, Page, page
from service.routes.jobs import JobId
from service.routing import Router
from service.state import Service, Who

router = Router(prefix="/jobs", tags=["webhooks"])
DeliveryId = Annotated[str, Path(max_length=40, examples=["msg_019ab2c4d5e6f708192a3b4c5d6e"])]


class AttemptView(BaseModel):
    at: datetime
    code: int | None = Field(description="The answer's status code.")
    error: str | None = Field(description="The kind of error, where there was no answer.")
    ms: int


class DeliveryView(BaseModel):
    id: str = Field(description="The `webhook-id` header: the same in every attempt.")
    event: str
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    next_at: datetime | None
    delivered_at: datetime | None
    created_at: datetime
    log: list[AttemptView]


@router.get("/{job_id}/webhooks", summary="What the job's webhook was told")
def index(state: Service, job_id: JobId, limit: Limit = 50, after: AfterDelivery = None) -> Page[DeliveryView]:
    """Oldest first, each with its attempts."""
    query = select(WebhookDelivery).where(WebhookDelivery.job_id == job_id).order_by(WebhookDelivery.id)
    query = query.where(WebhookDelivery.id > after) if after else query
    with state.database.read() as session:
        jobs.get(session, job_id)
        rows = session.scalars(query.limit(limit + 1)).all()
    return Page(**page(rows, limit, _view, lambda row: row.id))


@router.post("/{job_id}/webhooks/{delivery_id}/redeliver", status_code=202, summary="Send it again")
def redeliver(state: Service, who: Who, job_id: JobId, delivery_id: DeliveryId) -> DeliveryView:
    """At once, and again with pauses until it is taken or given up."""
    with state.database.write() as session:
        delivery = webhooks.redeliver(session, job_id, delivery_id)
        audit.record(session, who.id, "webhook.redeliver", job_id, delivery=delivery_id)
        return _view(delivery)


def _view(row: WebhookDelivery) -> DeliveryView:
    return DeliveryView.model_validate(row, from_attributes=True)
