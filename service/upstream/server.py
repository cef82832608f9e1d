"""HTTP to the model server: what is sent and read, bounded in time and bytes; every failure becomes a Problem of ours, never its text.

Knows OpenAI's wire format and vLLM's additions, no adapters and no grounding. Proxies of the environment are not used: questions are
health data, and the address is the operator's own.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.errors import Problem
from service.settings import Settings

log = logging.getLogger("hscr.upstream")
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log an address a request
EVENT_MAX_BYTES, BODY_MAX_BYTES = 2**20, 64 * 2**20
CONNECT_S, CHECK_S = 5.0, 10.0
RETRY = {"Retry-After": "5"}


class NotServed(Exception):
    """The server knows no model of this name (any more)."""


def check_settings(settings: Settings) -> None:
    """Refuse to start without a usable address. Raises ValueError."""
    if settings.engine != "openai":
        return
    try:
        address = urlsplit(settings.upstream_url)
        usable = address.scheme in ("http", "https") and address.hostname and not (address.username or address.query)
        _ = address.port  # raises for one that is none
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(
            "HSCR_ENGINE=openai needs HSCR_UPSTREAM_URL, the model server's address: http://HOST:PORT "
            "(a key goes into HSCR_UPSTREAM_KEY)."
        )


class ModelServer:
    """One server with one base model. Use as `async with`; its methods raise Problem, and NotServed where they say so."""

    def __init__(self, settings: Settings) -> None:
        key = settings.upstream_key.get_secret_value() if settings.upstream_key else ""
        self.model = settings.upstream_model or settings.model or settings.model_id
        self.vllm = False  # it understands vLLM's own fields; known after `look`
        self.timeout_s = settings.upstream_timeout_s
        self._client = httpx.AsyncClient(
            base_url=settings.upstream_url.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self.timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.upstream_concurrency),
            trust_env=False,
            follow_redirects=False,
        )

    async def __aenter__(self) -> ModelServer:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._client.aclose()

    async def look(self) -> str | None:
        """What is wrong with the server in fixed words; None where it serves the model."""
        try:
            cards = await self.models()
        except Problem as problem:
            return problem.detail
        if self.model not in cards:
            return "it does not serve the model of HSCR_UPSTREAM_MODEL"
        self.vllm = cards[self.model] == "vllm"
        return None

    async def models(self) -> dict[str, Any]:
        """Who owns each model that it lists, adapters among them."""
        answer = await self._json("GET", "/v1/models", None, CHECK_S)
        return {str(card["id"]): card.get("owned_by") for card in _list(answer, "data")}

    async def once(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion at once. Raises NotServed."""
        return await self._json("POST", "/v1/chat/completions", body, self.timeout_s)

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a completion. Raises NotServed."""
        buffer, n_bytes = b"", 0
        async with self._sent("POST", "/v1/chat/completions", body, self.timeout_s) as response:
            async for block in response.aiter_bytes():
                n_bytes += len(block)
                *lines, buffer = (buffer + block).split(b"\n")
                if len(buffer) > EVENT_MAX_BYTES or n_bytes > BODY_MAX_BYTES:
                    raise garbage()
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    yield _object(data)

    async def load_adapter(self, name: str, path: str) -> bool:
        """Whether the server has the adapter after it was told to load it from `path`, a folder of its own machine."""
        try:
            async with self._sent(
                "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, 60
            ) as answer:
                await _read(answer)
            return True
        except (NotServed, Problem) as refusal:
            if isinstance(refusal, Problem) and refusal.code == "upstream_unavailable":
                raise
        return name in await self.models()  # another replica was first: vLLM refuses a name that it has

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; that it is not there is as good."""
        try:
            async with self._sent("POST", "/v1/unload_lora_adapter", {"lora_name": name}, CHECK_S) as answer:
                await _read(answer)
        except (NotServed, Problem) as refusal:
            log.warning("an adapter was not unloaded: %s", type(refusal).__name__)

    async def _json(self, method: str, path: str, body: dict[str, Any] | None, limit_s: float) -> dict[str, Any]:
        async with self._sent(method, path, body, limit_s) as response:
            return _object(await _read(response))

    @asynccontextmanager
    async def _sent(
        self, method: str, path: str, body: dict[str, Any] | None, limit_s: float
    ) -> AsyncIterator[httpx.Response]:
        """A response of status 200 within the limit, which holds for its body too."""
        try:
            async with asyncio.timeout(limit_s), self._client.stream(method, path, json=body) as response:
                if response.status_code != 200:
                    raise _refused(response)
                yield response
        except (TimeoutError, httpx.TimeoutException):
            raise unavailable("The model server did not answer in time; ask again.") from None
        except httpx.HTTPError as error:
            log.warning("the model server: %s", type(error).__name__)
            raise unavailable("The model server cannot be reached; ask again in a few seconds.") from None


def unavailable(detail: str, headers: dict[str, str] = RETRY) -> Problem:
    return Problem("upstream_unavailable", detail, headers=headers)


def garbage() -> Problem:
    log.warning("the model server: an answer that is none")
    return Problem("answer_failed", "The model server's answer cannot be read.")


def _refused(response: httpx.Response) -> Problem | NotServed:
    """What a status means for the caller. What the server says of it may hold the question, and goes nowhere."""
    status = response.status_code
    log.warning("the model server: status %s", status)
    if status == 404:
        return NotServed()
    if status in (400, 413, 422):
        return Problem(
            "question_refused", "The model server refuses it: ask shorter, or about fewer or smaller images."
        )
    if status == 429 or status == 503:
        given = response.headers.get("retry-after", "")
        wait = str(min(int(given), 60)) if given.isdigit() and len(given) < 6 and int(given) else "5"
        return Problem("overloaded", "The model server is busy; ask again later.", headers={"Retry-After": wait})
    if status in (401, 403):
        return unavailable("The model server refuses this service's key (HSCR_UPSTREAM_KEY).")
    if status in (500, 501):
        return Problem("answer_failed", "The model server failed on this request.")
    return unavailable("The model server cannot answer now; ask again in a few seconds.")


async def _read(response: httpx.Response) -> bytes:
    parts, left = [], BODY_MAX_BYTES
    async for block in response.aiter_bytes():
        parts.append(block)
        left -= len(block)
        if left < 0:
            raise garbage()
    return b"".join(parts)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise garbage() from None
    if not isinstance(value, dict) or value.get("error"):
        raise garbage()
    return value


def _list(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    items = value.get(name)
    if not isinstance(items, list) or not all(isinstance(i, dict) and "id" in i for i in items):
        raise garbage()
    return items
