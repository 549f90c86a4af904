"""Write undo parts of a point anew: without what an earlier part covers too, several as one.

    new part written, synced, renamed, folder synced -> one transaction in the catalog -> old files removed

What a point holds does not change by it, before, between and after. Cut anywhere, the catalog names whole
files; what it does not name is removed when the store starts. Readers that have the old files open go on with
them. Data is checked before it is written anew, so that damage keeps the checksum that tells of it.

Happens under the VM's exclusive lock. store/part_plan.py says what is worth it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica import native
from hvreplica.errors import Locked
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.hrl import LogReader, LogWriter
from hvreplica.hrl.verify import check_log
from hvreplica.hrl.writer import ENTRY_DATA_BYTES_MAX
from hvreplica.store.digest import Digest
from hvreplica.store.part_files import PartFiles
from hvreplica.store.part_plan import choose_merge, plan_rewrites
from hvreplica.store.points_kept import part_path, remove_parts
from hvreplica.store.room import room
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from hvreplica.store.home import VmHome
    from hvreplica.store.part_plan import Rewrite
    from hvreplica.store.records import UndoRow

PARTS_MAX = 256  # looked at together: each is an open file
ENTRIES_MAX = (
    1 << 22
)  # of all parts looked at together, some 250 MiB of tables; beyond it they stay as they are
_WINDOW_BYTES = 4 * MIB
_LOOK_BYTES = 384 << 10  # to look at a part costs what writing that much does
_SOURCE_SHIFT = 50  # a log is shorter than 1 << 50 bytes: above that stands which part an offset is in


class Compacted(NamedTuple):
    """What was done. parts: fewer than before. written_bytes: of the guest. freed_bytes: lengths of files."""

    parts: int = 0
    written_bytes: int = 0
    freed_bytes: int = 0

    def plus(self, other: Compacted) -> Compacted:
        """Return the sum of both."""
        return Compacted(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class _Extents:
    """What each byte that the parts cover is read from. source: number of the part; log_offset: in it."""

    disk_offset: NDArray[np.int64]
    length: NDArray[np.int64]
    source: NDArray[np.int64]
    log_offset: NDArray[np.int64]

    def of(self, first: int, last: int) -> _Extents:
        """Return those that come from the parts first..last, without last."""
        chosen = (self.source >= first) & (self.source < last)
        return _Extents(
            *(column[chosen] for column in (self.disk_offset, self.length, self.source, self.log_offset))
        )


def compact_parts(
    home: VmHome, point_id: uuid.UUID, disk_index: int, *, look: bool, bytes_max: int | None = None
) -> Compacted:
    """Write the parts of one point and disk anew where that is worth it; durable on return.

    look: find out which bytes are dead, which reads what describes the parts; without it only their number
    counts. bytes_max: write no more than this, and merge nothing. Raises: StoreFull, FormatError or LogError
    for a part that is damaged, Locked where the point is dropped meanwhile; nothing is lost then.
    """
    rows = _undo_parts(home, point_id, disk_index)
    if bytes_max is not None and bytes_max < len(rows) * _LOOK_BYTES:
        return Compacted()
    if len(rows) < 2 or not (look or choose_merge([row.covered_bytes for row in rows])):
        return Compacted()
    with contextlib.ExitStack() as stack:
        files = PartFiles(home.files)  # one, for all of them remember no more frames than that one may
        readers = [
            stack.enter_context(LogReader(files, part_path(home, row), file_type=FILE_TYPE_UNDO))
            for row in rows
        ]
        if sum(reader.entry_count for reader in readers) > ENTRIES_MAX:
            return Compacted()
        extents = _live_extents(readers)
        live = np.bincount(extents.source, weights=extents.length, minlength=len(rows)).astype(np.int64)
        done = Compacted()
        # From behind, for a part that is gone leaves what it knows with the one before it.
        covered = [row.covered_bytes for row in rows]
        for step in reversed(plan_rewrites(covered, live.tolist(), bytes_max=bytes_max)):
            done = done.plus(_rewrite(home, rows, readers, extents, step))
        return done


def _undo_parts(home: VmHome, point_id: uuid.UUID, disk_index: int) -> list[UndoRow]:
    """Return the parts before one of a whole disk, behind which nothing is looked at."""
    rows = home.catalog.undo_rows(home.vm_id, point_id=point_id, disk_index=disk_index)
    wholes = [place for place, row in enumerate(rows) if row.kind == "whole"]
    return rows[: min([*wholes, PARTS_MAX])]


def _live_extents(readers: Sequence[LogReader]) -> _Extents:
    """Return which part each byte comes from: the first that covers it."""
    columns: list[tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]] = []
    for source, reader in reversed(
        list(enumerate(readers))
    ):  # the newest write wins, and here the first part
        for entries in reader.entries():
            offsets = entries["log_offset"].astype(np.uint64) | np.uint64(source << _SOURCE_SHIFT)
            columns.append(
                (entries["byte_offset"].astype(np.uint64), entries["data_length"].astype(np.uint64), offsets)
            )
    if not columns:
        nothing = np.empty(0, np.int64)
        return _Extents(nothing, nothing, nothing, nothing)
    starts, lengths, tagged = native.coalesce(*(np.concatenate(part) for part in zip(*columns, strict=True)))
    tagged = tagged.astype(np.int64)
    return _Extents(
        starts.astype(np.int64),
        lengths.astype(np.int64),
        tagged >> _SOURCE_SHIFT,
        tagged & ((1 << _SOURCE_SHIFT) - 1),
    )


def _rewrite(
    home: VmHome, rows: list[UndoRow], readers: Sequence[LogReader], extents: _Extents, step: Rewrite
) -> Compacted:
    old = rows[step.first : step.last]
    if not step.live_bytes:
        before = rows[step.first - 1]
        rows[step.first - 1] = replace(before, digest_change=joined_change([before, *old]))
        _record(home, [before, *old], rows[step.first - 1])
        remove_parts(home, old)
        return Compacted(len(old), 0, sum(row.file_bytes for row in old))
    for reader in readers[step.first : step.last]:
        check_log(reader, data=True, disk_bytes=None, progress=None)
    new = _write_part(home, old, readers, extents.of(step.first, step.last))
    try:
        _record(home, old, new)
    except Locked:
        home.files.unlink(home.paths.undo(new.id))
        raise
    remove_parts(home, old)
    return Compacted(len(old) - 1, step.live_bytes, sum(row.file_bytes for row in old) - new.file_bytes)


def _record(home: VmHome, old: Sequence[UndoRow], new: UndoRow) -> None:
    """Let `new` stand for `old`, in one transaction. Raises: Locked if they are not that point's any more."""
    catalog, vm_id = home.catalog, home.vm_id
    with catalog.transaction():
        known = catalog.undo_rows(vm_id, point_id=new.point_id, disk_index=new.disk_index)
        if [row for row in known if row in old] != list(old):
            raise Locked("the point was dropped meanwhile", path=home.paths.points, hint="try again")
        catalog.replace_undo(vm_id, old, new)


