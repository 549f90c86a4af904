"""The exception tree: few public classes, precise reasons, each with its place and a hint.

    HvReplicaError
      FormatError (+ValueError)   bytes that are not what they claim to be
        Truncated  BadSignature  UnsupportedVersion  ChecksumMismatch  FieldOutOfRange  Overlap
      LogError                    an .hrl that cannot be used as asked
        NotClosed  ChainBroken  ReplayRequired
      TrackingError               the record of what changed
        TrackingLost  QemuRefused
      TransportError              the way between the two sites
        Unreachable  PeerClosed  ProtocolViolation  ResumeRefused  AuthenticationFailed  AuthorizationRefused
      StoreError                  the replica's folder
        Locked  NoSuchPoint  PointInUse  ReplicaDiverged  StoreFull  Fenced
      StateError                  a verb at the wrong time
        InvalidTransition  FailoverRefused  FreezeFailed
      ParentError                 the parents of a differencing disk
        ParentMissing  ParentMismatch  ParentLoop  ParentInUse

An OSError of a file passes as it is: files.py adds path and offset to it as a note. Translated is what has a
reason of its own: a full disk below the store or an export is StoreFull (store/room.py), a certificate that
cannot be read is AuthenticationFailed (transport/tls.py), and sockets fail as a TransportError, Unreachable
where none could be opened (transport/connect.py, listen.py). Programmer errors are TypeError or
AssertionError and stand outside the tree. Exit codes live on the classes; docs/errors.md is made from them.
"""

from __future__ import annotations

import copy
import traceback
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    import os

_Error = TypeVar("_Error", bound=BaseException)


def kept(error: _Error) -> _Error:
    """Return a copy of `error` without its traceback, and let go of what the traceback's frames hold.

    For whoever ends an error's way: an object that keeps it and raises it again later, a thread that tells
    it. A frame that raised a local variable is in a cycle with its exception, and so are all buffers of all
    frames on the way. CPython before 3.12.7 crashes when its collector meets a memoryview that is in use in
    such a cycle (gh-77894), so none may be left to it. Keep kept(error), and raise kept(error): raising grows
    a traceback anew. Frames that still run are left alone.
    """
    copied = copy.copy(error)
    copied.__traceback__ = copied.__context__ = copied.__cause__ = None
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    return copied


class HvReplicaError(Exception):
    """Say what is wrong, where, and what to do next.

    message: one sentence without the place. path: the file, or a peer's address. offset: bytes from its
    start. field, expected, actual: the field that was read and both values. spec: the section that is broken.
    hint: the next step for the person who reads it. All of them appear in str().
    """

    exit_code: ClassVar[int] = 3
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        field: str | None = None,
        expected: object = None,
        actual: object = None,
        spec: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.offset = offset
        self.field = field
        self.expected = expected
        self.actual = actual
        self.spec = spec
        self.hint = hint

    def at(self, path: str | os.PathLike[str]) -> HvReplicaError:
        """Name the file of an error from code that sees bytes only; keeps a name already there."""
        if self.path is None:
            self.path = path
        return self

    def __str__(self) -> str:
        parts = []
        if self.path is not None:
            parts.append(f"{self.path}: ")
        parts.append(self.message)
        details = []
        if self.field is not None:
            details.append(f"field {self.field}")
        if self.offset is not None:
            details.append(f"offset {self.offset}")
        if self.expected is not None:
            details.append(f"expected {self.expected}")
        if self.actual is not None:
            details.append(f"found {self.actual}")
        if self.spec is not None:
            details.append(self.spec)
        if details:
            parts.append(f" ({', '.join(details)})")
        return "".join(parts)


class FormatError(HvReplicaError, ValueError):
    """Bytes from outside break the rules of their format."""

    exit_code = 10


class Truncated(FormatError):
    """The bytes end before the structure does."""

    exit_code = 11


class BadSignature(FormatError):
    """A signature or cookie is not the one of this format."""

    exit_code = 12


class UnsupportedVersion(FormatError):
    """A version, feature or required item that we do not know."""

    exit_code = 13


