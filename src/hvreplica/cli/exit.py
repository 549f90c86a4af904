"""From an exception to an exit code and to what a person is told. The only place that knows the numbers.

0 done   1 the disks differ, or a disk is repairable   2 wrong usage, or a disk is corrupt
3, 10..83 HvReplicaError (errors.py, one per class)   4 a bug in hvreplica   5 wrong usage where 2 is taken
70 the operating system said no   71 no space left
130 Ctrl-C   141 nobody reads the output   128 + n ended by signal n (143 SIGTERM)
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from hvreplica.errors import IO_ERROR_EXIT_CODE, NO_SPACE_EXIT_CODE, HvReplicaError

DIFFERENT = 1
USAGE = 2
INTERNAL = 4
STATE_USAGE = 5
INTERRUPTED = 130
OUTPUT_CLOSED = 141

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

CODES: tuple[tuple[int, str, str], ...] = (
    (0, "done", "the verb did what was asked"),
    (
        DIFFERENT,
        "different",
        "`disk compare` and `demo`: the two sides are not equal; `disk check` and `disk repair`: repairable",
    ),
    (
        USAGE,
        "usage",
        "unknown verb or option, missing or malformed argument; `disk check` and `disk repair`: corrupt",
    ),
    (INTERNAL, "bug", "hvreplica failed in a way it did not foresee; HVREPLICA_DEBUG=1 shows where"),
    (STATE_USAGE, "usage", "`disk check` and `disk repair`: wrong usage, because 2 says corrupt there"),
    (IO_ERROR_EXIT_CODE, "OSError", "the operating system refused: no such file, no permission, I/O error"),
    (NO_SPACE_EXIT_CODE, "OSError", "no space left, or a quota is used up"),
    (129, "SIGHUP", "the terminal went away"),
    (INTERRUPTED, "SIGINT", "stopped with Ctrl-C"),
    (OUTPUT_CLOSED, "SIGPIPE", "nobody reads the output any more, as in `hvreplica disk map a.vhdx | head`"),
    (143, "SIGTERM", "ended by SIGTERM; `serve`, `capture` and `replicate` without --once end with 0 then"),
)


class Signalled(BaseException):
    """A signal that ends the verb; raised in the main thread so that it can tidy up first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class OutputClosed(BaseException):
    """Nobody reads stdout any more: stop quietly."""


class Unequal(HvReplicaError):
    """What should be equal is not: the demo's own proof failed."""

    exit_code = DIFFERENT


class Failure(NamedTuple):
    """An error as a person or a program is told of it. kind: the name of its class."""

    kind: str
    message: str
    exit_code: int
    path: str | None = None
    offset: int | None = None
    field: str | None = None
    expected: str | int | None = None
    actual: str | int | None = None
    spec: str | None = None
    hint: str | None = None


def describe(error: BaseException) -> Failure:
    """Return what is to be said of `error`, and the exit code that belongs to it."""
    if isinstance(error, HvReplicaError):
        return _describe_own(error)
    if isinstance(error, OSError):
        return _describe_system(error)
    if isinstance(error, MemoryError):
        return Failure("MemoryError", "the system has no memory left for this", IO_ERROR_EXIT_CODE)
    return Failure(
        type(error).__name__,
        f"this is a bug in hvreplica: {type(error).__name__}: {_first_line(error)}",
        INTERNAL,
        hint="run it again with HVREPLICA_DEBUG=1 to see where, and report that",
    )


def _describe_own(error: HvReplicaError) -> Failure:
    return Failure(
        type(error).__name__,
        error.message,
        error.exit_code,
        path=None if error.path is None else os.fsdecode(error.path),
        offset=error.offset,
        field=error.field,
        expected=_plain_value(error.expected),
        actual=_plain_value(error.actual),
        spec=error.spec,
        hint=error.hint,
    )


def _describe_system(error: OSError) -> Failure:
    """Keep the system's own words; the note that files.py left says what was tried and at which offset."""
    code = NO_SPACE_EXIT_CODE if error.errno in _NO_SPACE else IO_ERROR_EXIT_CODE
    path = None
    if isinstance(error.filename, (str, bytes, os.PathLike)):
        path = os.fsdecode(error.filename)
    message = error.strerror or _first_line(error)
    tried = [_without(_first_line(note), path) for note in getattr(error, "__notes__", ())]
    hint = getattr(error, "hint", None)  # of a verb that knows what to do
    if error.errno in _NO_SPACE:
        hint = "make room, then run the same command again"
    return Failure(
        type(error).__name__,
        f"{message[:1].lower()}{message[1:]}" + (f" ({'; '.join(tried)})" if tried else ""),
        code,
        path=path,
        hint=hint,
    )


def _without(note: str, path: str | None) -> str:
    """Return a note such as "write PATH at offset 0" without the path, which is told anyway."""
    return " ".join(note.replace(path or "\n", "").split())


def _plain_value(value: object) -> str | int | None:
    if isinstance(value, (bytes, bytearray)):
        text = value.rstrip(b"\0").decode("latin-1")
        return f"'{text}'" if text.isascii() and text.isprintable() and text else f"0x{value.hex()}"
    return value if value is None or isinstance(value, int) else str(value)


def _first_line(value: object) -> str:
    return str(value).partition("\n")[0]
