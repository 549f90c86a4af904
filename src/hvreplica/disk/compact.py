"""Make the file of a disk shorter without a guest seeing any difference.

    1. blocks that read as zeros, and blocks of which no sector counts, lose their places
    2. the table, and then blocks go from the end of the file into gaps: copy, sync, then what points there
    3. the file is cut

A power cut leaves the disk as it was, at any step; the same call again goes on from there. A place gets new
content only when no entry points there, durably.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from hvreplica import native
from hvreplica.disk.copy import copy_within
from hvreplica.disk.open import open_disk
from hvreplica.disk.parallel import Scratch, map_ordered
from hvreplica.disk.vhd.compact import VhdFile
from hvreplica.disk.vhd.disk import VhdDisk
from hvreplica.disk.vhdx.compact import VhdxFile
from hvreplica.disk.vhdx.disk import VhdxDisk
from hvreplica.errors import InvalidTransition
from hvreplica.progress import Progress
from hvreplica.units import MIB

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.blocks import BlockDisk
    from hvreplica.disk.disk import Disk
    from hvreplica.disk.moves import Moves
    from hvreplica.disk.open import Format
    from hvreplica.files import BlockFile, FileSystem
    from hvreplica.progress import ProgressCallback

_LOOK_BYTES = MIB
_WINDOW_BLOCKS = 1 << 16
_MOVE_BYTES = 256 * MIB  # between two syncs


class CompactReport(msgspec.Struct, frozen=True, kw_only=True):
    """What compacting a disk did. Sizes in bytes, of its file.

    released_blocks: lost their places. moved_bytes: went to another place.
    """

    path: str
    format: str
    file_bytes_before: int
    file_bytes: int
    won_bytes: int
    released_blocks: int
    moved_bytes: int


class CompactFile(Protocol):
    """What compacting needs of one format."""

    @property
    def file(self) -> BlockFile:
        """The disk's file."""
        ...

    def begin(self) -> None:
        """Make the file ready for changes that no guest sees."""
        ...

    def held(self, first_block: int, last_block: int) -> NDArray[np.int64]:
        """Return the blocks of a range that have places, sorted."""
        ...

    def unneeded(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of `blocks`, which have places, have no sector that counts."""
        ...

    def can_be_zero(self, block: int) -> bool:
        """Return whether a block that reads as zeros does so without a place."""
        ...

    def forget(self, blocks: NDArray[np.int64]) -> None:
        """Take the places of blocks none of whose sectors counts."""
        ...

    def zero(self, blocks: NDArray[np.int64]) -> None:
        """Take the places of blocks that read as zeros."""
        ...

    def released(self) -> int:
        """Make that durable, take whatever else is not needed then; return how many more blocks that is."""
        ...

    def lower_table(self) -> None:
        """Put the table into a gap before it, durably, if it fits into one: at the end it holds the file."""
        ...

    def plan(self) -> tuple[NDArray[np.int64], Moves]:
        """Return what can be moved, as (file_offset, length), and the moves."""
        ...

    def move(self, parts: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Point to the copies of some of what the plan has, durably."""
        ...

    def cut(self) -> None:
        """Cut off what lies behind the last thing in the file, durably."""
        ...


def compact_disk(
    files: FileSystem,
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,  # noqa: A002 - the word that users type
    parent: str | os.PathLike[str] | None = None,
    clock: Clock,
    progress: ProgressCallback | None = None,
) -> CompactReport:
    """Make the file of a dynamic or differencing disk as short as its blocks allow, durable on return.

    parent: the file of the parent, where the names in a differencing disk do not lead to it. The disk's
    children stay its children. All that has a place is read once. Raises: InvalidTransition for a fixed or
    raw disk; Locked; FormatError and ParentError as open_disk() does.
    """
    disk = open_disk(files, path, writable=True, format=format, parent=parent, clock=clock)
    try:
        before = disk.info().file_bytes
        chosen = _file_of(disk, clock)
        chosen.begin()
        released = _release(disk, chosen, progress)
        chosen.lower_table()
        moved = _move(chosen, progress)
        chosen.cut()
        after = chosen.file.size()
        disk.close()
    except BaseException:
        disk.abandon()
        raise
    return CompactReport(
        path=str(path),
        format=disk.format,
        file_bytes_before=before,
        file_bytes=after,
        won_bytes=before - after,
        released_blocks=released,
        moved_bytes=moved,
    )


def _file_of(disk: Disk, clock: Clock) -> CompactFile:
    if isinstance(disk, VhdDisk):
        return VhdFile(disk)
    if isinstance(disk, VhdxDisk) and disk.info().type != "fixed":
        return VhdxFile(disk, clock)
    raise InvalidTransition(
        "only a dynamic or differencing disk can be compacted",
        path=disk.path,
        field="type",
        expected="dynamic or differencing",
        actual=disk.info().type,
        hint="a fixed disk keeps its space on purpose; make it dynamic with `hvreplica disk convert`",
    )


def _release(disk: BlockDisk | Disk, chosen: CompactFile, progress: ProgressCallback | None) -> int:
    """Take the places of blocks that need none, and return how many."""
    scratch = Scratch(_LOOK_BYTES)
    count = done = 0
    block_count = -(-disk.virtual_bytes // disk.block_bytes)
    for first in range(0, block_count, _WINDOW_BLOCKS):
        blocks = chosen.held(first, min(first + _WINDOW_BLOCKS, block_count) - 1)
        unneeded = chosen.unneeded(blocks)
        chosen.forget(blocks[unneeded])
        blocks = blocks[~unneeded]
        zero = []
        looked = map_ordered(functools.partial(_reads_as_zeros, disk, scratch), blocks.tolist())
        for block, is_zero in zip(blocks.tolist(), looked, strict=True):
            done += disk.block_bytes
            if is_zero and chosen.can_be_zero(block):
                zero.append(block)
            if progress is not None:
                progress(Progress("look", done, max(done, disk.virtual_bytes), raw_bytes=done))
        chosen.zero(np.array(zero, np.int64))
        count += len(zero) + int(unneeded.sum())
    return count + chosen.released()


def _reads_as_zeros(disk: Disk, scratch: Scratch, block: int) -> bool:
    return reads_as_zeros(disk, block * disk.block_bytes, disk.block_bytes, scratch)


def reads_as_zeros(disk: Disk, start: int, length: int, scratch: Scratch) -> bool:
    """Return whether a range of a disk, where it is one, is all zeros. scratch: of at least 1 MiB."""
    end = min(start + length, disk.virtual_bytes)
    for low in range(start, end, _LOOK_BYTES):
        buffer = scratch.take(min(_LOOK_BYTES, end - low))
        disk.read_into(buffer.data, low)
        if not native.is_zero(buffer.data):
            return False
    return True


def _move(chosen: CompactFile, progress: ProgressCallback | None) -> int:
    """Move what lies at the end of the file into gaps, and return how many bytes."""
    movable, moves = chosen.plan()
    lengths = movable[moves.parts, 1]
    total, done = int(lengths.sum()), 0
    for first, last in _batches(lengths):
        parts, targets = moves.parts[first:last], moves.targets[first:last]
        for (start, length), target in zip(movable[parts].tolist(), targets.tolist(), strict=True):
            copy_within(chosen.file, start, target, length)
            done += length
            if progress is not None:
                progress(Progress("move", done, total, raw_bytes=done))
        chosen.move(parts, targets)
    return total


def _batches(lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    totals = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        done = int(totals[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(totals, done + _MOVE_BYTES, "right")))
        yield first, last
        first = last
