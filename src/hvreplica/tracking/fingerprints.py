"""The fingerprint table of one disk in a file: what the replica is known to hold.

Guarantees: a block whose fingerprint equals the disk's is the same at the replica, if the header names the
point that the replica is on. While the table is filled or updated the header may lag; its owner
(replication/) keeps a record that makes it finish the update before it relies on the table again.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.errors import FormatError, Truncated
from hvreplica.formats.fingerprint import (
    FINGERPRINT_BYTES,
    HEADER_BYTES,
    NIL,
    FingerprintHeader,
    pack_header,
    unpack_header,
)

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    import numpy.typing as npt

    from hvreplica.files import BlockFile, FileSystem

BLOCK_BYTES = 4096  # a guest's own write unit: a coarser grain ships up to its whole size for one 4 KiB write


class FingerprintTable:
    """Fingerprints by block number. Reads and writes of disjoint ranges may come from many threads."""

    def __init__(self, file: BlockFile, header: FingerprintHeader) -> None:
        self._file = file
        self.header = header

    @classmethod
    def create(
        cls, files: FileSystem, path: Path, *, disk_index: int, virtual_bytes: int
    ) -> FingerprintTable:
        """Make a table that says "all zero", replacing an old one.

        Durable after sync() and the folder's sync.
        """
        files.unlink(path)
        header = FingerprintHeader(BLOCK_BYTES, disk_index, virtual_bytes, NIL)
        file = files.open(path, create=True, exclusive=True)
        file.resize(HEADER_BYTES + header.block_count * FINGERPRINT_BYTES)
        file.write(pack_header(header), 0)
        return cls(file, header)

    @classmethod
    def open(cls, files: FileSystem, path: Path) -> FingerprintTable:
        """Open an existing table for reading and writing; what a cut resize() left behind its end is ignored.

        Raises: FormatError, FileNotFoundError.
        """
        file = files.open(path, writable=True)
        try:
            header = unpack_header(file.read(0, min(HEADER_BYTES, file.size())))
            expected = HEADER_BYTES + header.block_count * FINGERPRINT_BYTES
            if file.size() < expected:
                raise Truncated(
                    "the fingerprint table is too short",
                    path=path,
                    expected=f"at least {expected}",
                    actual=file.size(),
                    hint="run replicate with --resync: it rebuilds the table from the replica",
                )
        except FormatError as error:
            file.close()
            raise error.at(path) from None
        return cls(file, header)

    @property
    def block_bytes(self) -> int:
        """The disk's bytes behind one fingerprint."""
        return self.header.block_bytes

    def read(self, first_block: int, block_count: int) -> npt.NDArray[np.uint8]:
        """Return fingerprints, shape (block_count, 16)."""
        rows = np.empty((block_count, FINGERPRINT_BYTES), np.uint8)
        self._file.read_into(rows, HEADER_BYTES + first_block * FINGERPRINT_BYTES)
        return rows

    def write(self, first_block: int, rows: npt.NDArray[np.uint8]) -> None:
        """Store fingerprints, shape (n, 16), from `first_block` on. Not durable until sync()."""
        self._file.write(np.ascontiguousarray(rows), HEADER_BYTES + first_block * FINGERPRINT_BYTES)

    def clear(self, first_block: int, block_count: int) -> None:
        """Say "all zero" of a range of blocks, cheaply however large."""
        self._file.zero(HEADER_BYTES + first_block * FINGERPRINT_BYTES, block_count * FINGERPRINT_BYTES)

    def extents(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return the guest ranges (offset, length) within [start, end) that may hold data at the replica."""
        first = HEADER_BYTES + start // self.block_bytes * FINGERPRINT_BYTES
        last = HEADER_BYTES + -(-end // self.block_bytes) * FINGERPRINT_BYTES
        scale = self.block_bytes // FINGERPRINT_BYTES
        rows = [
            (max((offset - HEADER_BYTES) * scale, start), min((offset + length - HEADER_BYTES) * scale, end))
            for offset, length in self._file.data_extents(first, last)
        ]
        table = np.array(rows, np.int64).reshape(-1, 2)
        table[:, 1] -= table[:, 0]
        return table

    def mark(self, point_id: uuid.UUID) -> None:
        """Say which point the table describes;

        everything written before becomes durable first, then the mark.
        """
        self._file.sync()
        self.header = dataclasses.replace(self.header, point_id=point_id)
        self._file.write(pack_header(self.header), 0)
        self._file.sync()

    def resize(self, virtual_bytes: int) -> None:
        """Follow the disk to another size, durably; what it grows by counts as all zero.

        A last block that was or becomes short keeps its fingerprint and counts as changed, unless it is zero.
        Cut anywhere, the table has its old size or the new one; call it again.
        """
        before, after = self.header, dataclasses.replace(self.header, virtual_bytes=virtual_bytes)
        if after == before:
            return
        # Exactly as long as the header says: a resize that was cut left fingerprints behind the end.
        self._file.resize(HEADER_BYTES + before.block_count * FINGERPRINT_BYTES)
        if after.block_count > before.block_count:
            self._file.resize(HEADER_BYTES + after.block_count * FINGERPRINT_BYTES)
        self._file.sync()
        self._file.write(pack_header(after), 0)
        self._file.sync()
        self.header = after
        if after.block_count < before.block_count:
            self._file.resize(HEADER_BYTES + after.block_count * FINGERPRINT_BYTES)

    def sync(self) -> None:
        """Make all that was written durable."""
        self._file.sync()

    def close(self) -> None:
        """Close without syncing."""
        self._file.close()
