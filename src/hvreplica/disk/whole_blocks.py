"""A differencing disk every block of which is its own as a whole, or not at all.

The first write to a block that is the parent's copies the block. So no sector bitmap has to be asked, and a
native loop finds each byte with one look at the block map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk.block_reader import BlockReader
    from hvreplica.disk.disk import Direct, Disk


class WholeBlocks:
    """The part of disk.Disk that is needed to serve one. Writes come one at a time; owns `disk`."""

    def __init__(self, disk: Disk, blocks: BlockReader) -> None:
        """disk, blocks: the same, which is open for writing and has its parent."""
        self._disk = disk
        self._blocks = blocks
        self.path: Path = disk.path
        self.virtual_bytes = disk.virtual_bytes
        self.block_bytes = disk.block_bytes
        self.parent = disk.parent

    def read_into(self, buffer: Buffer, disk_offset: int) -> None:
        """See disk.Disk."""
        self._disk.read_into(buffer, disk_offset)

    def write(self, buffer: Buffer, disk_offset: int) -> None:
        """See disk.Disk; a block that was the parent's is written from end to end."""
        view = memoryview(buffer).cast("B")
        end = disk_offset + len(view)
        at = disk_offset
        while at < end:
            block = at // self.block_bytes
            start = block * self.block_bytes
            stop = min(start + self.block_bytes, self.virtual_bytes)
            part = view[at - disk_offset : min(stop, end) - disk_offset]
            if len(part) == stop - start or self._blocks.is_whole(block):
                self._disk.write(part, at)
            else:
                whole = bytearray(stop - start)
                self._disk.read_into(whole, start)
                whole[at - start : at - start + len(part)] = part
                self._disk.write(whole, start)
            at += len(part)

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        """See disk.Disk."""
        end = disk_offset + length
        at = disk_offset
        while at < end:
            start = at // self.block_bytes * self.block_bytes
            stop = min(start + self.block_bytes, self.virtual_bytes)
            if at == start and end >= stop:
                stop = end if end == self.virtual_bytes else end // self.block_bytes * self.block_bytes
                self._disk.write_zeroes(at, stop - at)
            elif self._blocks.is_whole(start // self.block_bytes):
                self._disk.write_zeroes(at, min(stop, end) - at)
            else:
                self.write(bytes(min(stop, end) - at), at)
            at = stop

    def extents(self, start: int, end: int) -> NDArray[np.int64]:
        """See disk.Disk."""
        return self._disk.extents(start, end)

    def direct(self, *, data_write_guid: uuid.UUID | None = None) -> Direct:
        """See disk.Disk."""
        return self._disk.direct(data_write_guid=data_write_guid)

    def changed(self) -> None:
        """See disk.Disk."""
        self._disk.changed()

    def flush(self) -> None:
        """See disk.Disk."""
        self._disk.flush()

    def publish(self) -> None:
        """See disk.Disk."""
        self._disk.publish()

    def close(self) -> None:
        """See disk.Disk."""
        self._disk.close()

    def abandon(self) -> None:
        """See disk.Disk."""
        self._disk.abandon()
