"""The routes of the application in one flat list, each of which knows by a path's fixed beginning whether it can be meant.

FastAPI's own `include_router` wraps a router, and every request asks every route of every wrapper in turn, and those of the one that is
meant twice: with sixty routes half a millisecond of the event loop, more than the rest of what it did for a small read (decision 0097).
A handler that needs nothing of FastAPI's can be called directly (decision 0104).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette._utils import get_route_path
from starlette.routing import Match
from starlette.types import Scope

from service.problems import RESPONSES

_DIRECT = "hscr_direct"
Handler = TypeVar("Handler", bound=Callable[[Any, Request], Awaitable[Response]])


def direct(handler: Handler) -> Handler:
    """Call it with the application's state and the request, and send what it returns: no dependencies, no look through the response.

    Both take FastAPI a quarter of a millisecond where a request has time to miss it. What the route says of itself stays.
    """
    setattr(handler, _DIRECT, True)
    return handler


def json_response(content: BaseModel) -> Response:
    """As FastAPI writes what a handler returns."""
    return Response(content.model_dump_json(by_alias=True), media_type="application/json")


class _Route(APIRoute):
    def __init__(self, path: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(path, *args, **kwargs)
        self._begins = path.partition("{")[0]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = self.endpoint
        if not getattr(handler, _DIRECT, False):
            return super().get_route_handler()

        async def called(request: Request) -> Response:
            response: Response = await handler(request.app.state.hscr, request)
            return response

        return called

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if not get_route_path(scope).startswith(self._begins):
            return Match.NONE, {}
        return super().matches(scope)


class Router(APIRouter):
    """A router of one module. Every error of its routes is described as a problem, unless `responses` says otherwise."""

    def __init__(self, *, responses: dict[int | str, dict[str, Any]] | None = None, **values: Any) -> None:
        super().__init__(responses=RESPONSES | (responses or {}), route_class=_Route, **values)


def include(app: FastAPI, routers: Iterable[Router]) -> None:
    """Serve these routers' routes, in this order. What the application itself would add to each route it does not get."""
    app.router.routes.extend(route for router in routers for route in router.routes)
