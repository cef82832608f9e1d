"""The FastAPI application: routes, errors, documentation pages that need no internet, and what lives as long as the process.

`uvicorn service.app:create_app --factory` serves it; service/serve.py adds the orderly end.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files as package_files
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

import hscr
from service import logs, problems, tracing
from service.answering import answering
from service.artifact_store import open_store
from service.auth import Auth, check_settings, describe
from service.datasets import clear_leftovers
from service.db import Database
from service.decoding import decoders
from service.edge import Edge
from service.engine import LocalEngine
from service.feed import Feed
from service.metrics import Metrics
from service.routes import (
    adapters,
    aliases,
    align,
    chat,
    datasets,
    evaluate,
    files,
    fine_tuning,
    gates,
    health,
    job_requests,
    jobs,
    keys,
    lineage,
    metrics,
    models,
    preferences,
    vqa,
    webhooks,
)
from service.routing import include
from service.settings import Settings
from service.state import State
from service.upstream.server import check_settings as check_upstream
from service.webhooks import check_settings as check_webhooks

DESCRIPTION = """
Align a medical vision-language model on your own data and ask it, on your own machines.

1. `POST /datasets` a zip of `records.jsonl` and its images.
2. `POST /align` starts a job; follow it on `/jobs/{id}/events`.
3. `POST /evaluate` measures a version on another data set, as a job.
4. `POST /vqa` asks the base model or an adapter version, and says how far the image carries the answer.
"""


class App(FastAPI):
    """With the keys in its document: they are checked before any route (service/auth.py), where FastAPI does not see them."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        describe(document)
        return document


def create_app(settings: Settings | None = None, engine: LocalEngine | None = None) -> FastAPI:
    """The application. Raises ValueError where it would be open to others. `engine` is for tests."""
    settings = settings or Settings()
    check_settings(settings)
    check_webhooks(settings)
    check_upstream(settings)
    counters = Metrics()
    database = Database(settings.database)
    state = State(
        settings,
        database,
        counters,
        answering(settings, database, counters, engine),
        open_store(settings),
        Feed(database, jobs.event_json),
    )
    app = App(
        title="HSCR",
        version=hscr.__version__,
        description=DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
        },  # service/tracing.py and service/metrics.py say what may be said
    )
    app.state.hscr = state
    problems.install(app)
    modules = (  # routes are tried in this order: first those whose callers wait for a model
        vqa,
        chat,
        datasets,
        align,
        evaluate,
        jobs,
        job_requests,
        metrics,
        preferences,
        webhooks,
        adapters,
        aliases,
        gates,
        lineage,
        models,
        files,
        fine_tuning,
        keys,
        health,
    )
    include(app, (module.router for module in modules))
    _documentation(app)
    app.add_middleware(Auth, settings=settings, database=state.database)
    app.add_middleware(Edge, settings=settings, metrics=counters)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: State = app.state.hscr
    settings = state.settings
    logs.configure("api", settings.log)
    if settings.api_key is None:
        logging.getLogger("hscr").warning(
            "no HSCR_API_KEY: until a key is made, open to everybody on this machine, and to nobody else"
        )
    tracing.start("api", settings.trace)
    state.metrics.watch_decoders(decoders(settings).stats)
    await run_in_threadpool(clear_leftovers, settings.data_dir)
    if state.answering is not None:
        await run_in_threadpool(decoders(settings).warm)
        state.answering.start()
    yield
    state.draining.set()
    if state.answering is not None:
        await run_in_threadpool(state.answering.close)
    state.database.close()
    await run_in_threadpool(tracing.stop)


def _documentation(app: FastAPI) -> None:
    """Swagger UI from a Python package's files: a hospital's network has no CDN."""
    app.mount(
        "/docs/assets", StaticFiles(directory=str(package_files("fastapi_offline") / "static")), name="docs-assets"
    )

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="HSCR API",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon.png",
        )
