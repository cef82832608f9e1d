"""Liveness, readiness and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from service.models import Job
from service.routing import Router
from service.state import Service, State

router = Router(tags=["health"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Can it take requests?")
def readyz(state: Service) -> JSONResponse:
    """200 when the database answers and the model (if this replica has one) is loaded; else 503 and what is missing.

    `engine: failed` comes with `engine_failure`: why the model could not be loaded.
    """
    checks: dict[str, Any] = {
        "database": _database(state),
        "engine": state.answering.status if state.answering else "none",
        "draining": state.draining.is_set(),
    }
    if state.answering is not None and (failure := state.answering.failure(state.settings)) is not None:
        checks["engine_failure"] = failure
    # A replica whose engine is away while a job has its device shows that job, and stays in service.
    ready = checks["database"] == "ok" and checks["engine"] in ("ok", "none", "yielded") and not checks["draining"]
    return JSONResponse({"status": "ready" if ready else "not ready", **checks}, 200 if ready else 503)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(state: Service) -> Response:
    return Response(state.metrics.scrape(state.database), media_type=CONTENT_TYPE_LATEST)


def _database(state: State) -> str:
    try:
        with state.database.read() as session:
            session.execute(select(Job.id).limit(1))
    except DBAPIError:
        return "unavailable"
    return "ok"