def _write_part(
    home: VmHome, old: Sequence[UndoRow], readers: Sequence[LogReader], extents: _Extents
) -> UndoRow:
    """Write a part of these extents, durable under its name on return; no row names it yet."""
    part_id, files, paths = home.clock.guid(), home.files, home.paths
    partial = paths.partial_undo(part_id)
    live_bytes = int(extents.length.sum())
    with room(files, partial, live_bytes):
        try:
            header = readers[-1].header
            writer = LogWriter.create_undo(
                files,
                partial,
                part_id=part_id,
                log_id=header.previous_unique_id,
                data_write_guid=header.vhd2_data_write_guid,
                clock=home.clock,
                entry_count=len(extents.length) + live_bytes // ENTRY_DATA_BYTES_MAX + 1,
            )
            with writer:
                _copy(extents, readers, writer)
                summary = writer.close()
            files.replace(partial, paths.undo(part_id))
            files.sync_directory(paths.points)
        except BaseException:
            with contextlib.suppress(OSError):
                files.unlink(partial)
            raise
    return replace(
        old[0],
        id=part_id,
        file_bytes=summary.log_bytes,
        covered_bytes=live_bytes,
        log_id=old[0].log_id if len(old) == 1 else None,
        digest_change=joined_change(old),
    )


def _copy(extents: _Extents, readers: Sequence[LogReader], writer: LogWriter) -> None:
    """Append the extents in the order of the disk; zeros become holes."""
    buffer = np.empty(_WINDOW_BYTES, np.uint8)
    for window in _windows(extents):
        data = buffer[: int(window.length.sum())]
        places = np.cumsum(window.length) - window.length
        for source in np.unique(window.source).tolist():
            mine = window.source == source
            pieces = np.column_stack((window.log_offset[mine], window.length[mine], places[mine]))
            native.read_pieces(readers[source].file, pieces, data)
        writer.append(np.column_stack((window.disk_offset, window.length)), data.data, holes=True)


def _windows(extents: _Extents) -> Iterator[_Extents]:
    """Yield the extents in order, cut so that each group has at most _WINDOW_BYTES."""
    ends = np.cumsum(extents.length)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _WINDOW_BYTES):
        stop = min(start + _WINDOW_BYTES, total)
        first, last = np.searchsorted(ends, [start, stop], "right")
        last = int(min(last + 1, len(ends)))
        part = slice(int(first), last)
        skipped = np.maximum(start - (ends - extents.length)[part], 0)
        length = np.minimum(ends[part], stop) - np.maximum((ends - extents.length)[part], start)
        keep = length > 0
        yield _Extents(
            (extents.disk_offset[part] + skipped)[keep],
            length[keep],
            extents.source[part][keep],
            (extents.log_offset[part] + skipped)[keep],
        )


def joined_change(rows: Sequence[UndoRow]) -> str | None:
    """Return what applying all of the changes changed in the disk's digest; None where that is not known."""
    total = Digest()
    for row in rows:
        if row.digest_change is None:
            return None
        total += Digest.of_hex(row.digest_change)
    return total.hex()
