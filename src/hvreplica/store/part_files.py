"""Open undo parts, pressed or not: a pressed one reads as the log that it holds, byte for byte.

A pressed part (docs/formats/pressed.md) has the name that any part has; what it is stands in its first bytes.
Frames are decompressed as they are read, each checked before, and the last ones read are remembered, up to
MEMORY_BYTES in all files that one PartFiles has opened.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import count
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from hvreplica import native
from hvreplica.errors import ChecksumMismatch, FormatError, HvReplicaError, Truncated
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.formats.pressed import HEADER, SPEC, FrameKind, is_pressed, unpack_header, unpack_table
from hvreplica.hrl import LogReader
from hvreplica.store.frame_codec import FrameCodec

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.files import BlockFile, FileSystem

MEMORY_BYTES = 8 << 20


class FrameMemory:
    """The frames that were read last. Any thread."""

    def __init__(self, bytes_max: int = MEMORY_BYTES) -> None:
        self._bytes_max = bytes_max
        self._held: OrderedDict[tuple[int, int], bytearray] = OrderedDict()
        self._held_bytes = 0
        self._numbers = count()
        self._codecs: list[FrameCodec] = []  # those that no thread uses now; lists take many threads
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """What the remembered frames take."""
        return self._held_bytes

    def number(self) -> int:
        """Return a number for a file whose frames are remembered."""
        return next(self._numbers)

    def find(self, key: tuple[int, int]) -> bytearray | None:
        """Return a frame that is remembered."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def add(self, key: tuple[int, int], frame: bytearray) -> None:
        """Remember a frame, which never changes, and forget those that were not read for longest."""
        with self._lock:
            if key in self._held:
                return
            self._held[key] = frame
            self._held_bytes += len(frame)
            while self._held_bytes > self._bytes_max:
                self._held_bytes -= len(self._held.popitem(last=False)[1])

    def decode(self, stored: bytearray, out: bytearray) -> None:
        """Decompress a frame, which must fill `out`. Raises: FormatError."""
        try:
            codec = self._codecs.pop()
        except IndexError:
            codec = FrameCodec()
        codec.decode(stored, out)
        self._codecs.append(codec)


