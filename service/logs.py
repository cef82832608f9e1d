"""The logs of every process: JSON lines with the ids of the request and the job at hand, or lines for people on a terminal (HSCR_LOG).

Health data stays out by form. Of an exception, ours or a library's, only its type and place are written, never its text. Our own messages
(loggers `hscr.*`) hold ids and numbers and are written as they are; a library's message keeps its fixed words and its numbers, its other
values become `…`, and one that has no values may have been filled in before and is left out. No web framework here: the worker uses this.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import threading
import traceback
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, WrappedLogger

Style = Literal["auto", "json", "console"]
LEFT_OUT = "(a library's text, left out)"
_OURS = "hscr"
# uvicorn's life cycle: addresses and process ids, nothing of a request.
_PLAIN = frozenset({"uvicorn.error"})
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
log = logging.getLogger("hscr")


def configure(process: str, style: Style = "auto") -> None:
    """Write all logging of this process to stderr. Does nothing where logging is configured already (a test, an embedding program).

    `process` is named in every line. `auto` is JSON unless stderr is a terminal.
    """
    root = logging.getLogger()
    if root.handlers:
        return
    handler = _Handler()
    handler.setFormatter(formatter(process, style == "console" or (style == "auto" and sys.stderr.isatty())))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, tb: _uncaught(error, tb)
    threading.excepthook = lambda args: _uncaught(args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _uncaught(args.exc_value, args.exc_traceback)


def bound(**ids: str | int) -> AbstractContextManager[None]:
    """Within the block, and in the threads and tasks that it starts with its context, every line carries these."""
    return structlog.contextvars.bound_contextvars(**ids)


def place(tb: TracebackType | None) -> str:
    """Where an exception was raised, innermost first: file names without their folders, lines, functions."""
    frames = traceback.extract_tb(tb)[-4:]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))


def formatter(process: str, console: bool) -> logging.Formatter:
    """What makes a line of a record, the same for all loggers."""

    if not console:
        return _Lines(process)

    def named(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return event | event["_record"].said | {"process": process, "pid": event["_record"].process}

    render: Any = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    return _Formatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            named,
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
    )


class _Lines(logging.Formatter):
    """A line of JSON a record. By hand: structlog's chain of processors took a tenth of a small read."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        message, said = _sayable(record)
        line = {"event": message} | structlog.contextvars.get_contextvars()
        line |= {"level": record.levelname.lower(), "logger": record.name, "timestamp": _time(record.created)}
        return json.dumps(line | said | {"process": self._process, "pid": record.process}, default=repr)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class _Formatter(structlog.stdlib.ProcessorFormatter):
    def format(self, record: logging.LogRecord) -> str:
        made = copy.copy(record)
        (made.msg, made.said), made.args = _sayable(record), ()
        made.exc_info = made.exc_text = made.stack_info = None
        return super().format(made)


class _Handler(logging.StreamHandler[Any]):
    def handleError(self, record: logging.LogRecord) -> None:
        """The standard one prints the record's arguments."""
        sys.stderr.write('{"event": "a log record could not be written", "level": "error", "logger": "hscr"}\n')


def _sayable(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """The message without a library's values, and the fields beside it: of an exception its type and place, not its text."""
    ours = record.name.partition(".")[0] == _OURS
    said = {k: v for k, v in vars(record).items() if k not in _STANDARD} if ours else {}
    if record.exc_info and record.exc_info[1] is not None:
        said |= {"exception": type(record.exc_info[1]).__name__, "where": place(record.exc_info[2])}
    if ours or (record.name in _PLAIN and record.levelno <= logging.INFO):
        return record.getMessage(), said
    return _words_and_numbers(record), said | {"at": f"{record.module}:{record.lineno}"}


def _words_and_numbers(record: logging.LogRecord) -> str:
    given = record.args
    if not given:
        return LEFT_OUT
    try:
        kept = {k: _number(v) for k, v in given.items()} if isinstance(given, dict) else tuple(map(_number, given))
        return str(record.msg).replace("%r", "%s") % kept
    except (TypeError, ValueError, KeyError):
        return LEFT_OUT


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else "…"


def _uncaught(error: BaseException | None, tb: TracebackType | None) -> None:
    if error is None or isinstance(error, KeyboardInterrupt):
        return
    log.critical("uncaught exception", exc_info=(type(error), error, tb))
