"""What a primary has written after the last cut that its replica acknowledged: the other half of a fork.

The answer is a superset of it, in blocks of the fingerprints: what the disk holds differently from what the
replica is known to hold, and all that the cuts hold that never were acknowledged, for a block may have been
written back since. Where the intent journal still is about this very disk, only what it names is read.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import numpy as np

from hvreplica.disk.extents import NO_EXTENTS, union, widened
from hvreplica.errors import FormatError, NotClosed, TrackingLost
from hvreplica.hrl import LogReader
from hvreplica.replication import cycle
from hvreplica.replication.missed import Missed
from hvreplica.replication.replica_folders import main_folder
from hvreplica.replication.state import cuts, logs_kept
from hvreplica.tracking.compare import ComparedDisk, RangeSink
from hvreplica.tracking.identity import Verdict, disk_identity, judge
from hvreplica.tracking.journal import IntentJournal

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hvreplica.disk import Disk
    from hvreplica.disk.open import Format
    from hvreplica.replication.state import CutLog
    from hvreplica.replication.work import Work

_WORKERS = 2
_LOG = logging.getLogger("hvreplica.replicate")


def known_points(work: Work) -> list[uuid.UUID]:
    """Return the points from which changed_since() counts, newest last: the replica may be on any of them."""
    last = [] if work.state.last_point is None else [work.state.last_point]
    return last + [transfer.point_id for transfer in cuts(work.state)]


def bring_up_to_date(work: Work) -> None:
    """Finish with the tables what an earlier call left: they describe the last acknowledged point then."""
    cycle.drop_unfinished(work)
    transfer = work.state.transfer
    if transfer is not None and transfer.kind == "logs" and transfer.stage == "acknowledged":
        try:
            work.open_tables()
            work.check_tables()
        except TrackingLost:
            return  # changed_since() names the whole disks
        cycle.settle(work, transfer)


def changed_since(work: Work, *, on_read: Callable[[int], None] = lambda _: None) -> list[NDArray[np.int64]]:
    """Return for each of the work's disks what may differ there from each of known_points().

    int64 (n, 2), sorted, disjoint, within the disk; the whole disk where nothing tells more. The disks must
    not change meanwhile. Call bring_up_to_date() before. Raises: OSError.
    """
    logs, missed = logs_kept(work.state), _missed(work)
    found = []
    for place, index in enumerate(work.indexes):
        disk = work.disks[place]
        rows = _differing(work, place, missed.get(index, NO_EXTENTS), on_read)
        for log in logs:
            if rows is not None and log.disk_index == index:
                rows = _with_log(work, log, rows, disk.virtual_bytes)
        whole = np.array([[0, disk.virtual_bytes]], np.int64)
        found.append(whole if rows is None else widened(rows, start=0, end=disk.virtual_bytes))
    return found


def _missed(work: Work) -> dict[int, NDArray[np.int64]]:
    """Return what the replica missed of cuts, by disk; of a further one that no capture ever fed, all."""
    folder = work.folder.folder
    sizes = {index: disk.virtual_bytes for index, disk in zip(work.indexes, work.disks, strict=True)}
    missed = Missed(work.files, folder, clock=work.clock)
    return missed.noted(sizes, unless_there=folder != main_folder(folder))


def _differing(
    work: Work, place: int, missed: NDArray[np.int64], on_read: Callable[[int], None]
) -> NDArray[np.int64] | None:
    """Return where a disk differs from its table; None where the table cannot be relied on."""
    try:
        work.open_tables()
        work.check_tables()
    except TrackingLost as error:
        _LOG.warning("the whole disks count as changed: %s", error)
        return None
    disk, table = work.disks[place], work.tables[place]
    sink = RangeSink()
    within = _journalled(work, work.indexes[place], disk)
    if within is not None:
        within = union(within, missed)
    ComparedDisk(disk, table, workers=_WORKERS, within=within).changes_into(sink, on_read=on_read)
    return sink.rows


def _journalled(work: Work, index: int, disk: Disk) -> NDArray[np.int64] | None:
    """Return where a disk may differ from the last cut of any replica; None where no journal tells."""
    path = main_folder(work.folder.folder) / "journal" / f"{index}.ij"
    if not work.files.exists(path):
        return None
    try:
        journal = IntentJournal.open(work.files, path, virtual_bytes=disk.virtual_bytes)
    except (FormatError, FileNotFoundError) as error:
        _LOG.warning("the whole disk %d is read: %s", index, error)
        return None
    try:
        guid = disk.data_write_guid if disk.format == "vhdx" else None
        judgement = judge(
            journal.identity,
            disk_identity(work.files, disk.path, data_write_guid=guid),
            was_clean=journal.is_clean,
            disk_format=cast("Format", disk.format),
        )
        if judgement.verdict is not Verdict.SAME:
            return None
        # After a crash, only a VHDX tells that another program has written to it: a primary that was lost may
        # have been started elsewhere meanwhile.
        return journal.regions() if journal.is_clean or disk.format == "vhdx" else None
    finally:
        journal.close()


def _with_log(work: Work, log: CutLog, rows: NDArray[np.int64], disk_bytes: int) -> NDArray[np.int64] | None:
    """Return `rows` and all that a log holds; None where it cannot be read."""
    try:
        with LogReader(work.files, work.folder.log_path(log.log_id)) as reader:
            for entries in reader.blocks():
                starts = entries["byte_offset"].astype(np.int64)
                lengths = np.minimum(entries["data_length"].astype(np.int64), disk_bytes - starts)
                rows = union(rows, np.stack((starts, lengths), axis=1)[lengths > 0])
    except (FileNotFoundError, FormatError, NotClosed) as error:
        _LOG.warning("the whole disk %d counts as changed: %s", log.disk_index, error)
        return None
    return rows
