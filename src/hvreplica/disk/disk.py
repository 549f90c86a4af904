"""What every disk can do, whatever file holds it: guest bytes in, guest bytes out.

Durability: nothing is durable until flush() returned; after a power cut each sector written since then holds
its old or its new bytes. Threads: reads and writes of disjoint ranges may come from many threads at once,
also while one thread flushes; a flush covers the writes that returned before it was called. close() comes
last and alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.files import BlockFile


class DiskInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a disk is. Sizes in bytes; fields that a format does not have are 0, empty or None.

    file_bytes: the length of the file. allocated_bytes: guest bytes that have a place in it. log: "none",
    "clean", or "replayed" where the VHDX's own log was not empty when the file was opened.
    """

    path: str
    format: str
    type: str
    virtual_bytes: int
    file_bytes: int
    allocated_bytes: int
    logical_sector_bytes: int
    physical_sector_bytes: int
    block_bytes: int = 0
    creator: str = ""
    disk_id: str | None = None
    file_write_guid: str | None = None
    data_write_guid: str | None = None
    log: str = "none"


class MapEntry(msgspec.Struct, frozen=True):
    """A run of the guest's disk.

    State: "data" (may hold anything) or "zero". file_offset: None where absent.
    """

    offset: int
    length: int
    state: str
    file_offset: int | None


class Disk(Protocol):
    """One open disk. Extents are int64 or uint64 arrays of shape (n, 2) with rows (disk_offset, length)."""

    @property
    def path(self) -> Path:
        """The file's name."""
        ...

    @property
    def format(self) -> str:
        """The name of the format: "raw" or "vhdx"."""
        ...

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        ...

    @property
    def virtual_bytes(self) -> int:
        """The guest's size of the disk."""
        ...

    @property
    def logical_sector_bytes(self) -> int:
        """The unit in which the guest addresses it."""
        ...

    @property
    def physical_sector_bytes(self) -> int:
        """The unit which the guest is told to prefer."""
        ...

    @property
    def block_bytes(self) -> int:
        """The unit of allocation; 0 where there is none."""
        ...

    @property
    def data_write_guid(self) -> uuid.UUID | None:
        """The identity of the guest's data.

        Changes before the first change of a session. None where unknown.
        """
        ...

    def read_into(self, buffer: Buffer, disk_offset: int) -> None:
        """Fill `buffer` from `disk_offset`. Raises: FieldOutOfRange beyond the end of the disk."""
        ...

    def read_extents(self, extents: NDArray[Any], out: Buffer) -> None:
        """Fill `out` with the extents' bytes, one after the other. Raises: FieldOutOfRange beyond the end."""
        ...

    def write(self, buffer: Buffer, disk_offset: int) -> None:
        """Write all of `buffer` at `disk_offset`. Raises: FieldOutOfRange beyond the end."""
        ...

    def write_extents(self, extents: NDArray[Any], data: Buffer) -> None:
        """Write `data`, the extents' bytes one after the other; extents must be disjoint.

        Zeros for what is not allocated allocate nothing. Raises: FieldOutOfRange beyond the end.
        """
        ...

    def copy_extents(
        self, source_file: BlockFile, source_offsets: NDArray[Any], extents: NDArray[Any]
    ) -> None:
        """Write to each extent what stands in `source_file` at its source offset, in the given order.

        Memory is bounded. Raises: FieldOutOfRange beyond the end; Truncated if the source ends before.
        """
        ...

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        """Make a range read as zeros, giving its space back where the format can; cheap for huge ranges."""
        ...

    def flush(self) -> None:
        """Make all earlier writes durable. After a failure only close() works; open the disk again."""
        ...

    def extents(self, start: int, end: int) -> NDArray[Any]:
        """Return the ranges between `start` and `end` that may hold data, int64 (n, 2), sorted and disjoint.

        Everything else reads as zeros. Memory grows with what lies between: ask in windows (see
        data_windows).
        """
        ...

    def info(self) -> DiskInfo:
        """Return what the disk is."""
        ...

    def map(self) -> Iterator[MapEntry]:
        """Yield runs that cover the whole disk, in order."""
        ...

    def close(self) -> None:
        """Flush, leave the file clean for other programs, and close it. May be called twice."""
        ...

    def abandon(self) -> None:
        """Close without flushing, as if the process had ended here. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
