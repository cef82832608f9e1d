"""Who may call: one key from the environment guards every route but the health checks.

Without a key the service answers on loopback only, and there it checks Host and Origin, for a web page may point its own name at 127.0.0.1
(DNS rebinding). /metrics is open where the service is bound to loopback.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Problem
from service.problems import problem_response
from service.settings import Settings, is_loopback

OPEN = ("/healthz", "/readyz")
NO_KEY = (
    "HSCR_API_KEY is not set, and the service would listen on {host}, which others can reach. "
    "Set HSCR_API_KEY to a long random text, or listen on 127.0.0.1."
)


def check_settings(settings: Settings) -> None:
    """Refuse to start open to others. Raises ValueError."""
    if not settings.on_loopback and not _key(settings):
        raise ValueError(NO_KEY.format(host=settings.host))


class Auth:
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        key = _key(settings)
        self._digest = sha256(key.encode()).digest() if key else None
        self._open = (*OPEN, "/metrics") if settings.on_loopback else OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._refusal(scope) if scope["type"] == "http" else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await problem_response(problem, scope["state"]["request_id"])(scope, receive, send)

    def _refusal(self, scope: Scope) -> Problem | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._digest is None:
            return _stranger(scope, headers)
        if scope["path"] in self._open:
            return None
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(sha256(given.strip().encode()).digest(), self._digest):
            return None
        detail = "Send the header Authorization: Bearer <key>; the key is the service's HSCR_API_KEY."
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
