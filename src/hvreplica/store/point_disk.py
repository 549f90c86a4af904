"""A disk as it was at a recovery point, for reading, while newer points are applied to the replica.

Nothing is copied first: reads go through a view of the undo parts and the disk's file, and a view that has
become stale in the middle of a read is made anew, and the read repeated. See point_view.py.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from hvreplica.disk.disk import Direct, DiskInfo, Stretch
from hvreplica.disk.extents import checked_rows, clipped, data_windows, spans_of
from hvreplica.errors import HvReplicaError, kept
from hvreplica.store.point_view import make_view

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk.disk import Disk, ParentReference
    from hvreplica.files import BlockFile
    from hvreplica.native.live import Under
    from hvreplica.store.point_view import PointSource, PointView
    from hvreplica.store.records import DiskSpec


class PointDisk:
    """See disk.Disk. Any thread may read. Its DataWriteGuid is the point's id: a point never changes."""

    format = "vhdx"  # what it is exported as, and what a child of it is
    writable = False
    parent: Disk | None = None
    parent_reference: ParentReference | None = None

    def __init__(
        self,
        source: PointSource,
        path: Path,
        *,
        point_id: uuid.UUID,
        spec: DiskSpec,
    ) -> None:
        """Look at the point's files. path: what to call the disk. spec: of the disk, but for its size.

        Raises: as make_view().
        """
        self.path = path
        self.virtual_bytes = source.virtual_bytes
        self.logical_sector_bytes = spec.logical_sector_bytes
        self.physical_sector_bytes = spec.physical_sector_bytes
        self.block_bytes = spec.block_bytes
        self.data_write_guid: uuid.UUID | None = point_id
        self.virtual_disk_id = spec.virtual_disk_id
        self._source: PointSource | None = source
        self._renewing = threading.Lock()
        self._newest: PointView | None = make_view(source)

    # ---- the view

    @property
    def view(self) -> PointView:
        """The newest view that was made."""
        if self._newest is None:
            message = f"{self.path} is closed"
            raise ValueError(message)
        return self._newest

    def renewed(self, stale: PointView) -> PointView:
        """Return a view that is newer than `stale`. Raises: as make_view()."""
        with self._renewing:
            view = self.view
            if self._source is not None and (view is stale or view.is_stale()):
                self._newest = view = make_view(self._source, view)
            return view

    def under(self, stale: Under | None = None) -> Under:
        """Return the disk for a native loop, newer than `stale`. Raises: TypeError without descriptors."""
        if stale is None:
            return self.view.under()
        view = self.view
        return (self.renewed(view) if view is stale.kept or view.is_stale() else view).under()

    # ---- reading

    def read_into(self, buffer: Buffer, disk_offset: int) -> None:
        self.read_extents(np.array([[disk_offset, memoryview(buffer).nbytes]], np.int64), buffer)

    def read_extents(self, extents: NDArray[Any], out: Buffer) -> None:
        rows = checked_rows(extents, virtual_bytes=self.virtual_bytes, path=self.path)
        length = int(rows[:, 1].sum())
        if length != memoryview(out).nbytes:
            message = f"the extents add up to {length} bytes, the buffer has {memoryview(out).nbytes}"
            raise ValueError(message)
        self._read(spans_of(rows), out)

    def read_spans(self, spans: NDArray[np.int64], out: Buffer) -> NDArray[np.int64]:
        inside, behind = clipped(spans, self.virtual_bytes)
        self._read(inside, out)
        view = memoryview(out).cast("B")
        for _, length, at in behind.tolist():
            view[at : at + length] = bytes(length)
        return spans[:0]

    def _read(self, spans: NDArray[np.int64], out: Buffer) -> None:
        while True:
            view = self.view
            try:
                if view.read(spans, out):
                    return
            except (HvReplicaError, OSError) as error:
                if not view.is_stale():
                    raise
                kept(error)  # what led the read was half new
            self.renewed(view)

    def extents(self, start: int, end: int) -> NDArray[np.int64]:
        end = min(end, self.virtual_bytes)
        while True:
            view = self.view
            try:
                found = view.extents(start, end)
            except (HvReplicaError, OSError) as error:
                if not view.is_stale():
                    raise
                kept(error)
            else:
                if found is not None:
                    return found
            self.renewed(view)

    def stretches(self, start: int, end: int) -> Iterator[Stretch]:
        position = start
        for _, _, rows in data_windows(self, start, end):
            for offset, length in rows.tolist():
                if offset > position:
                    yield Stretch(position, offset - position, "zero", None)
                yield Stretch(offset, length, "data", None)
                position = offset + length
        if position < end:
            yield Stretch(position, end - position, "zero", None)

    def info(self) -> DiskInfo:
        allocated = sum(int(rows[:, 1].sum()) for _, _, rows in data_windows(self, 0, self.virtual_bytes))
        return DiskInfo(
            path=str(self.path),
            format=self.format,
            type="point",
            virtual_bytes=self.virtual_bytes,
            file_bytes=0,
            allocated_bytes=allocated,
            logical_sector_bytes=self.logical_sector_bytes,
            physical_sector_bytes=self.physical_sector_bytes,
            block_bytes=self.block_bytes,
            disk_id=None if self.virtual_disk_id is None else str(self.virtual_disk_id),
            data_write_guid=str(self.data_write_guid),
        )

    # ---- what only a file has

    def write(self, buffer: Buffer, disk_offset: int) -> None:  # noqa: ARG002 - see disk.Disk
        self._refuse()

    def write_extents(self, extents: NDArray[Any], data: Buffer) -> None:  # noqa: ARG002 - see disk.Disk
        self._refuse()

    def copy_extents(
        self,
        source_file: BlockFile,  # noqa: ARG002 - see disk.Disk
        source_offsets: NDArray[Any],  # noqa: ARG002
        extents: NDArray[Any],  # noqa: ARG002
    ) -> None:
        self._refuse()

    def write_zeroes(self, disk_offset: int, length: int) -> None:  # noqa: ARG002 - see disk.Disk
        self._refuse()

    def attach(self, parent: Disk) -> None:  # noqa: ARG002 - see disk.Disk
        self._refuse()

    def direct(self, *, data_write_guid: uuid.UUID | None = None) -> Direct:  # noqa: ARG002 - see disk.Disk
        message = f"{self.path} has no file of its own; see under()"
        raise TypeError(message)

    def changed(self) -> None:
        """Do nothing: a point never changes."""

    def flush(self) -> None:
        """Do nothing: a point never changes."""

    def publish(self) -> None:
        """Do nothing: a point never changes."""

    def close(self) -> None:
        self._newest = self._source = None  # the files go with the last who still reads them

    def abandon(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _refuse(self) -> NoReturn:
        raise PermissionError(1, "a recovery point is for reading only", str(self.path))
