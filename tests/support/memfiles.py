"""FaultFiles and its open files. The fault model and its use stand in faultfile.py, which tests import."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hvreplica.errors import Locked, Truncated
from hvreplica.files import FileIdentity
from tests.support.sparse import SparseBytes
from tests.support.trace import Event, Fault, FileTree, Killed, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

_NO_CAPACITY_BYTES = 1 << 50
_CONTENT_KINDS = {"create", "write", "zero", "resize"}  # what moves an mtime
_TICK_NS = 1_000_000
_RESTART_NS = 1 << 50


class FaultBlockFile:
    """A BlockFile of FaultFiles; see there."""

    def __init__(self, files: FaultFiles, path: Path, inode: int, *, writable: bool) -> None:
        self._files = files
        self._path = path
        self._inode = inode
        self._writable = writable
        self._poison: OSError | None = None
        self._closed = False

    @property
    def path(self) -> Path:
        """The name it was opened by."""
        return self._path

    @property
    def writable(self) -> bool:
        """Whether writes are allowed."""
        return self._writable

    def fileno(self) -> int | None:
        """Return None: every access passes this object."""
        return None

    def size(self) -> int:
        """Return the length in bytes."""
        with self._files.guard:
            return self._content("size").size_bytes

    def read(self, file_offset: int, length: int) -> bytes:
        """Return exactly `length` bytes. Raises: Truncated."""
        buffer = bytearray(length)
        self.read_into(buffer, file_offset)
        return bytes(buffer)

    def read_into(self, buffer: Buffer, file_offset: int) -> None:
        """Fill `buffer` exactly. Raises: Truncated at the strict end of the file."""
        view = memoryview(buffer).cast("B")
        _check_range("read", self._path, file_offset, len(view))
        with self._files.guard:
            content = self._content("read")
            here = min(max(content.size_bytes - file_offset, 0), len(view))
            content.read_into(view[:here], file_offset)
        if here < len(view):
            raise Truncated(
                "the file ends inside what was to be read",
                path=self._path,
                offset=file_offset,
                expected=f"{len(view)} bytes",
                actual=f"{here} bytes",
            )

    def write(self, buffer: Buffer, file_offset: int) -> None:
        """Write all of `buffer`, volatile until sync()."""
        data = bytes(memoryview(buffer).cast("B"))
        _check_range("write", self._path, file_offset, len(data))
        with self._files.guard:
            self._alive()
            self._may_write()
            fault = self._files.strike("write", self._path)
            if fault is not None:
                self._put(data[: fault.written_bytes], file_offset)
                raise _os_error(fault.error, "write", self._path, file_offset)
            self._put(data, file_offset)

    def resize(self, size_bytes: int) -> None:
        """Cut or extend, volatile until sync()."""
        _check_range("resize", self._path, size_bytes, 0)
        with self._files.guard:
            self._may_write()
            self._content("resize").resize(size_bytes)
            self._files.record(Event("resize", self._path, self._inode, length=size_bytes))

    def zero(self, file_offset: int, length: int) -> None:
        """Make a range inside the file read as zeros and a hole, volatile until sync()."""
        if length <= 0:
            return
        _check_range("zero", self._path, file_offset, length)
        with self._files.guard:
            self._may_write()
            content = self._content("zero")
            length = min(
                length, max(content.size_bytes - file_offset, 0)
            )  # a punched hole never grows the file
            if length:
                content.zero(file_offset, file_offset + length)
                self._files.record(Event("zero", self._path, self._inode, file_offset, length))

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what is held between `start` and `end`; the rest is zeros."""
        with self._files.guard:
            return iter(list(self._content("data_extents").extents(start, end)))

    def sync(self) -> None:
        """Make data and length durable. A failure poisons the file and loses what was pending."""
        with self._files.guard:
            self._alive()
            fault = self._files.strike("sync", self._path)
            if fault is not None:
                self._files.record(Event("sync_failed", self._path, self._inode))
                self._poison = _os_error(fault.error, "sync", self._path)
                raise self._poison
            self._files.record(Event("sync", self._path, self._inode))

    def close(self) -> None:
        """Close without syncing."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _put(self, data: bytes, file_offset: int) -> None:
        if data:
            content = self._files.content(self._inode)
            self._files.reserve(
                content.new_bytes(file_offset, file_offset + len(data)), self._path, file_offset
            )
            content.write(memoryview(data), file_offset)
            self._files.record(Event("write", self._path, self._inode, file_offset, len(data), data))

    def _content(self, operation: str) -> SparseBytes:
        self._alive()
        fault = self._files.strike(operation, self._path)
        if fault is not None:
            raise _os_error(fault.error, operation, self._path)
        return self._files.content(self._inode)

    def _may_write(self) -> None:
        if not self._writable:
            raise _os_error(errno.EBADF, "write", self._path)

    def _alive(self) -> None:
        self._files.check_alive()
        if self._poison is not None:
            raise self._poison
        if self._closed:
            message = f"{self._path} is closed"
            raise ValueError(message)


class _FaultLock:
    def __init__(self, files: FaultFiles, path: Path) -> None:
        self._files = files
        self._path = path
        self._held = True

    def release(self) -> None:
        with self._files.guard:
            if self._held:
                self._held = False
                self._files.unlock(self._path)


class FaultFiles:
    """The FileSystem in memory. Thread-safe: one lock around every step, which orders the trace.

    folders: what exists at first besides "/". capacity_bytes: where set, writes beyond it raise ENOSPC.
    acknowledged, notes: what the code under test promised before the cut that made this world.
    story: how this world came about, for the message of a failing test.
    """

    def __init__(
        self, *folders: str | Path, capacity_bytes: int | None = None, tree: FileTree | None = None
    ) -> None:
        self.guard = threading.RLock()
        self.capacity_bytes = capacity_bytes
        self.notes: list[tuple[str, Any]] = []
        self.story = "from nothing"
        self.hook: Callable[[str, Path], None] | None = (
            None  # called before every operation; may raise anything
        )
        self._tree = FileTree({Path("/")}) if tree is None else tree
        for folder in folders:
            path = _absolute(folder)
            self._tree.folders.update((path, *path.parents))
        self._faults: list[Fault] = []
        self._modes: dict[int, int] = {}
        self._locks: dict[Path, int] = {}  # -1 exclusive, else the number of shared holders
        self._inode = max(self._tree.contents, default=0)
        # Later than anything that happened before a cut that made this world, however old its files are.
        self._now_ns = max(self._tree.mtimes_ns.values(), default=0) + _RESTART_NS
        self._kill_at: int | None = None
        self._killed = False
        self.settle()

    # What tests do

    def settle(self) -> None:
        """Take everything as durable and begin a new trace here."""
        with self.guard:
            named = set(self._tree.names.values())
            self._start = FileTree(
                set(self._tree.folders),
                dict(self._tree.names),
                {inode: content.copy() for inode, content in self._tree.contents.items() if inode in named},
                dict(self._tree.mtimes_ns),
            )
            self._start_notes = tuple(self.notes)
            self._events: list[Event] = []

    def load(self, path: str | Path, data: bytes) -> None:
        """Put a durable file there before the trace begins; its folder is made."""
        with self.guard:
            name = _absolute(path)
            self._tree.folders.update(name.parents)
            self._inode += 1
            self._tree.names[name] = self._inode
            self._tree.contents[self._inode] = SparseBytes(data)
            self._tree.mtimes_ns[self._inode] = self._tick()
            self.settle()

    def trace(self) -> Trace:
        """Return what happened so far, for crash_states()."""
        with self.guard:
            return Trace(self._start.copy(), tuple(self._events), self._start_notes)

    def digest(self) -> int:
        """Return a hash of all folders, names, contents and holes."""
        with self.guard:
            contents = self._tree.contents
            files = [(path, contents[inode].digest()) for path, inode in self._tree.names.items()]
            return hash((frozenset(self._tree.folders), frozenset(files)))

    def note(self, label: str, value: Any = None) -> None:
        """Put an event of the test's own into the trace, such as the catalog's bytes at a commit."""
        with self.guard:
            self.check_alive()
            self.notes.append((label, value))
            self.record(Event("note", Path("/"), label=label, value=value))

    def acknowledge(self, value: Any) -> None:
        """Record that the code promised `value`: it must survive every later cut."""
        self.note("acknowledged", value)

    @property
    def acknowledged(self) -> list[Any]:
        """What was promised before the cut, oldest first."""
        return [value for label, value in self.notes if label == "acknowledged"]

    def last_note(self, label: str, default: Any = None) -> Any:
        """Return the newest value noted under `label`, such as the catalog's last committed bytes."""
        return next((value for name, value in reversed(self.notes) if name == label), default)

    def fail(
        self,
        operation: str,
        *,
        at: int = 1,
        error: int = errno.EIO,
        path: str = "*",
        count: int | None = 1,
        written_bytes: int = 0,
    ) -> Fault:
        """Arm an OSError; see Fault. Return it, so that a test can see whether it struck."""
        fault = Fault(operation, at, error, path, count, written_bytes)
        with self.guard:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Disarm every fault, hook and kill."""
        with self.guard:
            self._faults.clear()
            self._kill_at, self._killed, self.hook = None, False, None

    def kill_at(self, event_count: int) -> None:
        """Raise Killed from every call once `event_count` events are recorded, in every thread."""
        with self.guard:
            self._kill_at = event_count

    def after_kill(self) -> FaultFiles:
        """Return what the next process finds after kill -9: all that was written, no lock, no open file."""
        with self.guard:
            world = FaultFiles(tree=self._tree.copy(), capacity_bytes=self.capacity_bytes)
            world.notes = list(self.notes)
            world.story = f"killed after {len(self._events)} events"
            world.settle()
            return world

    def content_of(self, path: str | Path) -> bytes:
        """Return the whole file as this process sees it. Raises: FileNotFoundError."""
        with self.guard:
            content = self.content(self._lookup("read", _absolute(path)))
            buffer = bytearray(content.size_bytes)
            content.read_into(memoryview(buffer), 0)
            return bytes(buffer)

    def mode_of(self, path: str | Path) -> int:
        """Return the permissions that a file of this process was created with. Raises: FileNotFoundError."""
        with self.guard:
            return self._modes.get(self._lookup("stat", _absolute(path)), 0o644)

    def files(self) -> list[Path]:
        """Return the names of all files, sorted."""
        with self.guard:
            return sorted(self._tree.names)

    # The FileSystem protocol

    def open(
        self,
        path: Path,
        *,
        writable: bool = False,
        create: bool = False,
        exclusive: bool = False,
        mode: int = 0o644,
    ) -> FaultBlockFile:
        """Open as files.FileSystem says; mode_of() tells the permissions."""
        path = _absolute(path)
        with self.guard:
            self._step("open", path)
            if path in self._tree.folders:
                raise _os_error(errno.EISDIR, "open", path)
            inode = self._tree.names.get(path)
            if inode is not None and create and exclusive:
                raise _os_error(errno.EEXIST, "open", path)
            if inode is None:
                if not create:
                    raise _os_error(errno.ENOENT, "open", path)
                inode = self._create(path)
                self._modes[inode] = mode
            return FaultBlockFile(self, path, inode, writable=writable or create)

    def exists(self, path: Path) -> bool:
        """Return whether anything has this name."""
        path = _absolute(path)
        with self.guard:
            self._step("exists", path)
            return path in self._tree.names or path in self._tree.folders

    def identity(self, path: Path) -> FileIdentity:
        """Return what tells the file from others; each change of content has a time of its own."""
        path = _absolute(path)
        with self.guard:
            self._step("stat", path)
            inode = self._lookup("stat", path)
            size_bytes = self._tree.contents[inode].size_bytes
            return FileIdentity(1, inode, size_bytes, self._tree.mtimes_ns.get(inode, 0))

    def names(self, folder: Path) -> list[str]:
        """Return the sorted names in `folder`."""
        folder = _absolute(folder)
        with self.guard:
            self._step("names", folder)
            inside = (*self._tree.names, *self._tree.folders)
            return sorted(path.name for path in inside if path.parent == folder and path != folder)

    def make_directory(self, path: Path) -> None:
        """Make it and its parents, durable at once."""
        path = _absolute(path)
        with self.guard:
            self._step("mkdir", path)
            for folder in reversed((path, *path.parents)):
                if folder in self._tree.names:
                    raise _os_error(errno.ENOTDIR, "make directory", folder)
                if folder not in self._tree.folders:
                    self._tree.folders.add(folder)
                    self.record(Event("mkdir", folder))

    def replace(self, source: Path, target: Path) -> None:
        """Rename whole and at once, volatile until sync_directory()."""
        source, target = _absolute(source), _absolute(target)
        with self.guard:
            self._step("rename", source)
            inode = self._lookup("rename", source)
            if target in self._tree.folders:
                raise _os_error(errno.EISDIR, "rename", target)
            self._need_folder("rename", target)
            if source != target:
                del self._tree.names[source]
                self._tree.names[target] = inode
                self.record(Event("rename", source, inode, target=target))

    def link(self, source: Path, target: Path) -> bool:
        """Give a file a second name, volatile until sync_directory()."""
        source, target = _absolute(source), _absolute(target)
        with self.guard:
            self._step("link", source)
            inode = self._lookup("link", source)
            if target in self._tree.names or target in self._tree.folders:
                raise _os_error(errno.EEXIST, "link", target)
            self._need_folder("link", target)
            self._tree.names[target] = inode
            self.record(Event("link", target, inode))
            return True

    def copy_attributes(self, source: Path, target: Path) -> None:
        """Copy the permissions, which no cut loses."""
        source, target = _absolute(source), _absolute(target)
        with self.guard:
            self._step("copy_attributes", target)
            inode = self._lookup("copy attributes", target)
            self._modes[inode] = self._modes.get(self._lookup("copy attributes", source), 0o644)

    def unlink(self, path: Path) -> None:
        """Remove a name, volatile until sync_directory()."""
        path = _absolute(path)
        with self.guard:
            self._step("unlink", path)
            if path in self._tree.folders:
                raise _os_error(errno.EISDIR, "unlink", path)
            inode = self._tree.names.pop(path, None)
            if inode is not None:
                self.record(Event("unlink", path, inode))

    def sync_directory(self, path: Path) -> None:
        """Make the names in `path` durable."""
        path = _absolute(path)
        with self.guard:
            self._step("sync_directory", path)
            if path not in self._tree.folders:
                raise _os_error(errno.ENOENT, "sync directory", path)
            self.record(Event("sync_directory", path))

    def free_bytes(self, path: Path) -> int:
        """Return what the capacity leaves."""
        with self.guard:
            self._step("free_bytes", _absolute(path))
            return self._free_bytes()

    def lock(self, path: Path, *, shared: bool = False) -> _FaultLock:
        """Take the lock file or raise Locked at once."""
        path = _absolute(path)
        with self.guard:
            self._step("lock", path)
            if path not in self._tree.names:
                self._create(path)
            held = self._locks.get(path, 0)
            if held < 0 or (held > 0 and not shared):
                raise Locked(
                    "another process holds this lock",
                    path=path,
                    hint="wait for it to end, or stop it; the lock goes away with its process",
                )
            self._locks[path] = held + 1 if shared else -1
            return _FaultLock(self, path)

    # What FaultBlockFile and FaultLock need; the guard is held

    def content(self, inode: int) -> SparseBytes:
        """Return the volatile bytes of a file, named or not."""
        return self._tree.contents[inode]

    def record(self, event: Event) -> None:
        """Append to the trace, and fall down where kill_at() says so."""
        event = replace(event, time_ns=self._tick())
        if event.kind in _CONTENT_KINDS:
            self._tree.mtimes_ns[event.inode] = event.time_ns
        self._events.append(event)
        if self._kill_at is not None and len(self._events) >= self._kill_at:
            self._killed = True
            raise Killed

    def strike(self, operation: str, path: Path) -> Fault | None:
        """Return the armed fault that hits this call, if any."""
        if self.hook is not None:
            self.hook(operation, path)
        struck = [fault for fault in self._faults if fault.strike(operation, path)]
        return struck[0] if struck else None

    def reserve(self, new_bytes: int, path: Path, offset: int) -> None:
        """Raise ENOSPC where the capacity does not hold `new_bytes` more."""
        if self.capacity_bytes is not None and new_bytes > self._free_bytes():
            raise _os_error(errno.ENOSPC, "write", path, offset)

    def check_alive(self) -> None:
        """Raise Killed where the process is dead."""
        if self._killed:
            raise Killed

    def unlock(self, path: Path) -> None:
        """Give one hold of a lock back."""
        held = self._locks.pop(path)
        if held > 1:
            self._locks[path] = held - 1

    def _tick(self) -> int:
        self._now_ns += _TICK_NS
        return self._now_ns

    def _step(self, operation: str, path: Path) -> None:
        self.check_alive()
        fault = self.strike(operation, path)
        if fault is not None:
            raise _os_error(fault.error, operation, path)

    def _create(self, path: Path) -> int:
        self._need_folder("open", path)
        self._inode += 1
        self._tree.names[path] = self._inode
        self._tree.contents[self._inode] = SparseBytes()
        self.record(Event("create", path, self._inode))
        return self._inode

    def _need_folder(self, operation: str, path: Path) -> None:
        if path.parent not in self._tree.folders:
            code = errno.ENOTDIR if path.parent in self._tree.names else errno.ENOENT
            raise _os_error(code, operation, path)

    def _lookup(self, operation: str, path: Path) -> int:
        if path not in self._tree.names:
            raise _os_error(errno.ENOENT, operation, path)
        return self._tree.names[path]

    def _free_bytes(self) -> int:
        if self.capacity_bytes is None:
            return _NO_CAPACITY_BYTES
        used = sum(self._tree.contents[inode].allocated_bytes for inode in set(self._tree.names.values()))
        return max(self.capacity_bytes - used, 0)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.normpath(Path("/") / path))


def _check_range(operation: str, path: Path, offset: int, length: int) -> None:
    if offset < 0 or offset + length >= 1 << 63:
        raise _os_error(errno.EINVAL, operation, path, offset)


def _os_error(code: int, operation: str, path: Path, offset: int | None = None) -> OSError:
    error = OSError(code, os.strerror(code), str(path))
    error.add_note(f"{operation} {path}" + ("" if offset is None else f" at offset {offset}"))
    return error
