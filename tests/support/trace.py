"""What FaultFiles records and what it stands on: events, the durable tree, faults to come."""

from __future__ import annotations

import errno
import fnmatch
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.sparse import SparseBytes

SECTOR_BYTES = 512  # the unit that a power cut keeps or loses whole


class Killed(BaseException):
    """The process was killed here. Not an Exception, so that no handler of the code under test goes on."""


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a trace.

    kind: create write resize zero sync_begin sync sync_failed link rename unlink mkdir sync_directory note.
    inode: the file whatever its name. path: its name when it was opened; for rename the source. offset,
    length: bytes (length is the new size for resize). data: what was written. label, value: of a note. token:
    of sync_begin (inode 0: of a folder), and of the sync or sync_directory that ends it, which covers only
    what stands before its beginning; 0 where a sync is one step and covers all before it. time_ns: when, on
    the clock that mtimes are made of.
    """

    kind: str
    path: Path
    inode: int = 0
    offset: int = 0
    length: int = 0
    data: bytes = b""
    target: Path | None = None
    label: str = ""
    value: Any = None
    time_ns: int = 0
    token: int = 0

    def __str__(self) -> str:
        place = f" [{self.offset}, +{self.length})" if self.kind in {"write", "zero"} else ""
        size = f" to {self.length}" if self.kind == "resize" else ""
        target = f" -> {self.target}" if self.target is not None else ""
        note = f" {self.label} {self.value!r:.60}" if self.kind == "note" else f" {self.path}"
        return f"{self.kind}{note}{target}{place}{size}"


@dataclass(slots=True)
class FileTree:
    """Names and what they hold, all durable."""

    folders: set[Path]
    names: dict[Path, int] = field(default_factory=dict)
    contents: dict[int, SparseBytes] = field(default_factory=dict)
    mtimes_ns: dict[int, int] = field(default_factory=dict)

    def copy(self) -> FileTree:
        """Return an independent copy that shares the bytes until one side writes."""
        contents = {inode: content.copy() for inode, content in self.contents.items()}
        return FileTree(set(self.folders), dict(self.names), contents, dict(self.mtimes_ns))


@dataclass(frozen=True, slots=True)
class Trace:
    """What stood there durably at first, and every step since."""

    start: FileTree
    events: tuple[Event, ...]
    notes: tuple[tuple[str, Any], ...] = ()  # from before the start

    def __len__(self) -> int:
        return len(self.events)

    def __str__(self) -> str:
        return "\n".join(f"{index:5d} {event}" for index, event in enumerate(self.events))


@dataclass(slots=True)
class Fault:
    """An OSError to come: at the `at`-th (from 1) matching call, `count` times in a row, or for ever if None.

    operation: open read write resize zero sync mkdir link rename unlink sync_directory lock. path: a glob
    over the whole path. written_bytes: how much of a failing write still arrives.
    """

    operation: str
    at: int = 1
    error: int = errno.EIO
    path: str = "*"
    count: int | None = 1
    written_bytes: int = 0
    calls: int = 0
    hits: int = 0

    def strike(self, operation: str, path: Path) -> bool:
        """Count a call and return whether this one fails."""
        if operation != self.operation or not fnmatch.fnmatch(str(path), self.path):
            return False
        self.calls += 1
        strikes = self.calls >= self.at and (self.count is None or self.calls < self.at + self.count)
        self.hits += strikes
        return strikes