class PressedFile:
    """The log in a pressed part. See files.BlockFile; it cannot be written, and has no descriptor."""

    writable = False

    def __init__(self, file: BlockFile, memory: FrameMemory) -> None:
        """Take over `file`. Raises: FormatError."""
        self.path = file.path
        self._file = file
        self._memory = memory
        self._number = memory.number()
        try:
            head = file.read(0, min(HEADER.size, file.size()))
            header = unpack_header(head, file_bytes=file.size())
            table = bytearray(header.table_bytes)
            file.read_into(table, header.table_offset)
            self._table = unpack_table(header, table)
        except HvReplicaError as error:
            error.at(file.path)
            raise

    @property
    def part_id(self) -> uuid.UUID:
        """What its header says that it is."""
        return self._table.part_id

    @property
    def stored_bytes(self) -> int:
        """The length of the file itself."""
        return self._file.size()

    def damaged(self) -> NDArray[np.int64]:
        """Return the frames whose stored bytes are not what they should be, as rows (start, end) in the log.

        Reads all of the file.
        """
        table = self._table
        bad = [
            number
            for number in np.flatnonzero(table.kinds != FrameKind.HOLE).tolist()
            if native.crc32c(self._stored(number)) != int(table.checksums[number])
        ]
        return np.column_stack((table.starts[bad], table.starts[1:][bad]))

    def fileno(self) -> int | None:
        return None

    def size(self) -> int:
        return self._table.log_bytes

    def read(self, file_offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(buffer, file_offset)
        return bytes(buffer)

    def read_into(self, buffer: Buffer, file_offset: int) -> None:
        view = memoryview(buffer).cast("B")
        end = file_offset + len(view)
        if file_offset < 0 or end > self.size():
            raise Truncated(
                "the log ends inside what was to be read",
                path=self.path,
                offset=file_offset,
                expected=f"{len(view)} bytes",
                actual=f"{max(self.size() - file_offset, 0)} bytes",
            )
        starts = self._table.starts
        number = int(np.searchsorted(starts, file_offset, "right")) - 1
        position = file_offset
        while position < end:
            start, stop = int(starts[number]), int(starts[number + 1])
            length = min(stop, end) - position
            at = position - file_offset
            if self._table.kinds[number] == FrameKind.HOLE:
                view[at : at + length] = bytes(length)
            else:
                frame = self._frame(number, stop - start)
                view[at : at + length] = memoryview(frame)[position - start : position - start + length]
            position += length
            number += 1

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        table = self._table
        end = min(end, self.size())
        first = max(int(np.searchsorted(table.starts, start, "right")) - 1, 0)
        for number in range(first, len(table.kinds)):
            low, high = max(int(table.starts[number]), start), min(int(table.starts[number + 1]), end)
            if low >= end:
                return
            if table.kinds[number] != FrameKind.HOLE and low < high:
                yield low, high - low

    def write(self, buffer: Buffer, file_offset: int) -> None:  # noqa: ARG002 - see BlockFile
        self._refuse()

    def resize(self, size_bytes: int) -> None:  # noqa: ARG002 - see BlockFile
        self._refuse()

    def zero(self, file_offset: int, length: int) -> None:  # noqa: ARG002 - see BlockFile
        self._refuse()

    def sync(self) -> None:
        """Do nothing: nothing was written."""

    def close(self) -> None:
        self._file.close()

    def _frame(self, number: int, length: int) -> bytearray:
        """Return what a frame holds, which nobody may change."""
        key = (self._number, number)
        frame = self._memory.find(key)
        if frame is not None:
            return frame
        table = self._table
        place = int(table.places[number])
        stored = self._stored(number)
        computed = native.crc32c(stored)
        if computed != int(table.checksums[number]):
            raise ChecksumMismatch(
                f"frame {number} of a pressed undo part is damaged",
                path=self.path,
                offset=place,
                field="checksum",
                expected=f"{int(table.checksums[number]):#010x}",
                actual=f"{computed:#010x}",
                spec=SPEC,
            )
        frame = stored
        if table.kinds[number] == FrameKind.ZSTD:
            frame = bytearray(length)
            try:
                self._memory.decode(stored, frame)
            except FormatError as error:
                error.at(self.path)
                error.offset = place
                raise
        self._memory.add(key, frame)
        return frame

    def _stored(self, number: int) -> bytearray:
        place = int(self._table.places[number])
        stored = bytearray(int(self._table.places[number + 1]) - place)
        self._file.read_into(stored, place)
        return stored

    def _refuse(self) -> NoReturn:
        raise PermissionError(1, "a pressed undo part is for reading only", str(self.path))


class PartFiles:
    """Opens undo parts. Any thread; files that it opened may outlive it."""

    def __init__(self, files: FileSystem) -> None:
        self._files = files
        self._memory = FrameMemory()

    def open(self, path: Path) -> BlockFile:
        """Return the file at `path`, or, where that is a pressed part, the log in it.

        Raises: FileNotFoundError; FormatError where header or table of a pressed part are damaged.
        """
        file = self._files.open(path)
        try:
            if file.size() < HEADER.size or not is_pressed(file.read(0, HEADER.size)):
                return file
            return PressedFile(file, self._memory)
        except BaseException:
            file.close()
            raise


def stored_bytes(reader: LogReader) -> int:
    """Return the length of an open part's file, as its row has it."""
    return reader.file.stored_bytes if isinstance(reader.file, PressedFile) else reader.file.size()


def open_part(files: FileSystem, path: Path) -> LogReader:
    """Open an undo part as the log that it is. Raises: FileNotFoundError, FormatError, LogError.

    Its frames have a memory of their own: many parts that are open together share one PartFiles.
    """
    return LogReader(PartFiles(files), path, file_type=FILE_TYPE_UNDO)
