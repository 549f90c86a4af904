"""Errors as fields that another process can raise again: the same class, the same words.

Names and values come from outside: a class is one of errors.py, an OSError by its number, or a ValueError;
anything else becomes a plain HvReplicaError.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from hvreplica import errors
from hvreplica.errors import Fenced, HvReplicaError

_TEXT_CHARS_MAX = 4_000

Text = Annotated[str, Meta(max_length=_TEXT_CHARS_MAX)]
Value = int | Text | None


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error in words. number: errno of an OSError. generation: of a Fenced. notes: added later."""

    kind: Annotated[str, Meta(max_length=64)]
    message: Text
    path: Text | None = None
    offset: int | None = None
    field: Text | None = None
    expected: Value = None
    actual: Value = None
    spec: Text | None = None
    hint: Text | None = None
    number: int | None = None
    generation: int = 0
    notes: Annotated[list[Text], Meta(max_length=16)] = []


def pack_failure(error: BaseException) -> Failure:
    """Return what another process is told of `error`."""
    notes = [_cut(note) for note in getattr(error, "__notes__", ())][:16]
    if isinstance(error, HvReplicaError):
        return Failure(
            type(error).__name__,
            _cut(error.message),
            path=None if error.path is None else _cut(os.fsdecode(error.path)),
            offset=error.offset,
            field=_cut(error.field),
            expected=_plain(error.expected),
            actual=_plain(error.actual),
            spec=_cut(error.spec),
            hint=_cut(error.hint),
            generation=error.generation if isinstance(error, Fenced) else 0,
            notes=notes,
        )
    if isinstance(error, OSError):
        name = error.filename
        return Failure(
            "OSError",
            _cut(error.strerror or str(error)),
            path=_cut(os.fsdecode(name)) if isinstance(name, (str, bytes, os.PathLike)) else None,
            number=error.errno,
            notes=notes,
        )
    return Failure(type(error).__name__[:64], _cut(str(error)), notes=notes)


def unpack_failure(failure: Failure) -> Exception:
    """Return the error that `failure` tells of, to be raised."""
    error = _made(failure)
    for note in failure.notes:
        error.add_note(note)
    return error


def _made(failure: Failure) -> Exception:
    if failure.kind == "OSError":
        return OSError(failure.number, failure.message, failure.path)
    if failure.kind == "ValueError":
        return ValueError(failure.message)
    kind = getattr(errors, failure.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, HvReplicaError)):
        return HvReplicaError(
            f"the other process failed: {failure.kind}: {failure.message}",
            hint="its log says more",
        )
    error: HvReplicaError = kind(
        failure.message,
        path=failure.path,
        offset=failure.offset,
        field=failure.field,
        expected=failure.expected,
        actual=failure.actual,
        spec=failure.spec,
        hint=failure.hint,
    )
    if isinstance(error, Fenced):
        error.generation = failure.generation
    return error


def _cut(text: Any) -> Any:
    return text if text is None else str(text)[:_TEXT_CHARS_MAX]


def _plain(value: object) -> Value:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63):
        return value
    text: str = _cut(value)
    return text
