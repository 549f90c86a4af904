"""One disk of a recovery point as its files are at one moment: an index of undo parts over a disk's file.

The files of parts never change, and stay readable here after they are removed. The disk's file changes with
each newer point that is applied. Before its first byte does, what it will overwrite is a part in the catalog,
and then the VM's apply counter moves. So a read of the disk's file counts where the counter has not moved
when it is over; where it has, a new view is made, whose parts have what was there.

Views are immutable and shared by threads; the files of one are closed when nobody holds it any more.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk import open_disk
from hvreplica.errors import FormatError, HvReplicaError, Locked, LogError, StoreError, kept
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.hrl import LogReader
from hvreplica.native.live import ELSEWHERE, Under
from hvreplica.native.tables import BlockMap
from hvreplica.store.open_files import expect_open_files
from hvreplica.store.part_files import PartFiles, PressedFile, open_part
from hvreplica.store.point_index import DISK, NO_ROWS, ZEROS, PointIndex, rows_of

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import BlockFile, FileSystem
    from hvreplica.store.counter import Counter

_LOOKS_MAX = 100
_PAUSE_S = 0.02  # between two looks at a disk that is being changed: a step of its writer takes less


class Watch:
    """A counter that is looked at; closed with the last who does."""

    def __init__(self, counter: Counter) -> None:
        self.memory = counter.memory
        self.value = counter.value
        weakref.finalize(self, _close, counter)


@dataclass(frozen=True, slots=True)
class PartFile:
    """An undo part in the walk. is_whole: a VHDX, and nothing behind it in the walk is looked at."""

    id: uuid.UUID
    path: Path
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class PointSource:
    """How to find a disk of a point. walk: returns its parts as the catalog has them now, in order.

    on_damage: told of a part that turned out to be damaged as it was read.
    """

    files: FileSystem
    clock: Clock
    disk_path: Path
    virtual_bytes: int
    walk: Callable[[], Sequence[PartFile]]
    watch: Watch | None
    on_damage: Callable[[uuid.UUID, FormatError], None] = lambda _part_id, _error: None


class _Part:
    """An open part; its file is closed with the last view that has it."""

    def __init__(self, files: PartFiles, part: PartFile) -> None:
        reader = LogReader(files, part.path, file_type=FILE_TYPE_UNDO)
        self.id = part.id
        self.file: BlockFile = reader.file
        weakref.finalize(self, reader.close)
        self.rows = rows_of(list(reader.entries()))


def part_rows(files: FileSystem, path: Path) -> NDArray[np.int64]:
    """Return what an undo part covers, as rows_of() does. Raises: FileNotFoundError, FormatError."""
    with open_part(files, path) as reader:
        return rows_of(list(reader.entries()))


class _Base:
    """The disk that the walk ends in; closed with the last view that has it."""

    def __init__(self, files: FileSystem, path: Path, clock: Clock) -> None:
        self.disk: Disk = open_disk(files, path, format="vhdx", clock=clock)
        weakref.finalize(self, self.disk.abandon)
        direct = self.disk.direct()
        self.file = direct.file
        block_map = direct.block_map
        if block_map is not None:  # a copy: a large table is mapped, and the file may become shorter
            entries = np.array(block_map.entries)
            block_map = BlockMap(entries, block_map.block_bytes, block_map.chunk_ratio, block_map.offset_mask)
        self.block_map = block_map


class PointView:
    """See the module. applied: the counter before the first of its files was looked at."""

    def __init__(
        self, source: PointSource, walk: Sequence[PartFile], applied: int, before: PointView | None
    ) -> None:
        """Open what `walk` names; of `before` everything is taken that still holds."""
        undo = [part for part in walk if not part.is_whole]
        whole = next((part for part in walk if part.is_whole), None)
        self.applied = applied
        self._watch = None if whole is not None else source.watch
        self.ids = [part.id for part in undo]
        self.parts: list[_Part] = []
        self.core = PointIndex.empty(source.virtual_bytes)
        if before is not None and before.ids == self.ids[: len(before.ids)]:
            self.parts, self.core = list(before.parts), before.core
        expect_open_files()
        self._files: PartFiles = PartFiles(source.files) if before is None else before._files  # noqa: SLF001 - one memory
        self._on_damage = source.on_damage
        added = [_Part(self._files, part) for part in undo[len(self.parts) :]]
        numbered = [(len(self.parts) + place, part.rows) for place, part in enumerate(added)]
        if added:
            self.core = self.core.under(numbered)
        self.parts += added
        for part in added:
            part.rows = NO_ROWS  # they are in the index
        self._base = _Base(source.files, source.disk_path if whole is None else whole.path, source.clock)
        self.index = _with_tail(self.core, self._base.disk.virtual_bytes)
        self._tiles = self.index.tiles()

    def is_stale(self) -> bool:
        """Return whether somebody has begun to change the disk that the walk ends in."""
        return self._watch is not None and self._watch.value() != self.applied

    def read(self, spans: NDArray[np.int64], out: Buffer) -> bool:
        """Fill `out` with `spans`, rows (disk_offset, length, offset in `out`) within the disk.

        Returns False where the disk's file was needed and is being changed: `out` is undefined then.
        """
        pieces, numbers = self._tiles.split(spans)
        needs_disk = bool((numbers == DISK).any())
        if needs_disk and self.is_stale():
            return False
        for number in np.unique(numbers).tolist():
            rows = pieces[numbers == number]
            if number == DISK:
                self._base.disk.read_spans(rows[:, :3], out)
            elif number == ZEROS:
                wanted = np.column_stack((np.full(len(rows), -1, np.int64), rows[:, 1:3]))
                native.read_pieces(self._base.file, wanted, out)
            else:
                self._read_part(self.parts[number], rows[:, [3, 1, 2]], out)
        return not (needs_disk and self.is_stale())

    def _read_part(self, part: _Part, pieces: NDArray[np.int64], out: Buffer) -> None:
        try:
            native.read_pieces(part.file, pieces, out)
        except FormatError as error:  # of a pressed part: others are not checked as they are read
            self._on_damage(part.id, error)
            raise

    def extents(self, start: int, end: int) -> NDArray[np.int64] | None:
        """Return what may hold data between `start` and `end`; None where the disk is being changed."""
        if self.is_stale():
            return None
        found = self._tiles.held(self._base.disk.extents(start, end), start, end)
        return None if self.is_stale() else found

    def under(self) -> Under:
        """Return the view for a native loop, which keeps it alive. Raises: TypeError without descriptors."""
        descriptors = [
            ELSEWHERE if isinstance(part.file, PressedFile) else _descriptor(part.file) for part in self.parts
        ]
        index = self.index
        table = np.array([*descriptors, ZEROS], np.int32)  # ZEROS is -1, and so names the last
        watch = self._watch
        return Under(
            index.starts.astype(np.uint64),
            index.ends.astype(np.uint64),
            index.file_offsets.astype(np.uint64),
            table[index.files],
            descriptor=_descriptor(self._base.file),
            block_map=self._base.block_map,
            counter=None if watch is None else watch.memory,
            applied=self.applied,
            kept=self,
        )


def make_view(source: PointSource, before: PointView | None = None) -> PointView:
    """Return the view of now. before: an older one of the same source.

    Raises: FormatError, StoreError, OSError for what is damaged; Locked where the disk changes too fast.
    """
    failure: HvReplicaError | OSError | None = None
    for _ in range(_LOOKS_MAX):
        applied = 0 if source.watch is None else source.watch.value()
        try:
            view = PointView(source, source.walk(), applied, before)
        except (HvReplicaError, FileNotFoundError) as error:
            # A part may be gone since the catalog named it, and a table half written.
            failure = kept(error)
        else:
            failure = None
            if not view.is_stale():
                return view
        threading.Event().wait(_PAUSE_S)
    if failure is not None:
        raise _told(failure, source)
    raise Locked("the disk is changed all the time", path=source.disk_path, hint="try again")


def _told(failure: HvReplicaError | OSError, source: PointSource) -> HvReplicaError | OSError:
    """Return the error of a file that a point is read from, with what to do about that one."""
    path = failure.path if isinstance(failure, HvReplicaError) else failure.filename
    is_part = path is not None and not os.fspath(path).startswith(os.fspath(source.disk_path))
    hint = "`hvreplica store verify` says which points need it, and marks them; newer ones do not"
    if not is_part:
        hint = "`hvreplica store status` says what is wrong; `hvreplica replicate --resync` sends it again"
    if isinstance(failure, FileNotFoundError):
        return StoreError("a file that the point is read from is missing", path=path, hint=hint)
    if isinstance(failure, (FormatError, LogError)):
        failure.hint = hint
    return failure


def _with_tail(core: PointIndex, base_bytes: int) -> PointIndex:
    """Return the index with zeros where the disk is longer than what the walk ends in."""
    if base_bytes >= core.virtual_bytes:
        return core
    return core.under([(0, np.array([[base_bytes, core.virtual_bytes - base_bytes, -1]], np.int64))])


def _close(counter: Counter) -> None:
    with contextlib.suppress(BufferError):  # a loop in C still has the address; the mapping goes with it
        counter.close()


def _descriptor(file: BlockFile) -> int:
    descriptor = file.fileno()
    if descriptor is None:
        message = f"{file.path} cannot be served: it has no descriptor"
        raise TypeError(message)
    return descriptor
