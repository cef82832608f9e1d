"""The broker's transport with one habit changed: what lies in the queue and is no message is dropped, not raised.

kombu's Redis transport parses inside its event loop; raw bytes that somebody put there ended the Celery worker. Bells may be lost, so
nothing is lost with them. A dropped message is logged without its content.
"""

from __future__ import annotations

import logging
from typing import Any

from kombu.transport import redis

log = logging.getLogger("hscr.queue")


def _is_message(message: Any) -> bool:
    """Whether kombu can take it apart without raising: a dict with the properties that it reads before any callback."""
    if not isinstance(message, dict):
        return False
    properties = message.get("properties")
    return (
        isinstance(properties, dict)
        and isinstance(properties.get("delivery_tag"), str)
        and isinstance(properties.get("delivery_info"), dict)
        and isinstance(message.get("headers", {}), dict)
        and isinstance(message.get("body"), str)
        and properties.get("body_encoding") in (None, "base64")
    )


class _DropsWhatIsNoMessage:
    """A channel's reading, for both kinds of channel."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except (ValueError, RecursionError):  # JSON's and UTF-8's errors are ValueErrors
            log.warning("a message that is not JSON was dropped")
            return True


class _DeliversMessagesOnly:
    def _deliver(self, message: Any, queue: str) -> None:
        if _is_message(message):
            super()._deliver(message, queue)  # type: ignore[misc]
        else:
            log.warning("a message of an unknown form was dropped")


class Channel(_DropsWhatIsNoMessage, redis.Channel):
    pass


class SentinelChannel(_DropsWhatIsNoMessage, redis.SentinelChannel):
    pass


class Transport(_DeliversMessagesOnly, redis.Transport):
    Channel = Channel


class SentinelTransport(_DeliversMessagesOnly, redis.SentinelTransport):
    Channel = SentinelChannel
