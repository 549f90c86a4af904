"""Read a replica's disk block by block for a comparison that ships only what differs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk import open_disk
from hvreplica.errors import FieldOutOfRange, NoSuchPoint
from hvreplica.formats.fingerprint import BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, FINGERPRINT_BYTES
from hvreplica.formats.messages import FINGERPRINT_BLOCKS_MAX
from hvreplica.store.apply import finish
from hvreplica.store.check import require_sound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.store.home import VmHome

_WINDOW_BYTES = 4 << 20  # read at a time
_SEARCH_BYTES = 4 << 30  # of the disk, for each look at where data is


class BlockReader:
    """One disk of a VM, open for reading and held against changes until close(). One owner."""

    def __init__(self, home: VmHome, target: int) -> None:
        """Finish what waits to be applied, then open. Raises: NoSuchPoint before the first point, Locked."""
        finish(home)
        if not any(
            row.spec.index == target and row.removed_s is None for row in home.catalog.disks(home.vm_id)
        ):
            raise NoSuchPoint(f"VM {home.name!r} has no disk {target}", field="disk", actual=target)
        if not any(row.spec.index == target and row.is_held for row in home.catalog.disks(home.vm_id)):
            raise NoSuchPoint(f"VM {home.name!r} has no complete replica yet", path=home.paths.folder)
        require_sound(home)
        self.target = target
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(home.shared())
            self._disk = open_disk(
                home.files, home.paths.disk(target), writable=False, format="vhdx", clock=home.clock
            )
            stack.callback(self._disk.close)
            self._stack = stack.pop_all()
        self._window = np.empty(0, np.uint8)

    def close(self) -> None:
        """Close the disk and let it be changed again."""
        self._stack.close()

    def fingerprints(self, first_block: int, block_count: int, block_bytes: int) -> bytes:
        """Do what VmReplica.fingerprints() says."""
        virtual_bytes = self._disk.virtual_bytes
        if not BLOCK_BYTES_MIN <= block_bytes <= BLOCK_BYTES_MAX or block_bytes % BLOCK_BYTES_MIN:
            raise FieldOutOfRange(
                "fingerprints need blocks of whole sectors",
                field="block_bytes",
                expected=f"{BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX}, a multiple of {BLOCK_BYTES_MIN}",
                actual=block_bytes,
            )
        blocks = -(-virtual_bytes // block_bytes)
        if first_block < 0 or not 1 <= block_count <= min(FINGERPRINT_BLOCKS_MAX, blocks - first_block):
            raise FieldOutOfRange(
                "the disk has no such blocks",
                field="block_count",
                expected=f"up to {FINGERPRINT_BLOCKS_MAX} within {blocks}",
                actual=f"{block_count} from {first_block} on",
            )
        rows = np.zeros((block_count, FINGERPRINT_BYTES), np.uint8)
        end = min((first_block + block_count) * block_bytes, virtual_bytes)
        for start, length in self._runs(first_block * block_bytes, end, block_bytes):
            data = self._read(start, length)
            row = start // block_bytes - first_block
            count = -(-length // block_bytes)
            native.fingerprints(data, block_bytes, out=rows[row : row + count])
        return rows.tobytes()

    def next_data(self, disk_offset: int) -> int:
        """Do what VmReplica.next_data() says."""
        virtual_bytes = self._disk.virtual_bytes
        position = max(disk_offset, 0)
        while position < virtual_bytes:
            end = min(position + _SEARCH_BYTES, virtual_bytes)
            extents = self._disk.extents(position, end)
            if len(extents):
                return int(extents[0, 0])
            position = end
        return virtual_bytes

    def _runs(self, start: int, end: int, block_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (disk_offset, length) of whole blocks that may hold data, none longer than a window."""
        extents = self._disk.extents(start, end).astype(np.int64)
        if not len(extents):
            return
        firsts = (extents[:, 0] - start) // block_bytes
        lasts = -(-(extents[:, 0] + extents[:, 1] - start) // block_bytes)
        for first, last in _joined(firsts, lasts):
            position = start + first * block_bytes
            stop = min(start + last * block_bytes, end)
            step = max(_WINDOW_BYTES // block_bytes, 1) * block_bytes
            while position < stop:
                yield position, min(step, stop - position)
                position += step

    def _read(self, disk_offset: int, length: int) -> NDArray[np.uint8]:
        if len(self._window) < length:
            self._window = np.empty(length, np.uint8)
        view = self._window[:length]
        self._disk.read_into(view.data, disk_offset)
        return view


def _joined(firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Join sorted ranges [first, last) that touch or overlap."""
    reached = np.maximum.accumulate(lasts)
    breaks = np.flatnonzero(firsts[1:] > reached[:-1]) + 1
    starts = firsts[np.concatenate(([0], breaks))]
    ends = reached[np.concatenate((breaks - 1, [len(reached) - 1]))]
    return [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
