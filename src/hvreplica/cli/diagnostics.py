"""The library's log on stderr: as text for people and journals, or one JSON object a line."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from hvreplica.cli.render import encode_json, plain, write_error
from hvreplica.clock import iso_time

if TYPE_CHECKING:
    from collections.abc import Iterator

_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class StderrHandler(logging.Handler):
    """Writes to whatever stderr is at that moment, so that a live progress bar can make room for the line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_error(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


class TextFormatter(logging.Formatter):
    """`2026-11-23T17:00:00.000Z info transport: message`, on one line but for a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        source = record.name.removeprefix("hvreplica.")
        line = f"{iso_time(record.created)} {record.levelname.lower()} {source}: {plain(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object: time, level, logger, message, whatever was passed as `extra`, and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": iso_time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _OWN_FIELDS:
                entry[name] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return encode_json(entry)


@contextlib.contextmanager
def logging_shown(level: str, *, as_json: bool = False) -> Iterator[None]:
    """Show what the library logs at `level` and above while the block runs."""
    logger = logging.getLogger("hvreplica")
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    before, propagated = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagated
        logger.setLevel(before)
        logger.removeHandler(handler)
