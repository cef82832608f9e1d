"""OpenTelemetry traces, off unless OTEL_EXPORTER_OTLP_ENDPOINT (or HSCR_TRACE=on) asks for them and `hscr[trace]` is installed.

Spans carry ids, digests, fixed words and numbers: what else is given as a value is left out, of an exception only the type is kept, and of
what a caller sends only `traceparent`, which is hexadecimal (`tracestate` is free text). No web framework here: the worker uses this.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("hscr.trace")
Value = str | int | float | bool | None
_WORD = re.compile(r"[A-Za-z0-9_.:/{}\-]{1,80}")
_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_EXPORT_WITHIN_S = 3.0
_tracer: Any = None
_provider: Any = None


def wanted(setting: str) -> bool:
    """`on`, `off`, or `auto`: where an endpoint of OTLP is named."""
    named = any(os.environ.get(f"OTEL_EXPORTER_OTLP{part}_ENDPOINT") for part in ("", "_TRACES"))
    return setting == "on" or (setting == "auto" and named)


def start(process: str, setting: str = "auto", *, threads: bool = True) -> bool:
    """Begin to trace where that is wanted and can be; whether it did. `threads=False`: export only in `flush`, from the caller's thread."""
    if not wanted(setting) or _tracer is not None:
        return _tracer is not None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("traces are asked for and cannot be made: pip install 'hscr[trace]'")
        return False
    exporter = OTLPSpanExporter(timeout=_EXPORT_WITHIN_S)
    use(process, BatchSpanProcessor(exporter) if threads else _kept_until_flush(exporter))
    return True


def use(process: str, processor: Any) -> None:
    """Trace into a span processor."""
    global _tracer, _provider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    import hscr

    name = {"service.name": f"hscr-{process}", "service.version": hscr.__version__}
    _provider = TracerProvider(resource=Resource(name), shutdown_on_exit=False)  # of host and user nothing is said
    _provider.add_span_processor(processor)
    _tracer = _provider.get_tracer("hscr")


def stop() -> None:
    """Export what is left and trace no more."""
    global _tracer, _provider
    if _provider is not None:
        _provider.shutdown()
    _tracer = _provider = None


def flush() -> None:
    if _provider is not None:
        _provider.force_flush(int(_EXPORT_WITHIN_S * 1000))


class Span:
    """A span that is open; `set` adds values to it. Where nothing is traced it does nothing."""

    def __init__(self, inner: Any = None) -> None:
        self._inner = inner

    def set(self, **values: Value) -> None:
        if self._inner is not None:
            for name, value in values.items():
                if value is not None:
                    self._inner.set_attribute(f"hscr.{name}", _plain(value))

    def failed(self, kind: str) -> None:
        if self._inner is not None:
            from opentelemetry.trace import StatusCode

            self._inner.set_status(StatusCode.ERROR)
            self.set(error=kind)


@contextmanager
def span(name: str, caller: Mapping[bytes, bytes] | None = None, **values: Value) -> Iterator[Span]:
    """A span around a block, below the one around it, or below the caller's `traceparent` where its headers are given."""
    if _tracer is None:
        yield Span()
        return
    with _tracer.start_as_current_span(
        name, context=_above(caller), record_exception=False, set_status_on_exception=False
    ) as inner:
        opened = Span(inner)
        opened.set(**values)
        try:
            yield opened
        except BaseException as error:
            opened.failed(type(error).__name__)
            raise


def past(name: str, begun: float, ended: float, **values: Value) -> None:
    """A span of what is over, below the one around the caller; times are of time.monotonic or time.perf_counter's clock."""
    if _tracer is None:
        return
    offset = time.time() - time.perf_counter()
    inner = _tracer.start_span(name, start_time=int((begun + offset) * 1e9))
    Span(inner).set(**values)
    inner.end(int((ended + offset) * 1e9))


def _plain(value: Value) -> str | int | float | bool:
    if isinstance(value, (bool, int, float)):
        return value
    return value if isinstance(value, str) and _WORD.fullmatch(value) else "other"


def _above(caller: Mapping[bytes, bytes] | None) -> Any:
    """The context of the caller's span; None: the context at hand."""
    given = caller.get(b"traceparent", b"").decode("latin-1") if caller is not None else ""
    if not _PARENT.fullmatch(given):
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": given})


def _kept_until_flush(exporter: Any) -> Any:
    """A processor without a thread: the worker forks runs, which is safe only where there is no other thread."""
    from opentelemetry.sdk.trace.export import SpanProcessor

    class Kept(SpanProcessor):
        def __init__(self) -> None:
            self.spans: list[Any] = []

        def on_end(self, span: Any) -> None:
            if len(self.spans) < 1000:
                self.spans.append(span)

        def force_flush(self, timeout_millis: int = 0) -> bool:
            spans, self.spans = self.spans, []
            if spans:
                exporter.export(spans)
            return True

        def shutdown(self) -> None:
            self.force_flush()
            exporter.shutdown()

    return Kept()
