"""What every disk can do, whatever file holds it: guest bytes in, guest bytes out.

Durability: nothing is durable until flush() returned; after a power cut each sector written since then holds
its old or its new bytes. Threads: reads and writes of disjoint ranges may come from many threads at once,
also while one thread flushes; a flush covers the writes that returned before it was called. close() comes
last and alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import msgspec

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.files import BlockFile
    from hvreplica.native import BlockMap


class DiskInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a disk is. Sizes in bytes; fields that a format does not have are 0, empty or None.

    file_bytes: the length of the file. allocated_bytes: guest bytes that have a place in it. log: "none",
    "clean", or "replayed" where the VHDX's own log was not empty when the file was opened. parent: the file
    that a differencing disk was opened with, or the first name that it gives, if it was opened without.
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
    parent: str | None = None


class MapEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A run of the guest's disk, in the terms of `qemu-img map --output=json`.

    start, length: guest bytes. depth: 0 where the file itself says what is there, 1 its parent, and so on.
    present: whether any file of the chain says anything. zero: it reads as zeros. data: it has bytes to be
    read. offset, filename: where they, or the hole that stands for zeros, are; absent where nothing is
    stored.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None = None
    filename: str | None = None


class Stretch(NamedTuple):
    """What one file, without its parents, says of a range: start and length in guest bytes.

    kind: "data"; "hole", stored and known to be zeros; "zero", said to be zeros and not stored; "absent", not
    said and so zeros; "parent", not said here, the parent knows. file_offset: of data and holes.
    """

    start: int
    length: int
    kind: Literal["data", "hole", "zero", "absent", "parent"]
    file_offset: int | None


class Direct(NamedTuple):
    """What a native loop needs to reach the payload of a disk without it.

    block_map: None where file offset is disk offset. has_parent: whether a block in state 0 is the parent's.
    """

    file: BlockFile
    block_map: BlockMap | None
    has_parent: bool


class ParentReference(Protocol):
    """What a differencing disk says of its parent."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names to try, in this order, as they stand in the file."""
        ...

    def verify(self, parent: Disk) -> None:
        """Make sure that `parent` is the one. Raises: ParentMismatch."""
        ...


class Disk(Protocol):
    """One open disk. Extents are int64 or uint64 arrays of shape (n, 2) with rows (disk_offset, length)."""

    @property
    def path(self) -> Path:
        """The file's name."""
        ...

    @property
    def format(self) -> str:
        """The name of the format: "raw", "vhd" or "vhdx"."""
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

    @property
    def virtual_disk_id(self) -> uuid.UUID | None:
        """The identity that a guest sees, which a child shares with its parent. None where there is none."""
        ...

    @property
    def parent(self) -> Disk | None:
        """The disk below a differencing disk, open for reading and owned by this one."""
        ...

    @property
    def parent_reference(self) -> ParentReference | None:
        """What a differencing disk says of its parent; None for any other disk."""
        ...

    def attach(self, parent: Disk) -> None:
        """Give a differencing disk its parent, which it then owns. Once, before the first read."""
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

    def direct(self, *, data_write_guid: uuid.UUID | None = None) -> Direct:
        """Return how to reach the payload, every entry of the block map checked.

        A writable disk begins its writing session, so that its identity stays what it is until close();
        data_write_guid: the one it takes, durably, where the format has one; a new one by default. Only
        blocks that are fully present are written past the disk, and changed() is called after each such write
        and before the next flush().
        """
        ...

    def changed(self) -> None:
        """Say that payload was written past the disk, see direct()."""
        ...

    def flush(self) -> None:
        """Make all earlier writes durable. After a failure only close() works; open the disk again."""
        ...

    def publish(self) -> None:
        """Make all that earlier writes did show to whoever opens the file next, also if this process dies
        now.

        Nothing more is durable for that, and it does nothing where the file says it already.
        """
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

    def read_spans(self, spans: NDArray[np.int64], out: Buffer) -> NDArray[np.int64]:
        """Fill `out` with what this file, without its parents, knows of `spans`; return the spans it does
        not.

        spans: int64 (n, 3) of (disk_offset, length, offset in `out`); beyond the end of the disk are zeros.
        """
        ...

    def stretches(self, start: int, end: int) -> Iterator[Stretch]:
        """Yield what this file alone says of `start` to `end`, within the disk, in order and without gaps."""
        ...

    def close(self) -> None:
        """Flush, leave the file clean for other programs, and close it. May be called twice."""
        ...

    def abandon(self) -> None:
        """Close without flushing, as if the process had ended here. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
