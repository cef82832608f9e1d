"""Who may call, and what: an API key with scopes guards every route but the health checks and the documentation.

Keys are HSCR_API_KEY (every scope) and those of service/keys.py. Where no key exists at all the service answers on loopback only, and there
it checks Host and Origin, for a web page may point its own name at 127.0.0.1 (DNS rebinding). /metrics is open where the service is bound
to loopback, the documentation unless HSCR_OPEN_DOCS forbids it: a browser sends no key before the page that asks for one is there. A route
that no rule names needs the scope `admin`.
"""

from __future__ import annotations

import hmac
import logging
import time
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import DBAPIError
from starlette.types import ASGIApp, Receive, Scope, Send

from service import keys
from service.db import Database, now
from service.errors import Problem
from service.keys import ANYBODY, ENV, SCOPES, Caller
from service.models import ApiKey
from service.problems import answer
from service.settings import Settings, is_loopback

log = logging.getLogger("hscr.auth")
OPEN = ("/healthz", "/readyz")
DOCS, DOCS_ASSETS = ("/docs", "/openapi.json"), "/docs/assets/"  # nothing in them depends on what is stored here
# For the OpenAPI document.
SECURITY = {"key": {"type": "http", "scheme": "bearer", "description": "One of `hscr keys create`, or HSCR_API_KEY."}}
READ = ("GET", "HEAD")
REMEMBER_S, REMEMBER_MAX = 1.0, 1000  # a key that was looked up is known for so long, and so many are
# By the first part or the first two parts of the path: the scopes that may read, and those that may change. `admin` may do everything.
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vqa": (("vqa",), ("vqa",)),
    "datasets": (("align",), ("align",)),
    "align": (("align",), ("align",)),
    "evaluate": (("align",), ("align",)),
    "jobs": (("align",), ("align",)),
    "adapters": (("vqa", "align"), ("align",)),
    "lineage": (("vqa", "align"), ()),
    "v1/chat": (("vqa",), ("vqa",)),
    "v1/models": (("vqa", "align"), ()),
    "v1/files": (("align",), ("align",)),
    "v1/fine_tuning": (("align",), ("align",)),
    "metrics": (SCOPES, ()),
    "docs": (SCOPES, ()),
    "openapi.json": (SCOPES, ()),
}
NO_KEY = (
    "HSCR_API_KEY is not set, and the service would listen on {host}, which others can reach. "
    "Set HSCR_API_KEY to a long random text, or listen on 127.0.0.1."
)


def check_settings(settings: Settings) -> None:
    """Refuse to start open to others. Raises ValueError."""
    if not settings.on_loopback and not _key(settings):
        raise ValueError(NO_KEY.format(host=settings.host))


def describe(document: dict[str, Any]) -> None:
    """Say in an OpenAPI document which operations take a key: all but the probes. It may be said again."""
    document["components"]["securitySchemes"] = SECURITY
    for path, operations in document["paths"].items():
        if path not in OPEN:
            for operation in operations.values():
                operation["security"] = [{name: [] for name in SECURITY}]


