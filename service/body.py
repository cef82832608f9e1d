"""What is read of a request's body, whatever the route: bytes, values, parts and time. Plain ASGI.

Bytes alone do not bound memory: 30 MiB of `[],[],[]…` took 2.8 GB and a minute of the event loop to read, and a thousand form fields of a
mebibyte each a gigabyte (both measured), so a body that is no upload may hold so many values and an upload so many parts. A body that
comes too slowly is given up.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.types import Message, Receive

from service.errors import Problem

VALUES_MAX = 100_000  # of JSON: each begins with one of the bytes below, or follows one
PARTS_MAX = 64  # of a form: a question has at most 16 images and as many fields
_STRUCTURE = b"[{,&"
_FEW = 64  # of them in a chunk, which are found one by one
_CLOSE = {"Connection": "close"}  # the rest of the body is not read


@dataclass(frozen=True)
class BodyLimits:
    """`pause_s`: without a byte; `seconds`: for the whole body, None where it may be large."""

    bytes: int
    pause_s: float
    seconds: float | None
    setting: str  # which bounds the bytes: an operator may raise it


class BodyRefused(Exception):
    """The body is not read on; `problem` is the answer."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.code)
        self.problem = problem


class Body:
    """A request's `receive` under limits. Raises BodyRefused."""

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], limits: BodyLimits) -> None:
        self._receive, self._limits = receive, limits
        self._left, self._values, self._parts = limits.bytes, VALUES_MAX, PARTS_MAX
        self._begun = time.monotonic()
        self._whole = False
        self.refused: Problem | None = None
        self._declared = headers.get(b"content-length", b"0")
        self._delimiter, self._odd_charset = _form(headers.get(b"content-type", b""))
        self._tail = b""

    def check_headers(self) -> None:
        """Refuse by what the headers say."""
        if self._declared.isdigit() and int(self._declared[:20]) > self._limits.bytes:
            self._refuse(
                "body_too_large", f"At most {self._limits.bytes} bytes are read here ({self._limits.setting})."
            )
        if self._odd_charset:  # some of Python's codecs raise what no parser expects
            self._refuse("unsupported_media_type", "Forms are read as UTF-8; leave the charset out.")

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()  # waits for the client to leave
        try:
            async with asyncio.timeout(self._pause()):
                message = await self._receive()
        except TimeoutError:
            self._refuse("body_too_slow", "Send the body without long pauses.")
        if message["type"] == "http.request":
            self._whole = not message.get("more_body", False)
            self._count(message.get("body", b""))
        return message

    def _pause(self) -> float:
        if self._limits.seconds is None:
            return self._limits.pause_s
        left = self._begun + self._limits.seconds - time.monotonic()
        return max(0.0, min(self._limits.pause_s, left))

    def _count(self, chunk: bytes) -> None:
        self._left -= len(chunk)
        if self._left < 0:
            self._refuse(
                "body_too_large", f"At most {self._limits.bytes} bytes are read here ({self._limits.setting})."
            )
        if self._delimiter is None:
            self._values -= _values(chunk)
            if self._values < 0:
                self._refuse("body_too_large", f"At most {VALUES_MAX} values are read here.")
            return
        seen = self._tail + chunk
        self._parts -= seen.count(self._delimiter)
        if self._parts < 0:
            self._refuse("body_too_large", f"A form may have at most {PARTS_MAX} parts.")
        # Shorter than a delimiter, so that none is counted twice.
        self._tail = seen[-(len(self._delimiter) - 1) :]

    def _refuse(self, code: str, detail: str) -> None:
        self.refused = Problem(code, detail, headers=_CLOSE)
        raise BodyRefused(self.refused)


def _values(chunk: bytes) -> int:
    """How many bytes of structure there are. An image in base64 has none, and passing over it is ten times faster than counting in it."""
    n = 0
    for mark in _STRUCTURE:
        at = chunk.find(mark)
        while at >= 0:
            n += 1
            if n > _FEW:
                return len(chunk) - len(chunk.translate(None, _STRUCTURE))
            at = chunk.find(mark, at + 1)
    return n


def _form(content_type: bytes) -> tuple[bytes | None, bool]:
    """The delimiter of a multipart body (None: it is none), and whether it names a charset other than UTF-8."""
    kind, options = parse_options_header(content_type)
    if kind.lower() != b"multipart/form-data":
        return None, False
    charset = options.get(b"charset", b"utf-8").lower()
    return b"--" + options.get(b"boundary", b""), charset not in (b"utf-8", b"utf8", b"us-ascii")
