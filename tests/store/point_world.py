"""A store whose points are made by hand: what each one shows is a dictionary of bytes, and its parts are written
here as docs/formats/hru.md says, without the store's own apply.
"""

from __future__ import annotations

import dataclasses
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk, resize_disk
from hvreplica.disk.extents import merge
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogWriter
from hvreplica.store.catalog import Catalog
from hvreplica.store.counter import Counter
from hvreplica.store.home import StoreParts, VmHome
from hvreplica.store.layout import CATALOG_NAME, collision_key
from hvreplica.store.records import DiskRow, DiskSpec, Owner, PointRow, UndoRow

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from pathlib import Path

MIB = 1 << 20
PAGE = 4096
VM = "web01"


@dataclass
class PointWorld:
    """One VM. disks: what they hold now. points: what each kept point shows, oldest first."""

    root: Path
    sizes: dict[int, int]
    block_bytes: int = MIB
    disks: dict[int, bytearray] = field(default_factory=dict)
    points: dict[uuid.UUID, dict[int, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the store, with a first point of empty disks."""
        OS_FILES.make_directory(self.root)
        self.catalog = Catalog(OS_FILES, self.root / CATALOG_NAME, create=True)
        with self.catalog.transaction():
            owner = Owner(uuid.UUID(int=1), 1, "sha256:01")
            self.catalog.insert_vm(VM, VM, collision_key(VM), owner, 0.0)
        row = self.catalog.vm(VM)
        assert row is not None
        self.home = VmHome(StoreParts(OS_FILES, self.root, self.catalog, SYSTEM), row)
        OS_FILES.make_directory(self.home.paths.disks)
        OS_FILES.make_directory(self.home.paths.points)
        self.counter = Counter(OS_FILES, self.home.paths.counter, writable=True)
        for index, size in self.sizes.items():
            self.disks[index] = bytearray(size)
            spec = DiskSpec(index, size, block_bytes=self.block_bytes)
            with self.catalog.transaction():
                self.catalog.insert_disk(self.home.vm_id, spec)
            create_disk(
                OS_FILES,
                self.home.paths.disk(index),
                virtual_bytes=size,
                block_bytes=self.block_bytes,
                clock=SYSTEM,
            )
        self._add_point("initial", "crash")

    @property
    def ids(self) -> list[uuid.UUID]:
        """The kept points, oldest first."""
        return list(self.points)

    def close(self) -> None:
        """Close the catalog."""
        self.counter.close()
        self.catalog.close()

    def cut(
        self,
        changes: dict[int, Sequence[tuple[int, bytes]]],
        *,
        sizes: dict[int, int] | None = None,
        consistency: str = "crash",
    ) -> uuid.UUID:
        """Bring the disks to a new point. changes: for each disk, writes (offset, data) in order."""
        sizes = sizes or {}
        rows = {index: self._undo_part(index, writes, sizes.get(index)) for index, writes in changes.items()}
        newest = self.ids[-1]
        with self.catalog.transaction():
            for row in rows.values():
                self.catalog.add_undo(self.home.vm_id, dataclasses.replace(row, point_id=newest))
        self.counter.increment()
        for index, writes in changes.items():
            self._change(index, writes, sizes.get(index))
        return self._add_point("standard", consistency)

    def drop(self, point_id: uuid.UUID) -> None:
        """Drop a point that is not the newest: its parts go to the older neighbour, or are gone."""
        place = self.ids.index(point_id)
        files = []
        with self.catalog.transaction():
            for index in self.disks:
                if place:
                    target = self.ids[place - 1]
                    self.catalog.move_undo(
                        self.home.vm_id, point_id=point_id, target_id=target, disk_index=index
                    )
                    continue
                for row in self.catalog.undo_rows(self.home.vm_id, point_id=point_id, disk_index=index):
                    self.catalog.delete_undo(self.home.vm_id, row.id)
                    files.append(self.home.paths.undo(row.id))
            self.catalog.supersede_point(self.home.vm_id, point_id)
        for path in files:
            OS_FILES.unlink(path)
        del self.points[point_id]

    def replace_disk(self, index: int, content: bytes) -> uuid.UUID:
        """Bring a disk to a new point by a new file; the old one becomes a part."""
        part_id = SYSTEM.guid()
        old = self.home.paths.disk(index)
        with self.catalog.transaction():
            self.catalog.add_undo(
                self.home.vm_id,
                UndoRow(self.ids[-1], index, part_id, "whole", old.stat().st_size, len(self.disks[index])),
            )
        self.counter.increment()
        OS_FILES.replace(old, self.home.paths.whole(part_id))
        create_disk(OS_FILES, old, virtual_bytes=len(content), block_bytes=self.block_bytes, clock=SYSTEM)
        self.disks[index] = bytearray(len(content))
        self._change(index, [(0, content)], None)
        return self._add_point("initial", "crash")

    def _undo_part(self, index: int, writes: Sequence[tuple[int, bytes]], size: int | None) -> UndoRow:
        disk = self.disks[index]
        ranges = [(offset, len(data)) for offset, data in writes if offset < len(disk)]
        if size is not None and size < len(disk):
            ranges.append((size, len(disk) - size))
        table = np.array(ranges, np.int64).reshape(-1, 2)
        starts = table[:, 0] // PAGE * PAGE
        ends = np.minimum(-(-(table[:, 0] + table[:, 1]) // PAGE) * PAGE, len(disk))
        part_id, covered = SYSTEM.guid(), 0
        path = self.home.paths.undo(part_id)
        with LogWriter.create_undo(
            OS_FILES, path, part_id=part_id, log_id=None, data_write_guid=None, clock=SYSTEM
        ) as writer:
            for start, length in merge(np.column_stack((starts, ends - starts))).tolist():
                covered += length
                for page in range(start, start + length, 16 * PAGE):
                    stop = min(page + 16 * PAGE, start + length)
                    old = bytes(disk[page:stop])
                    if any(old):
                        writer.append(np.array([[page, stop - page]], np.int64), old)
                    else:
                        writer.append_zeroes(page, stop - page)
        return UndoRow(uuid.UUID(int=0), index, part_id, "undo", path.stat().st_size, covered)

    def _change(self, index: int, writes: Sequence[tuple[int, bytes]], size: int | None) -> None:
        disk, path = self.disks[index], self.home.paths.disk(index)
        if size is not None and size < len(disk):
            with open_disk(OS_FILES, path, writable=True, format="vhdx", clock=SYSTEM) as opened:
                opened.write_zeroes(size, len(disk) - size)
            del disk[size:]
        if size is not None:
            resize_disk(OS_FILES, path, size, format="vhdx", force=True, clock=SYSTEM)
            disk += bytes(size - len(disk))
        with open_disk(OS_FILES, path, writable=True, format="vhdx", clock=SYSTEM) as opened:
            for offset, data in writes:
                if any(data):
                    opened.write(data, offset)
                else:
                    opened.write_zeroes(offset, len(data))
                disk[offset : offset + len(data)] = data

    def _add_point(self, kind: str, consistency: str) -> uuid.UUID:
        point_id = SYSTEM.guid()
        previous = self.ids[-1] if self.points else None
        row = PointRow(point_id, 0, 0.0, kind, consistency, "complete", previous, 0, 0.0, 0.0)
        with self.catalog.transaction():
            self.catalog.insert_point(self.home.vm_id, row)
            sizes = {index: len(disk) for index, disk in self.disks.items()}
            self.catalog.set_members(self.home.vm_id, point_id, sizes)
            for each in self.catalog.disks(self.home.vm_id):
                path = self.home.paths.disk(each.spec.index)
                spec = dataclasses.replace(each.spec, virtual_bytes=sizes[each.spec.index])
                self.catalog.set_disk_state(self.home.vm_id, DiskRow(spec, path.stat().st_size))
        self.points[point_id] = {index: bytes(disk) for index, disk in self.disks.items()}
        return point_id


def random_writes(rng: random.Random, size: int, count: int) -> list[tuple[int, bytes]]:
    """Return writes within a disk of `size`: sectors, pages and whole blocks, some of them zeros."""
    writes = []
    for _ in range(count):
        unit = rng.choice([512, 512, PAGE, PAGE, 64 << 10, MIB])
        if unit > size:
            unit = 512
        offset = (
            rng.randrange(0, size - unit + 1) // (MIB if unit == MIB else 512) * (MIB if unit == MIB else 512)
        )
        length = min(unit * rng.randrange(1, 4), size - offset)
        is_zero = rng.random() < 0.25
        writes.append((offset, bytes(length) if is_zero else rng.randbytes(length)))
    return writes