class Auth:
    """Puts the Caller into the request's state, or answers in the application's place."""

    def __init__(self, app: ASGIApp, settings: Settings, database: Database) -> None:
        self.app, self._database = app, database
        key = _key(settings)
        self._seen: dict[bytes, tuple[Caller, float, int]] = {}
        self._no_key = (0.0, -1)  # until when no key is known to exist, and the count of changes that it goes with
        self._digest = sha256(key.encode()).digest() if key else None
        self._open = frozenset(OPEN)
        self._open |= {"/metrics"} if settings.on_loopback else set()
        self._open |= set(DOCS) if settings.open_docs else set()
        self._open_assets = settings.open_docs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            caller = await self._caller(scope)
            if not self._is_open(scope["path"]) and not caller.may(allowed := _allowed(scope)):
                detail = (
                    f"This needs a key with the scope {' or '.join(allowed) or 'admin'}; hscr keys create makes one."
                )
                raise Problem("scope_missing", detail)
            scope["state"]["caller"] = caller
        except Problem as refusal:
            await answer(refusal, scope)(scope, receive, send)
        except DBAPIError:
            away = Problem("database_unavailable", "Try again in a few seconds.", headers={"Retry-After": "5"})
            await answer(away, scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Caller:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if self._digest is not None and self._is_open(scope["path"]):
            return ANYBODY
        if self._digest is not None and hmac.compare_digest(sha256(given.encode()).digest(), self._digest):
            return ENV
        if given.startswith(keys.PREFIX):
            caller = self._remembered(given) or await run_in_threadpool(self._look_up, given)
            if caller is not None:
                return caller
        if self._digest is not None:
            raise _unauthorized()
        if problem := _stranger(scope, headers):
            raise problem
        until, changes = self._no_key
        if self._is_open(scope["path"]) or (time.monotonic() < until and changes == keys.changes()):
            return ANYBODY
        if await run_in_threadpool(self._keys_are_asked_for):
            raise _unauthorized()
        return ANYBODY

    def _is_open(self, path: str) -> bool:
        return path in self._open or (self._open_assets and path.startswith(DOCS_ASSETS))

    def _remembered(self, secret: str) -> Caller | None:
        """Whose secret this was a moment ago: forgotten at once where this process changes a key, within REMEMBER_S where another does."""
        caller, until, changes = self._seen.get(sha256(secret.encode()).digest(), (None, 0.0, 0))
        return caller if time.monotonic() < until and changes == keys.changes() else None

    def _look_up(self, secret: str) -> Caller | None:
        changes = keys.changes()
        with self._database.read() as session:
            key = keys.find(session, secret)
        if key is None:
            return None
        if len(self._seen) >= REMEMBER_MAX:
            self._seen.clear()
        caller = Caller(key.id, frozenset(key.scopes))
        self._seen[sha256(secret.encode()).digest()] = (caller, time.monotonic() + _left(key), changes)
        try:
            keys.touch(self._database, key)
        except DBAPIError as error:  # when it was last used is not worth a refusal
            log.warning("the use of a key was not noted: %s", type(error).__name__)
        return caller

    def _keys_are_asked_for(self) -> bool:
        """That none exists is remembered as keys are: the first is noticed at once, within REMEMBER_S where another process makes it."""
        changes = keys.changes()
        with self._database.read() as session:
            asked_for = keys.any_at_all(session)
        self._no_key = (0.0 if asked_for else time.monotonic() + REMEMBER_S, changes)
        return asked_for


def _left(key: ApiKey) -> float:
    """How long a key may be remembered: never past an end of its own."""
    instant = now()
    ends = [end for end in (key.expires_at, key.previous_until) if end is not None and end > instant]
    return min([REMEMBER_S, *((end - instant).total_seconds() for end in ends)])


def _allowed(scope: Scope) -> tuple[str, ...]:
    first, _, rest = scope["path"].removeprefix("/").partition("/")
    both = f"{first}/{rest.partition('/')[0]}"
    read, change = RULES.get(both) or RULES.get(first) or ((), ())
    return read if scope["method"] in READ else change


def _unauthorized() -> Problem:
    detail = "Send the header Authorization: Bearer <key>; the key is one of `hscr keys create`, or the service's HSCR_API_KEY."
    return Problem("unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})


def _stranger(scope: Scope, headers: dict[bytes, str]) -> Problem | None:
    """Without a key: only this machine, by a name of this machine, from no foreign web page."""
    server = scope.get("server")
    if server and server[1] is not None and not is_loopback(server[0]):
        return Problem("key_required", "Without HSCR_API_KEY the service answers on 127.0.0.1 only.")
    if not _names_loopback(f"//{headers.get(b'host', '')}"):
        return Problem("host_not_allowed", "Without HSCR_API_KEY the service answers to 127.0.0.1 and localhost only.")
    origin = headers.get(b"origin")
    if origin is not None and not _names_loopback(origin):
        return Problem("origin_not_allowed", "Without HSCR_API_KEY only pages of this machine may call the service.")
    return None


def _names_loopback(address: str) -> bool:
    try:
        return is_loopback(urlsplit(address).hostname or "")
    except ValueError:
        return False


def _key(settings: Settings) -> str:
    return settings.api_key.get_secret_value().strip() if settings.api_key else ""
