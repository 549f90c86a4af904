"""Write down what a change of the disks will overwrite, before it does: the undo parts of older points.

    read     which ranges the logs of the next point touch, in whole grains of 4 KiB
    write    what each disk holds there, to points/<id>.hru.partial; zeros are holes; one sync; renamed
    record   the parts' rows in the very transaction that sets the next point "applying"
    change   only then the first byte of a disk

Parts that have a row are never made again: from that moment on the disks may be half new. Parts without one
are worth nothing and are removed when the store starts.

If the newest point is not to stay, the part belongs to the newest older point that is kept, and holds only
what that one's parts do not cover yet: what they cover is older and was written down before.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk import open_disk
from hvreplica.disk.extents import NO_EXTENTS, data_windows, difference, merge, union, widened
from hvreplica.errors import FormatError, LogError
from hvreplica.formats.hrl import FILE_TYPE_HRL, FILE_TYPE_UNDO
from hvreplica.hrl import LogReader, LogWriter
from hvreplica.native import PAGE_BYTES
from hvreplica.store.check import file_length
from hvreplica.store.old_data import STEP_BYTES, OldPages, append_old
from hvreplica.store.part_files import PartFiles
from hvreplica.store.point_use import hold_alone
from hvreplica.store.points_kept import kept_points, part_path, spoiled_points
from hvreplica.store.policy import policy_of
from hvreplica.store.records import UndoRow
from hvreplica.store.room import room
from hvreplica.store.verdicts import candidate, verdicts
from hvreplica.units import align_down

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.disk import Disk
    from hvreplica.files import FileLock
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import DiskRow, LogSpec, PointRow
    from hvreplica.store.retention import Candidate


@dataclass(frozen=True, slots=True)
class Keeping:
    """What happens to the newest point when the disks move on.

    keeper: the point that the parts belong to, None where no older point is kept. leaving: the point that can
    be had no more from then on; lock: of it, so that nobody begins to read it. longest: for each disk of kept
    points, its greatest length at any of them.
    """

    keeper: PointRow | None
    leaving: PointRow | None
    longest: dict[int, int]
    lock: FileLock | None = None

    def note(self, home: VmHome) -> None:
        """Remember that the point has left, once the catalog says so, to be told: see store/retain.py."""
        home.left += [] if self.leaving is None else [self.leaving]

    def release(self, home: VmHome) -> None:
        """Let readers come to the point that was to leave, once it has left or stays."""
        if self.lock is not None and self.leaving is not None:
            with contextlib.suppress(OSError):
                home.files.unlink(home.paths.use(self.leaving.id))
            self.lock.release()


@dataclass(slots=True)
class Written:
    """Parts whose files are durable and that no row speaks of yet. spoiled: damaged parts that were met.

    old: what was read for them, by disk, of the pages before the one in which the disk will end.
    """

    keeping: Keeping
    parts: list[UndoRow] = field(default_factory=list)
    old: dict[int, OldPages] = field(default_factory=dict)
    spoiled: list[tuple[UndoRow, str]] = field(default_factory=list)


def choose_keeping(home: VmHome, coming: Candidate | None) -> Keeping:
    """Decide by the VM's policy whether the newest point stays, and who keeps it or the one before it.

    coming: the point that the disks move on to, None where it is none that can be had. Only the point that
    the disks are on can leave, and not while somebody reads it; once it has, the answer stays the same. The
    caller calls release() once what was decided is in the catalog, or will not be.
    """
    points = kept_points(home)
    applied = [
        point
        for point in home.catalog.points(home.vm_id, superseded=True)
        if point.applied_s is not None and point.state not in {"spooled", "applying"}
    ]
    newest = points[-1] if points else None
    leaving, lock = None, None
    if newest is not None and applied[-1].id == newest.id:
        stays = {
            verdict.point.id for verdict in verdicts(home, policy_of(home), coming=coming) if verdict.is_kept
        }
        if newest.id not in stays:
            lock = hold_alone(home, newest.id)
            leaving = None if lock is None else points.pop()
    longest: dict[int, int] = {}
    for point in points:
        for disk_index, virtual_bytes in home.catalog.members(home.vm_id, point.id).items():
            longest[disk_index] = max(virtual_bytes, longest.get(disk_index, 0))
    return Keeping(points[-1] if points else None, leaving, longest, lock)


def write_parts(
    home: VmHome, point: PointRow, rows: Sequence[DiskRow], sizes: dict[int, int], logs: Sequence[LogSpec]
) -> Written:
    """Write down what the disks of `rows` hold where `logs` of `point`, or their new `sizes`, will change
    them.

    Files and names are durable on return; record() makes them count. Raises: StoreFull, and what a disk or
    log that cannot be read raises; then nothing is left behind.
    """
    written = Written(choose_keeping(home, candidate(point)))
    keeper = written.keeping.keeper
    if keeper is None:
        return written
    members = home.catalog.members(home.vm_id, keeper.id)
    try:
        for row in rows:
            if row.spec.index in members:
                own = [log for log in logs if log.disk_index == row.spec.index]
                part = _write_part(home, row, sizes[row.spec.index], own, written)
                written.parts += [] if part is None else [part]
        if written.parts:
            home.files.sync_directory(home.paths.points)
    except BaseException:
        discard(home, written)
        raise
    return written


def discard(home: VmHome, written: Written) -> None:
    """Remove what write_parts() wrote and nothing speaks of."""
    written.keeping.release(home)
    for part in written.parts:
        with contextlib.suppress(OSError):
            home.files.unlink(home.paths.undo(part.id))


def record(home: VmHome, written: Written) -> None:
    """Let the parts count and the point that leaves leave; inside the transaction that begins the change.

    A point that was to keep the parts may have been dropped meanwhile: then its own parts went to the next
    older one, and these go there too.
    """
    catalog, vm_id = home.catalog, home.vm_id
    for part, sentence in written.spoiled:
        for point in spoiled_points(home, part):
            catalog.damage_point(vm_id, point.id, sentence)
    keeper, leaving = written.keeping.keeper, written.keeping.leaving
    if leaving is not None:
        catalog.supersede_point(vm_id, leaving.id)
    if keeper is None:
        return
    kept = [point for point in kept_points(home) if point.sequence <= keeper.sequence]
    for part in written.parts:
        able = [point for point in kept if part.disk_index in catalog.members(vm_id, point.id)]
        if able:
            catalog.add_undo(vm_id, _of(able[-1], part))
        # else nobody needs the file, and it goes when the store starts


def _of(point: PointRow, part: UndoRow) -> UndoRow:
    return UndoRow(
        point.id,
        part.disk_index,
        part.id,
        part.kind,
        part.file_bytes,
        part.covered_bytes,
        log_id=part.log_id,
        digest_change=part.digest_change,
    )


def _write_part(
    home: VmHome, row: DiskRow, new_bytes: int, logs: list[LogSpec], written: Written
) -> UndoRow | None:
    keeper = written.keeping.keeper
    if keeper is None:
        return None
    disk_index = row.spec.index
    path = home.paths.disk(disk_index)
    with open_disk(home.files, path, writable=False, format="vhdx", clock=home.clock) as disk:
        extents = _touched(home, logs, written.keeping.longest[disk_index])
        if new_bytes < disk.virtual_bytes:
            extents = union(extents, _data_behind(disk, new_bytes))
        known = _covered(home, keeper.id, disk_index, written)
        extents = NO_EXTENTS if known is None else difference(extents, known)
        if logs and known is not None and not len(known) and not len(extents):
            # All of it is beyond the end of the older points. Their digests need a part that tells of it.
            extents = _last_page(min(disk.virtual_bytes, written.keeping.longest[disk_index]))
        if not len(extents):
            return None
        part, old = _write_file(home, disk, row, extents, keeper=keeper, logs=logs, new_bytes=new_bytes)
        written.old[disk_index] = old
        return part


def _write_file(
    home: VmHome,
    disk: Disk,
    row: DiskRow,
    extents: NDArray[np.int64],
    *,
    keeper: PointRow,
    logs: list[LogSpec],
    new_bytes: int,
) -> tuple[UndoRow, OldPages]:
    part_id = home.clock.guid()
    partial, path = home.paths.partial_undo(part_id), home.paths.undo(part_id)
    covered_bytes = int(extents[:, 1].sum())
    with room(home.files, partial, covered_bytes):
        home.files.make_directory(home.paths.points)
        try:
            writer = LogWriter.create_undo(
                home.files,
                partial,
                part_id=part_id,
                log_id=logs[-1].log_id if logs else None,
                data_write_guid=disk.data_write_guid,
                clock=home.clock,
                entry_count=len(extents) + covered_bytes // STEP_BYTES,  # each step may cut one in two
            )
            with writer:
                old = append_old(writer, disk, extents, digest_end=align_down(new_bytes, PAGE_BYTES))
            home.files.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                home.files.unlink(partial)
            raise
    part = UndoRow(
        point_id=keeper.id,
        disk_index=row.spec.index,
        id=part_id,
        kind="undo",
        file_bytes=file_length(home.files, path),
        covered_bytes=covered_bytes,
        log_id=logs[0].log_id if len(logs) == 1 else None,
    )
    return part, old


def _last_page(end: int) -> NDArray[np.int64]:
    start = align_down(end - 1, PAGE_BYTES)
    return np.array([[start, end - start]], np.int64)


def _touched(home: VmHome, logs: list[LogSpec], end: int) -> NDArray[np.int64]:
    """Return the grains before `end` that the logs touch, sorted and merged."""
    found = [
        extents for log in logs for extents in log_extents(home, home.paths.log(log.log_id), FILE_TYPE_HRL)
    ]
    return widened(np.concatenate(found) if found else NO_EXTENTS, start=0, end=end)


def log_extents(home: VmHome, path: Path, file_type: int) -> list[NDArray[np.int64]]:
    """Return what the entries of a log or part cover, a merged table for each batch of them."""
    files = PartFiles(home.files) if file_type == FILE_TYPE_UNDO else home.files
    with LogReader(files, path, file_type=file_type) as reader:
        return [
            merge(np.column_stack((batch["byte_offset"], batch["data_length"])).astype(np.int64))
            for batch in reader.entries()
        ]


def _data_behind(disk: Disk, start: int) -> NDArray[np.int64]:
    """Return where the disk may hold data from `start` on: what a disk that becomes shorter loses.

    Zeros there need no part: if the disk grows again, they are what it grows by.
    """
    found = [rows for _, _, rows in data_windows(disk, start, disk.virtual_bytes) if len(rows)]
    return np.concatenate(found) if found else NO_EXTENTS


def _covered(
    home: VmHome, keeper_id: uuid.UUID, disk_index: int, written: Written
) -> NDArray[np.int64] | None:
    """Return what the keeper's own parts cover; None where they cover everything.

    A part that cannot be read spoils the points that need it and nothing else: it counts as covering nothing.
    """
    covered = [NO_EXTENTS]
    for part in home.catalog.undo_rows(home.vm_id, point_id=keeper_id, disk_index=disk_index):
        if part.kind == "whole":
            return None
        try:
            covered += log_extents(home, part_path(home, part), FILE_TYPE_UNDO)
        except (FormatError, LogError, FileNotFoundError) as error:
            written.spoiled.append((part, f"undo part {part.id} of disk {disk_index} is damaged: {error}"))
    return merge(np.concatenate(covered))
