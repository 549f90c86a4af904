"""Write an undo part anew in compressed frames: the same log, in less room. See docs/formats/pressed.md.

    candidates   parts of points that others have followed, of a size that is worth it, not pressed yet
    sample       a few frames: what does not shrink by LEAST_GAIN stays as it is, and is not asked again
    write        points/<new id>.hru.partial; synced; read again from end to end, data against its checksums
    exchange     renamed, folder synced; one transaction puts it in the old one's place; the old file goes

Writing needs no lock, for parts never change, so no cycle waits for it. The exchange takes the VM's
exclusive lock for as long as a rename takes, as everything does that makes parts go. A cut leaves files that
the catalog names, and others that go when the store starts. Who has the old file open goes on with it.

Whether a part is pressed needs no column: a raw one is longer than what it covers, a pressed one is shorter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from array import array
from typing import TYPE_CHECKING, NamedTuple

from hvreplica import native
from hvreplica.errors import FormatError, HvReplicaError, Locked, LogError
from hvreplica.formats.hrl import FILE_TYPE_UNDO, HEADER_BYTES
from hvreplica.formats.pressed import (
    FRAMES_MAX,
    HEADER,
    HOLE_BYTES_MAX,
    LOG_BYTES_MAX,
    FrameKind,
    pack_table,
)
from hvreplica.hrl import HoleFinder, LogReader, verify_log
from hvreplica.store.frame_codec import FrameCodec
from hvreplica.store.part_files import PartFiles
from hvreplica.store.points_kept import kept_points, part_path, remove_parts
from hvreplica.store.policy import policy_of
from hvreplica.store.room import room
from hvreplica.units import KIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hvreplica.files import BlockFile
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import UndoRow

_LOG = logging.getLogger("hvreplica.serve")
PART_BYTES_MIN = 256 * KIB  # a smaller part hardly pays for the work, and is merged with others before long
FRAME_BYTES = 64 * KIB
LEAST_GAIN = 0.1
_SAMPLES = 16
_PIECES_BETWEEN_PAUSES = 128  # to look whether to give way costs a look at the catalog


class Pressed(NamedTuple):
    """What was done. freed_bytes: lengths of files."""

    parts: int = 0
    freed_bytes: int = 0


class _Piece(NamedTuple):
    """A range of a log that becomes a frame."""

    log_offset: int
    length: int
    is_hole: bool


def press_parts(home: VmHome, *, pause: Callable[[], None] = lambda: None) -> Pressed:
    """Press the parts of a VM that are old enough, one after another, the oldest points' first.

    pause: called between two pieces of work, below a second each; what it raises ends this, and nothing is
    left half done. Never raises for what can be left for the next time.
    """
    done = Pressed()
    for row in _candidates(home):
        pause()
        try:
            freed_bytes = press_part(home, row, pause=pause)
        except (FormatError, LogError) as error:
            _LOG.warning("VM %r: undo part %s stays as it is: %s", home.name, row.id, error)
            home.unpressed.add(row.id)
        except (HvReplicaError, OSError) as error:
            _LOG.info("VM %r: undo part %s stays as it is for now: %s", home.name, row.id, error)
        else:
            if freed_bytes:
                done = Pressed(done.parts + 1, done.freed_bytes + freed_bytes)
            else:
                home.unpressed.add(row.id)
    return done


def is_raw(row: UndoRow) -> bool:
    """Return whether a part is stored as the log that it is, not compressed."""
    return row.kind == "undo" and row.file_bytes > row.covered_bytes


def _candidates(home: VmHome) -> Iterator[UndoRow]:
    """Yield the parts that are to be pressed, the oldest points' first, as they were at the first one.

    The catalog is asked once for all of them. What becomes old enough meanwhile waits for the next time; one
    that goes meanwhile is found out in the exchange. Ends where the policy wants no more.
    """
    newest = policy_of(home).compress_after_points
    if newest is None:
        return
    points = kept_points(home)
    places = {point.id: place for place, point in enumerate(points[: max(len(points) - newest, 0)])}
    rows = [
        row
        for row in home.catalog.undo_rows(home.vm_id)
        if row.point_id in places
        and is_raw(row)
        and PART_BYTES_MIN <= row.file_bytes <= LOG_BYTES_MAX
        and row.id not in home.unpressed
    ]
    for row in sorted(rows, key=lambda row: places[row.point_id]):
        if policy_of(home).compress_after_points is None:
            return
        yield row


def press_part(
    home: VmHome,
    row: UndoRow,
    *,
    pause: Callable[[], None] = lambda: None,
    held_bytes_min: int = PART_BYTES_MIN,
) -> int:
    """Press one raw part; return by how many bytes its file became shorter, 0 where it is not worth it.

    held_bytes_min: what its file must take, holes left out.

    Durable on return. Raises: StoreFull; FormatError, LogError for a part that is damaged; FileNotFoundError,
    Locked where it is gone meanwhile. Nothing is lost then.
    """
    part_id = home.clock.guid()
    partial, path = home.paths.partial_undo(part_id), home.paths.undo(part_id)
    try:
        with LogReader(home.files, part_path(home, row), file_type=FILE_TYPE_UNDO) as reader:
            writer = _Writer(reader, part_id, pause)
            if writer.held_bytes < held_bytes_min or not writer.is_promising():
                return 0
            with room(home.files, partial, row.file_bytes):
                file = home.files.open(partial, create=True, exclusive=True)
                with contextlib.closing(file):
                    file_bytes = writer.write(file)
        # Shorter than what it covers: that is what tells it from a raw one.
        if file_bytes > (1 - LEAST_GAIN) * writer.held_bytes or file_bytes >= row.covered_bytes:
            home.files.unlink(partial)
            return 0
        # The old file goes: what the new one says is read before, by the way that readers go.
        verify_log(PartFiles(home.files), partial, data=True, file_type=FILE_TYPE_UNDO)
        pause()
        new = dataclasses.replace(row, id=part_id, file_bytes=file_bytes)
        _exchange(home, row, new, partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            home.files.unlink(partial)
        raise
    return row.file_bytes - file_bytes


def _exchange(home: VmHome, row: UndoRow, new: UndoRow, partial: Path, path: Path) -> None:
    catalog, vm_id = home.catalog, home.vm_id
    with home.exclusive(), room(home.files, path):
        home.files.replace(partial, path)
        home.files.sync_directory(home.paths.points)
        try:
            with catalog.transaction():
                known = [part for part in catalog.undo_rows(vm_id) if part.id == row.id]
                if not known:
                    raise Locked("the part is gone meanwhile", path=part_path(home, row), hint="try again")
                # It may have gone to another point, and know another change of the digest.
                found = dataclasses.replace(known[0], id=new.id, file_bytes=new.file_bytes)
                catalog.replace_undo(vm_id, known, found)
        except Locked:  # nothing changed; of any other error nobody knows whether a row names the file
            with contextlib.suppress(OSError):
                home.files.unlink(path)
            raise
        remove_parts(home, known)


class _Writer:
    """Writes one log in frames. held_bytes: what its own file takes, holes left out."""

    def __init__(self, reader: LogReader, part_id: uuid.UUID, pause: Callable[[], None]) -> None:
        self._reader = reader
        self._part_id = part_id
        self._pause = pause
        self._codec = FrameCodec()
        self._count = self._held_count = self.held_bytes = 0
        for piece in _pieces(reader):
            self._count += 1
            if not piece.is_hole:
                self._held_count += 1
                self.held_bytes += piece.length

    def is_promising(self) -> bool:
        """Try a few frames."""
        if self._count > FRAMES_MAX:
            return False
        every = -(-self._held_count // _SAMPLES)
        plain = stored = number = 0
        for piece in _pieces(self._reader):
            if piece.is_hole:
                continue
            if number % every == every // 2:
                plain += piece.length
                stored += min(len(self._codec.encode(self._read(piece))), piece.length)
            number += 1
        return stored <= (1 - LEAST_GAIN) * plain

    def write(self, file: BlockFile) -> int:
        """Write all frames and the table, then the header; durable on return. Return the file's length."""
        rows = array("I")
        position = HEADER.size
        for number, piece in enumerate(_pieces(self._reader)):
            if number % _PIECES_BETWEEN_PAUSES == 0:
                self._pause()
            if piece.is_hole:
                rows.extend((piece.length, 0, 0, FrameKind.HOLE))
                continue
            plain = self._read(piece)
            stored, kind = memoryview(self._codec.encode(plain)), FrameKind.ZSTD
            if stored.nbytes >= piece.length:
                stored, kind = memoryview(plain), FrameKind.PLAIN
            file.write(stored, position)
            rows.extend((piece.length, stored.nbytes, native.crc32c(stored), kind))
            position += stored.nbytes
        header, table_offset = pack_table(self._part_id, rows)
        file.write(rows, table_offset)
        file.write(header, 0)
        file.sync()
        return table_offset + memoryview(rows).nbytes

    def _read(self, piece: _Piece) -> bytearray:
        if piece.log_offset == 0:
            return bytearray(self._reader.header.sealed(unique_id=self._part_id).pack())
        buffer = bytearray(piece.length)
        self._reader.file.read_into(buffer, piece.log_offset)
        return buffer


def _pieces(reader: LogReader) -> Iterator[_Piece]:
    """Yield the pieces of a log, in order. None has metadata and data, so that opening reads no data."""
    yield _Piece(0, HEADER_BYTES, is_hole=False)
    block_bytes, position = reader.header.metadata_size, HEADER_BYTES
    finder = HoleFinder(reader.file)
    for block in reader.block_offsets:
        yield from _data_pieces(finder, position, block)
        position = block + block_bytes
        yield from _plain_pieces(block, position)


def _data_pieces(finder: HoleFinder, start: int, end: int) -> Iterator[_Piece]:
    position = start
    for hole_start, hole_bytes in [*finder.find(start, end).tolist(), (end, 0)]:
        yield from _plain_pieces(position, hole_start)
        position = hole_start + hole_bytes
        for at in range(hole_start, position, HOLE_BYTES_MAX):
            yield _Piece(at, min(HOLE_BYTES_MAX, position - at), is_hole=True)


def _plain_pieces(start: int, end: int) -> Iterator[_Piece]:
    for at in range(start, end, FRAME_BYTES):
        yield _Piece(at, min(FRAME_BYTES, end - at), is_hole=False)
