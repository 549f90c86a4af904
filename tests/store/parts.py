"""Undo parts made by hand, and what they hold together: the first part that covers a grain has it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.hrl import LogReader, LogWriter
from hvreplica.store.catalog import Catalog
from hvreplica.store.home import StoreParts, VmHome
from hvreplica.store.layout import CATALOG_NAME
from hvreplica.store.points_kept import chain, kept_points
from hvreplica.store.records import Owner, PointRow, UndoRow
from tests.store.world import INSTANT_S, guid
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from hvreplica.files import FileSystem

GRAIN_BYTES = 4096
Grains = dict[int, bytes]  # number of the grain -> its bytes


def opened_home(root: Path, files: FileSystem | None = None, *, clock_seed: int = 7) -> VmHome:
    """Return a VM's home over a catalog in `root`; made where it is not there. Close its catalog."""
    chosen = files or FaultFiles(root)
    note = chosen.note if isinstance(chosen, FaultFiles) else None
    on_commit = None if note is None else lambda data: note("catalog", data)
    catalog = Catalog(chosen, root / CATALOG_NAME, create=True, on_commit=on_commit)
    row = catalog.vm("web01")
    if row is None:
        with catalog.transaction():
            catalog.insert_vm("web01", "web01", "web01", Owner(guid(1), 1, ""), INSTANT_S)
        row = catalog.vm("web01")
    assert row is not None
    home = VmHome(StoreParts(chosen, root, catalog, FakeClock(seed=clock_seed)), row)
    chosen.make_directory(home.paths.points)
    return home


def add_points(
    home: VmHome, count: int, *, every_s: float = 3600, disk_bytes: int = 1 << 30
) -> list[uuid.UUID]:
    """Insert complete points of one disk, without parts."""
    ids = [guid(1000 + number) for number in range(count)]
    with home.catalog.transaction():
        for number, point_id in enumerate(ids):
            instant_s = INSTANT_S + every_s * number
            home.catalog.insert_point(
                home.vm_id,
                PointRow(
                    point_id, 0, instant_s, "standard", "crash", "complete", None, 0, instant_s, instant_s
                ),
            )
            home.catalog.set_members(home.vm_id, point_id, {0: disk_bytes})
    return ids


def add_part(
    home: VmHome, point_id: uuid.UUID, grains: Mapping[int, bytes], *, change: str | None = None
) -> UndoRow:
    """Write a part that covers these grains, one entry for each run, and add its row behind the others."""
    part_id = home.clock.guid()
    path = home.paths.undo(part_id)
    writer = LogWriter.create_undo(
        home.files, path, part_id=part_id, log_id=part_id, data_write_guid=None, clock=home.clock
    )
    numbers = sorted(grains)
    rows = [[number * GRAIN_BYTES, GRAIN_BYTES] for number in numbers]
    for place in range(len(rows) - 1, 0, -1):
        if sum(rows[place - 1]) == rows[place][0]:
            rows[place - 1][1] += rows.pop(place)[1]
    writer.append(np.array(rows, np.int64), b"".join(grains[number] for number in numbers), holes=True)
    summary = writer.close()
    home.files.sync_directory(home.paths.points)
    with home.catalog.transaction():
        row = UndoRow(
            point_id, 0, part_id, "undo", summary.log_bytes, GRAIN_BYTES * len(grains), digest_change=change
        )
        home.catalog.add_undo(home.vm_id, row)
    return home.catalog.undo_rows(home.vm_id, point_id=point_id)[-1]


def read_parts(home: VmHome, rows: Iterable[UndoRow]) -> Grains:
    """Return what the parts hold together, read with the reader alone, entry by entry."""
    found: Grains = {}
    for row in rows:
        own = read_part(home, row)
        found = own | found
    return found


def read_part(home: VmHome, row: UndoRow) -> Grains:
    """Return what one part holds, and hold it to the rules of its format."""
    found: Grains = {}
    end = 0
    with LogReader(home.files, home.paths.undo(row.id), file_type=FILE_TYPE_UNDO) as reader:
        assert reader.header.unique_id == row.id
        assert reader.log_bytes == row.file_bytes
        for entries in reader.entries():
            for entry in entries:
                start, length = int(entry["byte_offset"]), int(entry["data_length"])
                assert start >= end, "sorted and disjoint"
                assert start % GRAIN_BYTES == length % GRAIN_BYTES == 0
                end = start + length
                data = reader.file.read(int(entry["log_offset"]), length)
                for at in range(0, length, GRAIN_BYTES):
                    found[(start + at) // GRAIN_BYTES] = data[at : at + GRAIN_BYTES]
    assert GRAIN_BYTES * len(found) == row.covered_bytes
    return found


def names_in(home: VmHome) -> list[str]:
    """Return the names in the folder of points."""
    return home.files.names(home.paths.points)


def part_names(rows: Sequence[UndoRow]) -> list[str]:
    """Return the names that the files of these parts have."""
    return sorted(f"{row.id}.hru" for row in rows)


class Disk:
    """A disk as a dictionary of its grains, the points it has been on, and what each of them showed."""

    def __init__(self, home: VmHome, seed: int) -> None:
        self.home = home
        self.rng = random.Random(seed)
        self.content: Grains = {}
        self.snapshots: dict[uuid.UUID, Grains] = {}
        self.newest: uuid.UUID | None = None

    def cycle(
        self,
        numbers: Iterable[int],
        *,
        after_s: float = 3600,
        kind: str = "standard",
        consistency: str = "crash",
        zeros: bool = False,
    ) -> uuid.UUID:
        """Let the disk move on to a new point by changing some grains, as applying a log does it."""
        chosen = sorted(set(numbers))
        if self.newest is not None:
            add_part(self.home, self.newest, {number: self.grain(number) for number in chosen})
        for number in chosen:
            self.content[number] = bytes(GRAIN_BYTES) if zeros else self.rng.randbytes(GRAIN_BYTES)
        catalog, vm_id = self.home.catalog, self.home.vm_id
        points = catalog.points(vm_id)
        instant_s = points[-1].instant_s + after_s if points else INSTANT_S
        point_id = self.home.clock.guid()
        with catalog.transaction():
            row = PointRow(
                point_id, 0, instant_s, kind, consistency, "complete", None, 0, instant_s, instant_s
            )
            catalog.insert_point(vm_id, row)
            catalog.set_members(vm_id, point_id, {0: 1 << 30})
        self.newest = point_id
        self.snapshots[point_id] = dict(self.content)
        return point_id

    def grain(self, number: int) -> bytes:
        """Return what a grain holds now."""
        return self.content.get(number, bytes(GRAIN_BYTES))

    def kept(self) -> list[uuid.UUID]:
        """Return the ids of the points that can be had, oldest first."""
        return [point.id for point in kept_points(self.home)]

    def check(self) -> None:
        """Hold each kept point to what it showed, and the folder to the files that rows name."""
        for point_id in self.kept():
            rows = chain(self.home, point_id, 0)
            found = self.content | read_parts(self.home, rows)
            shown = self.snapshots[point_id]
            for number in found.keys() | shown.keys():
                zeros = bytes(GRAIN_BYTES)
                assert found.get(number, zeros) == shown.get(number, zeros), (point_id, number)
        names = [name for name in names_in(self.home) if not name.endswith(".use")]
        assert names == part_names(self.home.catalog.undo_rows(self.home.vm_id))
