"""Turn what recorder.c wrote down into the trace of crash.py, and worlds of it into real folders again.

    before = photograph(state, disks)
    ... a process runs under the recorder and ends ...
    recording = read_recording(trace_file, before)
    assert recording.differences(photograph(state, disks)) == []    # nothing passed the recorder by
    for index, world in crash_states(recording.trace(notes), seed=seed):
        lay_out(world, before.roots)
        recover()

The fault model is that of faultfile.py, with one addition: a sync covers what stood before its beginning and
promises it from its end on. Folders that are made are durable at once.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hvreplica.files import OS_FILES
from tests.support.crash import apply_to_content, apply_to_names
from tests.support.sparse import CHUNK_BYTES, SparseBytes
from tests.support.trace import Event, FileTree, Trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tests.support.memfiles import FaultFiles

_RECORD = struct.Struct("<IHHIiQQqqqQII")  # struct record of recorder.c
_MAGIC = 0x54525648
_KINDS = (
    *("", "write", "resize", "allocate", "sync_begin", "sync_end", "create", "rename", "unlink"),
    *("mkdir", "rmdir", "send", "sent", "refused"),
)
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10  # modes of fallocate(2)
_READ_BYTES = 1 << 20


class Send(NamedTuple):
    """Bytes that left through a socket. position: the events that stood before they could be seen."""

    position: int
    socket: int
    data: bytes


class Note(NamedTuple):
    """A note for the trace. position: the events before it; notes of one position stay in their order."""

    position: int
    label: str
    value: Any


@dataclass(slots=True)
class Photograph:
    """Real folders at one time. numbers: the inode of the tree for each (device, inode)."""

    roots: tuple[Path, ...]
    tree: FileTree
    numbers: dict[tuple[int, int], int]


def photograph(*roots: Path) -> Photograph:
    """Read folders with all that they hold; links and special files are left out."""
    real = tuple(root.resolve(strict=True) for root in roots)
    shot = Photograph(real, FileTree({Path("/")}), {})
    for root in real:
        shot.tree.folders.update((root, *root.parents))
        for folder, folders, names in os.walk(root):
            shot.tree.folders.update(Path(folder, name) for name in folders)
            for name in names:
                path = Path(folder, name)
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                number = shot.numbers.setdefault((status.st_dev, status.st_ino), len(shot.numbers) + 1)
                shot.tree.names[path] = number
                shot.tree.contents[number] = read_sparse(path)
                shot.tree.mtimes_ns[number] = status.st_mtime_ns
    return shot


def read_sparse(path: Path) -> SparseBytes:
    """Return a file's content without its holes."""
    content = SparseBytes()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, at = os.fstat(descriptor).st_size, 0
        while at < size:
            try:
                at = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError:
                break  # nothing but a hole follows
            end = os.lseek(descriptor, at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(descriptor, min(end - at, _READ_BYTES), at)
                content.write(memoryview(data), at)
                at += len(data)
        content.resize(size)
    finally:
        os.close(descriptor)
    return content


@dataclass(slots=True)
class Recording:
    """What a process did. end: the tree as the process left it, synced or not."""

    start: FileTree
    end: FileTree
    events: list[Event] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def trace(self, notes: Iterable[Note] = ()) -> Trace:
        """Return the events with `notes` among them. The start is shared: make no two traces at a time."""
        ordered = sorted(notes, key=lambda note: note.position)
        events: list[Event] = []
        done = 0
        for note in ordered:
            events += self.events[done : note.position]
            done = note.position
            events.append(Event("note", Path("/"), label=note.label, value=note.value))
        events += self.events[done:]
        return Trace(self.start.copy(), tuple(events))

    def differences(self, now: Photograph) -> list[str]:
        """Return how real folders differ from `end`; anything means that the recorder missed something."""
        found = list(self.refused)
        found += [f"{path}: gone" for path in sorted(set(self.end.names) - set(now.tree.names))]
        found += [f"{path}: unknown" for path in sorted(set(now.tree.names) - set(self.end.names))]
        for path in sorted(set(self.end.names) & set(now.tree.names)):
            ours = self.end.contents[self.end.names[path]]
            theirs = now.tree.contents[now.tree.names[path]]
            if ours.size_bytes != theirs.size_bytes:
                found.append(f"{path}: {ours.size_bytes} bytes recorded, {theirs.size_bytes} real")
            else:
                found += [f"{path}: differs at {at}" for at in first_difference(ours, theirs)]
        return found


def first_difference(one: SparseBytes, other: SparseBytes) -> Iterator[int]:
    """Yield the offset of the first chunk that differs, if any; an absent chunk is zeros."""
    for index in sorted({*one.chunk_indexes(), *other.chunk_indexes()}):
        start = index * CHUNK_BYTES
        length = max(min(CHUNK_BYTES, one.size_bytes - start), 0)
        pieces = [bytearray(length), bytearray(length)]
        one.read_into(memoryview(pieces[0]), start)
        other.read_into(memoryview(pieces[1]), start)
        if pieces[0] != pieces[1]:
            yield start
            return


def read_recording(path: Path, before: Photograph) -> Recording:
    """Read a trace file whose process began on `before` and ran in its roots.

    Raises: ValueError for a trace that is damaged or holds what cannot be replayed.
    """
    return _Reader(before).read(path.read_bytes())


class _Reader:
    """Events from records; follows sizes and names as they are for the process."""

    def __init__(self, before: Photograph) -> None:
        self._recording = Recording(before.tree.copy(), before.tree.copy())
        self._numbers = dict(before.numbers)
        self._next = max(before.numbers.values(), default=0) + 1
        self._open_sends: dict[int, int] = {}
        self._folders: dict[int, Path] = {}  # by token: folders whose sync is under way

    def read(self, blob: bytes) -> Recording:
        at = 0
        while at < len(blob):
            if len(blob) - at < _RECORD.size:
                break  # the process was killed inside a record: what it describes was not answered
            fields = _RECORD.unpack_from(blob, at)
            if fields[0] != _MAGIC:
                message = f"no record at {at} of the trace"
                raise ValueError(message)
            path_end = at + _RECORD.size + fields[11]
            end = path_end + fields[12]
            if end > len(blob):
                break
            self._feed(fields, blob[at + _RECORD.size : path_end], blob[path_end:end])
            at = end
        return self._recording

    def _feed(self, fields: tuple[int, ...], name: bytes, data: bytes) -> None:
        _, kind_number, flags, _, error, device, inode, offset, length, mtime_ns, token, _, _ = fields
        kind = _KINDS[kind_number]
        if kind in {"send", "sent"}:
            self._feed_send(kind, inode, token, length, data)
        elif kind == "refused":
            self._recording.refused.append(os.fsdecode(name))
        elif kind in {"sync_begin", "sync_end"}:
            self._feed_sync(kind, (device, inode), token, error, name)
        elif kind == "create":
            self._numbers[device, inode] = self._next
            self._next += 1
            self._add(
                Event("create", Path(os.fsdecode(name)), self._numbers[device, inode], time_ns=mtime_ns)
            )
        elif kind in {"rename", "unlink", "mkdir", "rmdir"}:
            self._feed_name(kind, name)
        else:
            number = self._numbers[device, inode]
            for event in self._data_events(kind, number, flags, offset, length, data):
                self._add(replace(event, time_ns=mtime_ns))

    def _data_events(
        self, kind: str, number: int, flags: int, offset: int, length: int, data: bytes
    ) -> list[Event]:
        path = self._name_of(number)
        size = self._recording.end.contents[number].size_bytes
        if kind == "write":
            if flags:
                message = f"a write of {path} that is durable on return cannot be replayed"
                raise ValueError(message)
            return [Event("write", path, number, offset, length, data)]
        if kind == "resize":
            return [Event("resize", path, number, length=length)]
        events = []
        end = offset + length
        if flags & (_PUNCH_HOLE | _ZERO_RANGE) and offset < size:
            events.append(Event("zero", path, number, offset, min(end, size) - offset))
        if not flags & _KEEP_SIZE and end > size:
            events.append(Event("resize", path, number, length=end))
        return events

    def _feed_name(self, kind: str, name: bytes) -> None:
        source, _, target = os.fsdecode(name).partition("\0")
        path = Path(source)
        names = self._recording.end.names
        if kind == "rmdir":
            self._recording.refused.append(f"removed folder {path}")
        elif kind == "mkdir":
            self._add(Event("mkdir", path))
        elif kind == "unlink" and path in names:  # else a socket or a link, which is no content of anybody's
            self._add(Event("unlink", path, names[path]))
        elif kind == "unlink":
            return
        elif path in names:
            self._add(Event("rename", path, names[path], target=Path(target)))
        else:
            self._recording.refused.append(f"renamed folder {path}")

    def _feed_sync(self, kind: str, key: tuple[int, int], token: int, error: int, name: bytes) -> None:
        if name:
            self._folders[token] = Path(os.fsdecode(name))
            self._add(Event("sync_begin", self._folders[token], token=token))
        elif token in self._folders:
            folder = self._folders.pop(token)
            if error == 0:
                self._add(Event("sync_directory", folder, token=token))
        elif key in self._numbers:
            number = self._numbers[key]
            kind = kind if kind == "sync_begin" else "sync_failed" if error else "sync"
            self._add(Event(kind, self._name_of(number), number, token=token))

    def _feed_send(self, kind: str, socket: int, token: int, length: int, data: bytes) -> None:
        sends = self._recording.sends
        if kind == "send":
            self._open_sends[token] = len(sends)
            sends.append(Send(len(self._recording.events), socket, data))
        else:
            place = self._open_sends.pop(token)
            sends[place] = sends[place]._replace(data=sends[place].data[: max(length, 0)])

    def _name_of(self, number: int) -> Path:
        names = self._recording.end.names
        return next((path for path, held in names.items() if held == number), Path(f"/removed/{number}"))

    def _add(self, event: Event) -> None:
        end = self._recording.end
        self._recording.events.append(event)
        if event.kind == "create":
            end.contents[event.inode] = SparseBytes()
        if event.kind in {"create", "rename", "unlink"}:
            apply_to_names(end.names, event)
        elif event.kind in {"write", "zero", "resize"}:
            apply_to_content(end.contents[event.inode], event)
        elif event.kind == "mkdir":
            end.folders.add(event.path)


def lay_out(world: FaultFiles, roots: Sequence[Path]) -> None:
    """Make real folders hold what `world` holds under `roots`; files of the same name keep their inode."""
    tree = world.trace().start
    wanted = {path for path in tree.names if any(root in path.parents for root in roots)}
    for root in roots:
        for folder, folders, names in os.walk(root, topdown=False):
            for name in names:
                if Path(folder, name) not in wanted:
                    os.unlink(os.path.join(folder, name))
            for name in folders:
                if Path(folder, name) not in tree.folders:
                    shutil.rmtree(os.path.join(folder, name))
    for place in sorted(tree.folders):
        if any(root in place.parents for root in roots):
            place.mkdir(exist_ok=True)
    for path in wanted:
        number = tree.names[path]
        _write_sparse(path, tree.contents[number])
        mtime_ns = tree.mtimes_ns[number]
        os.utime(path, ns=(mtime_ns, mtime_ns))


def _write_sparse(path: Path, content: SparseBytes) -> None:
    """Overwrite a file where it is: pages that are there already cost much less than new ones."""
    file = OS_FILES.open(path, create=True)
    file.resize(content.size_bytes)
    end = 0
    for start, data in content.runs():
        file.zero(end, start - end)
        file.write(data, start)
        end = start + len(data)
    file.zero(end, content.size_bytes - end)
    file.close()