class ChecksumMismatch(FormatError):
    """A checksum or digest does not belong to its bytes."""

    exit_code = 14


class FieldOutOfRange(FormatError):
    """A length, offset, count or code is outside of what the format allows."""

    exit_code = 15


class Overlap(FormatError):
    """Two structures claim the same bytes."""

    exit_code = 16


class LogError(HvReplicaError):
    """An .hrl cannot be used as asked."""

    exit_code = 20


class NotClosed(LogError):
    """The log was never closed: its EOLLocation is 0."""

    exit_code = 21


class ChainBroken(LogError):
    """A log does not follow the one before it."""

    exit_code = 22


class ReplayRequired(LogError):
    """A VHDX whose own log is not empty was to be used without replay."""

    exit_code = 23


class TrackingError(HvReplicaError):
    """The record of what changed cannot be used."""

    exit_code = 30


class TrackingLost(TrackingError):
    """What changed is no longer known; only a comparison of the disk finds it."""

    exit_code = 31


class QemuRefused(TrackingError):
    """A QEMU does not do what tracking by its bitmaps needs."""

    exit_code = 32


class TransportError(HvReplicaError):
    """The way between the two sites failed."""

    exit_code = 40


class Unreachable(TransportError):
    """No connection to the other side could be made."""

    exit_code = 41
    retryable = True


class PeerClosed(TransportError):
    """The other side went away in the middle of an exchange."""

    exit_code = 42
    retryable = True


class ProtocolViolation(TransportError):
    """The other side sent what the protocol does not allow."""

    exit_code = 43


class ResumeRefused(TransportError):
    """A transfer cannot go on from where it stopped."""

    exit_code = 44


class AuthenticationFailed(TransportError):
    """A certificate was refused, by us or by the other side."""

    exit_code = 45


class AuthorizationRefused(TransportError):
    """The certificate is good, but the trust list does not let it write this VM."""

    exit_code = 46


class StoreError(HvReplicaError):
    """The replica's store cannot do what was asked."""

    exit_code = 50


class Locked(StoreError):
    """Another process or session holds what is needed."""

    exit_code = 51
    retryable = True


class NoSuchPoint(StoreError):
    """No such VM, disk or recovery point in the store."""

    exit_code = 52


class PointInUse(StoreError):
    """A recovery point is open and cannot go away now."""

    exit_code = 53


class ReplicaDiverged(StoreError):
    """The replica's disk is not in the state that the next log needs.

    removed_disk: the index that is used up there because the VM's disk of that index was removed.
    """

    exit_code = 54
    removed_disk: int | None = None


class StoreFull(StoreError):
    """The replica's file system has no room left."""

    exit_code = 55


class Fenced(StoreError):
    """Another primary, or a newer generation, owns this VM. generation: the owner's, 0 where unknown."""

    exit_code = 56
    generation: int = 0


class StateError(HvReplicaError):
    """The verb does not fit the state of the relationship."""

    exit_code = 60


class InvalidTransition(StateError):
    """No such step from this state."""

    exit_code = 61


class FailoverRefused(StateError):
    """A failover would lose or fork data and was not forced."""

    exit_code = 62


class FreezeFailed(StateError):
    """The guest's file systems did not stand still for a cut, or do not go on after it."""

    exit_code = 63
    retryable = True


class ParentError(HvReplicaError):
    """The parents of a differencing disk cannot be used."""

    exit_code = 80


class ParentMissing(ParentError):
    """No file that a differencing disk names as its parent could be found."""

    exit_code = 81


class ParentMismatch(ParentError):
    """The file found is not the parent, or its content is not that on which the child rests."""

    exit_code = 82


class ParentLoop(ParentError):
    """A chain of parents leads back to itself, or has more members than any real one."""

    exit_code = 83


class ParentInUse(ParentError):
    """Other disks rest on a disk that is to be changed or removed, and would no longer open."""

    exit_code = 84


IO_ERROR_EXIT_CODE = 70
NO_SPACE_EXIT_CODE = 71
