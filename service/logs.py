"""The logs of every process: JSON lines with the ids of the request and the job at hand, or lines for people on a terminal (HSCR_LOG).

Health data stays out by form. Of an exception, ours or a library's, only its type and place are written, never its text. Our own messages
(loggers `hscr.*`) hold ids and numbers and are written as they are; a library's message keeps its fixed words and its numbers, its other
values become `…`, and one that has no values may have been filled in before and is left out. No web framework here: the worker uses this.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
import traceback
from contextlib import AbstractContextManager
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

    def named(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return event | event["_record"].said | {"process": process, "pid": event["_record"].process}

    render: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if console else structlog.processors.JSONRenderer()
    )
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


class _Formatter(structlog.stdlib.ProcessorFormatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(_sayable(record))


class _Handler(logging.StreamHandler[Any]):
    def handleError(self, record: logging.LogRecord) -> None:
        """The standard one prints the record's arguments."""
        sys.stderr.write('{"event": "a log record could not be written", "level": "error", "logger": "hscr"}\n')


def _sayable(record: logging.LogRecord) -> logging.LogRecord:
    """A copy without an exception's text and without a library's values. `said` are the fields beside the message."""
    made = copy.copy(record)
    ours = record.name.partition(".")[0] == _OURS
    said = {k: v for k, v in vars(record).items() if k not in _STANDARD} if ours else {}
    if record.exc_info and record.exc_info[1] is not None:
        said |= {"exception": type(record.exc_info[1]).__name__, "where": place(record.exc_info[2])}
    if not (ours or (record.name in _PLAIN and record.levelno <= logging.INFO)):
        made.msg, made.args = _words_and_numbers(record), ()
        said["at"] = f"{record.module}:{record.lineno}"
    made.exc_info = made.exc_text = made.stack_info = None
    made.said = said
    return made


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
