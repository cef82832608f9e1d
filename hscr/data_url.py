"""Data URLs in base64 (RFC 2397): bytes where an address could stand. Nothing that is named by an address is ever fetched."""

from __future__ import annotations

from typing import Any

import pybase64


def is_data_url(value: Any) -> bool:
    """Whether a value is text that begins as a data URL does."""
    return isinstance(value, str) and value[:5].lower() == "data:"


def data_of(url: str) -> bytes:
    """The bytes of a data URL; its media type is not believed. Raises ValueError, which says what is wrong and nothing of what was sent."""
    head, comma, data = url.partition(",")
    if not is_data_url(url) or not comma:
        raise ValueError("no address is fetched here; send the bytes as data:image/png;base64,…")
    if not head.lower().rstrip().endswith(";base64"):
        raise ValueError("a data URL must be in base64: data:image/png;base64,…")
    try:
        return pybase64.b64decode(data, validate=True)
    except ValueError:  # characters that are not ASCII, too
        raise ValueError("the base64 of the data URL is damaged") from None
