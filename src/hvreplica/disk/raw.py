"""A disk whose file holds the guest's bytes as they are: a raw image or a block device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.disk.disk import Direct, DiskInfo, Stretch
from hvreplica.disk.extents import NO_EXTENTS, beyond_end, checked_rows, clipped, data_windows, widened

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk.disk import Disk
    from hvreplica.files import BlockFile

SECTOR_BYTES = 512


class RawDisk:
    """See disk.Disk. The file's length is the disk's size and never changes. Owns `file`."""

    format = "raw"
    block_bytes = 0
    logical_sector_bytes = SECTOR_BYTES
    physical_sector_bytes = 4096
    data_write_guid = None
    virtual_disk_id = None
    parent = None
    parent_reference = None

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self.path: Path = file.path
        self.writable = file.writable
        self.virtual_bytes = file.size()
        self._closed = False

    @property
    def file(self) -> BlockFile:
        """The file, which belongs to the disk."""
        return self._file

    def read_into(self, buffer: Buffer, disk_offset: int) -> None:
        length = memoryview(buffer).nbytes
        self._check_range(disk_offset, length)
        self._file.read_into(buffer, disk_offset)

    def read_extents(self, extents: NDArray[Any], out: Buffer) -> None:
        native.read_extents(self._file, None, self._rows(extents), out)

    def read_spans(self, spans: NDArray[np.int64], out: Buffer) -> NDArray[np.int64]:
        inside, behind = clipped(spans, self.virtual_bytes)
        zeros = np.column_stack((np.full(len(behind), -1, np.int64), behind[:, 1:]))
        native.read_pieces(self._file, np.concatenate((inside, zeros)), out)
        return spans[:0]

    def attach(self, parent: Disk) -> None:
        message = f"{self.path} is a raw disk, which cannot have the parent {parent.path}"
        raise TypeError(message)

    def write(self, buffer: Buffer, disk_offset: int) -> None:
        self._check_range(disk_offset, memoryview(buffer).nbytes)
        self._file.write(buffer, disk_offset)

    def write_extents(self, extents: NDArray[Any], data: Buffer) -> None:
        native.write_extents(self._file, None, self._rows(extents), data)

    def copy_extents(
        self, source_file: BlockFile, source_offsets: NDArray[Any], extents: NDArray[Any]
    ) -> None:
        native.copy_extents(source_file, source_offsets, self._file, None, self._rows(extents))

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        self._check_range(disk_offset, length)
        self._file.zero(disk_offset, length)

    def direct(self, *, data_write_guid: uuid.UUID | None = None) -> Direct:  # noqa: ARG002 - it has none
        return Direct(self._file, None, has_parent=False)

    def changed(self) -> None:
        """Do nothing: a flush always syncs."""

    def flush(self) -> None:
        if self.writable:
            self._file.sync()

    def publish(self) -> None:
        """Do nothing: the file is all there is."""

    def extents(self, start: int, end: int) -> NDArray[np.int64]:
        end = min(end, self.virtual_bytes)
        rows = np.array(list(self._file.data_extents(start, end)), np.int64).reshape(-1, 2)
        return widened(rows, start=start, end=end) if len(rows) else NO_EXTENTS

    def info(self) -> DiskInfo:
        allocated = sum(int(rows[:, 1].sum()) for _, _, rows in data_windows(self, 0, self.virtual_bytes))
        return DiskInfo(
            path=str(self.path),
            format=self.format,
            type="raw",
            virtual_bytes=self.virtual_bytes,
            file_bytes=self.virtual_bytes,
            allocated_bytes=allocated,
            logical_sector_bytes=self.logical_sector_bytes,
            physical_sector_bytes=self.physical_sector_bytes,
        )

    def stretches(self, start: int, end: int) -> Iterator[Stretch]:
        position = start
        for _, _, rows in data_windows(self, start, end):
            for offset, length in rows.tolist():
                if offset > position:
                    yield Stretch(position, offset - position, "hole", position)
                yield Stretch(offset, length, "data", offset)
                position = offset + length
        if position < end:
            yield Stretch(position, end - position, "hole", position)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self._file.close()

    def abandon(self) -> None:
        self._closed = True
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _rows(self, extents: NDArray[Any]) -> NDArray[np.int64]:
        return checked_rows(extents, virtual_bytes=self.virtual_bytes, path=self.path)

    def _check_range(self, disk_offset: int, length: int) -> None:
        if disk_offset < 0 or length < 0 or disk_offset + length > self.virtual_bytes:
            raise beyond_end(disk_offset, length, virtual_bytes=self.virtual_bytes, path=self.path)
