"""One writing session of a VHD: allocation, and the order in which what was written becomes durable.

    open for writing   nothing is changed, but a footer that a crash left out is written again
    first change       the footer's copy at offset 0 is made right, because the one at the end may get lost
    ...                blocks are allocated in memory; the file grows by zeros, over its old footer
    flush              1. footer at the new end, bitmaps of new blocks, sync: with them all payload
                       2. BAT, bitmaps of blocks that are in it already, sync
                       3. places that were given back are zeroed and may be used again

VHD has no log, so each step must be right whichever of its sectors a power cut keeps:

- the footer at the end may be old, torn or beyond the end: then the copy at 0 counts, which never changes
- before 2 no BAT entry points to a new block, so whatever stands there belongs to nobody
- in 2 each sector of the BAT is old or new by itself, and each new entry points to a block whose bitmap and
  payload are durable; each sector of a bitmap that is old shows the parent's old bytes, and one that is new
  shows payload that is durable
- a place gets new content only after the BAT entry that pointed there is durably gone

Thread rule: allocate(), discard() and begin() from any thread; flush() from one at a time (it locks itself).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.disk.vhd.space import Space
from hvreplica.errors import kept
from hvreplica.formats.vhd_footer import FOOTER_BYTES, SECTOR_BYTES
from hvreplica.formats.vhdx_bat import PayloadState
from hvreplica.units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from hvreplica.disk.bitmaps import SectorBitmaps
    from hvreplica.disk.vhd.image import Image
    from hvreplica.disk.vhd.table import VhdTable
    from hvreplica.files import BlockFile
    from hvreplica.formats.vhd_footer import Footer


class _Changes(NamedTuple):
    """What one flush makes durable, in the order of its steps."""

    footer_offset: int
    new_bitmaps: list[tuple[int, bytes]]
    later: list[tuple[int, bytes]]
    released: NDArray[np.int64]


class WriteSession:
    """What is needed to change one VHD that is not fixed."""

    # A BAT entry is a place or "ask below": zeros over a parent's bytes need a place.
    has_zero_state = False

    def __init__(
        self,
        file: BlockFile,
        image: Image,
        table: VhdTable,
        bitmaps: SectorBitmaps,
        *,
        footer: Footer | None = None,
    ) -> None:
        """footer: what the file's footers say, where that is not what `image` shows."""
        self._file = file
        self._image = image
        self._table = table
        self._bitmaps = bitmaps
        self._footer = (footer or image.footer).pack()
        self._lock = threading.Lock()  # allocation: table, space, the fields below
        self._flush_lock = threading.Lock()
        self._space: Space | None = None
        self._footer_offset = image.footer.at
        self._fresh: set[int] = set()  # blocks that no BAT entry in the file points to yet
        self._unsynced = False
        self._failure: BaseException | None = None

    def begin(self) -> None:
        """Make the file ready for its first change.

        Does nothing later. Raises: the error that ended the session.
        """
        if self._failure is not None:
            raise kept(self._failure)
        if self._space is None:
            with self._lock:
                self._begin_once()

    def _begin_once(self) -> None:
        if self._space is not None:
            return  # another thread was first
        try:
            if self._file.read(0, FOOTER_BYTES) != self._footer:
                self._file.write(self._footer, 0)
                self._file.sync()
            structures = [row[:2] for row in self._image.structures if row[2] != "footer"]
            structures.append(self._image.table_place(self._footer_offset))
            self._space = Space(
                self._image.geometry,
                bitmap_offsets=self._table.bitmap_offsets(),
                structures=np.array(structures, np.int64),
                end=self._footer_offset,
            )
        except BaseException as error:
            self._failure = kept(error)
            raise

    def changed(self) -> None:
        """Say that payload was written; called after the write and before it returns to its caller."""
        self._unsynced = True

    def allocate(self, blocks: NDArray[np.int64]) -> None:
        """Give each of `blocks`, unique, a place that reads as zeros, unless it has one. After begin()."""
        with self._lock:
            blocks = blocks[~self._table.placed(blocks)]
            self._place(blocks, PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT)

    def allocate_partial(self, blocks: NDArray[np.int64]) -> None:
        """Give each of `blocks`, unique, that has none a place of which no sector counts. After begin()."""
        with self._lock:
            blocks = blocks[~self._table.placed(blocks)]
            self._place(blocks, PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT)

    def _place(self, blocks: NDArray[np.int64], state: PayloadState) -> None:
        if not len(blocks):
            return
        geometry = self._image.geometry
        space = self._begun()
        taken = space.take(len(blocks))
        for file_offset in taken.stale:
            self._file.zero(file_offset, geometry.place_bytes)
        if space.end + FOOTER_BYTES > self._file.size():
            self._file.resize(space.end + FOOTER_BYTES)
        change = (
            self._bitmaps.mark if state == PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT else self._bitmaps.clear
        )
        for block in blocks.tolist():
            # Also where nothing changes: the new place holds no bitmap yet.
            change(block * geometry.sectors_per_block, geometry.sectors_per_block)
        self._fresh.update(blocks.tolist())
        self._table.place(blocks, taken.offsets + geometry.bitmap_bytes, state)

    def promote(self, blocks: NDArray[np.int64]) -> None:
        """Say that all sectors of `blocks`, which have places, count. After begin()."""
        with self._lock:
            self._table.promote(blocks)

    def discard(self, blocks: NDArray[np.int64]) -> None:
        """Make `blocks`, unique, of a disk without a parent, read as zeros without a place. After begin()."""
        space = self._begun()
        with self._lock:
            blocks = blocks[self._table.placed(blocks)]
            offsets = self._table.offsets_of(self._table.entries_of(blocks))
            self._table.set_state(blocks, PayloadState.PAYLOAD_BLOCK_NOT_PRESENT)
            space.release(offsets - self._image.geometry.bitmap_bytes)

    def settle(self, blocks: NDArray[np.int64]) -> None:
        """Do nothing: a block without a place reads as zeros everywhere, or is the parent's."""

    def forget(self, blocks: NDArray[np.int64]) -> None:
        """Take `blocks`, unique, out of this file, so that their bytes are the parent's. After begin()."""
        self.discard(blocks)

    def move(self, blocks: NDArray[np.int64], bitmap_offsets: NDArray[np.int64]) -> None:
        """Let the BAT point to `bitmap_offsets`, where the caller has put copies of blocks with places.

        After begin().
        """
        with self._lock:
            self._table.move(blocks, bitmap_offsets + self._image.geometry.bitmap_bytes)

    def take_place(self) -> int:
        """Return where the bitmap of a block begins that belongs to none yet. After begin()."""
        with self._lock:
            taken = self._begun().take(1)
        return int(taken.offsets[0])

    def reserve(self, length: int) -> int:
        """Return where `length` bytes, a multiple of 512, begin behind all that is in use. After begin()."""
        with self._lock:
            space = self._begun()
            file_offset, space.end = space.end, space.end + length
            self._unsynced = True
        return file_offset

    def replace_footer(self, footer: Footer) -> None:
        """Flush, and make another footer the one that counts, durably.

        First the copy, which does not count while there is one at the end. After begin().
        """
        self.flush()
        with self._flush_lock:
            try:
                self._footer = footer.pack()
                for file_offset in (0, self._begun().end):
                    self._file.write(self._footer, file_offset)
                    self._file.sync()
                self._footer_offset = self._begun().end
            except BaseException as error:
                self._failure = kept(error)
                raise

    def cut(self, *, floor: int) -> None:
        """Flush, and cut off what lies behind the last thing in the file, durably, but nothing before
        `floor`.

        At any moment there is a footer at the file's end. A new begin() comes before more changes. After
        begin().
        """
        self.flush()
        with self._flush_lock:
            try:
                end = min(align_up(max(floor, self._table.end()), SECTOR_BYTES), self._begun().end)
                if end + FOOTER_BYTES < self._file.size():
                    self._file.write(self._footer, end)
                    self._file.sync()
                    self._file.resize(end + FOOTER_BYTES)
                    self._file.sync()
                    self._footer_offset = end
                self._space = None
            except BaseException as error:
                self._failure = kept(error)
                raise

    def flush(self) -> None:
        """Make all that was written before durable.

        A failure ends the session: every later call raises it.
        """
        with self._flush_lock:
            if self._failure is not None:
                raise kept(self._failure)
            if self._space is None or not (
                self._unsynced or self._table.is_dirty or self._bitmaps.dirty_count
            ):
                return
            try:
                self._flush(self._space)
            except BaseException as error:
                self._failure = kept(error)
                raise

    def publish(self) -> None:
        """Put changed entries and bitmaps into the file, by a flush: none may be durable too early."""
        if self._table.is_dirty or self._bitmaps.dirty_count:
            self.flush()

    def _flush(self, space: Space) -> None:
        with self._lock:
            # Whoever writes from here on sets it again; whoever wrote before is covered by the sync below.
            self._unsynced = False
            changes = self._take_changes(space)
        if changes.footer_offset != self._footer_offset:
            self._file.write(self._footer, changes.footer_offset)
        self._write(changes.new_bitmaps)
        self._file.sync()
        self._footer_offset = changes.footer_offset
        if changes.later:
            self._write(changes.later)
            self._file.sync()
        self._bitmaps.written()
        if len(changes.released):
            for file_offset in changes.released.tolist():
                self._file.zero(file_offset, self._image.geometry.place_bytes)
            with self._lock:
                space.end_flush(changes.released)

    def _take_changes(self, space: Space) -> _Changes:
        fresh, self._fresh = self._fresh, set()
        new_bitmaps: list[tuple[int, bytes]] = []
        later: list[tuple[int, bytes]] = []
        for block, page in self._bitmaps.take_dirty():
            file_offset = self._table.bitmap_offset(block)
            if file_offset is not None:
                (new_bitmaps if block in fresh else later).append((file_offset, page.tobytes()))
        later += self._table.take_dirty()
        return _Changes(space.end, new_bitmaps, later, space.begin_flush())

    def _write(self, rows: Iterable[tuple[int, bytes]]) -> None:
        for file_offset, data in rows:
            self._file.write(data, file_offset)

    def clear(self) -> None:
        """Flush: that is all it takes for any program to open the file."""
        self.flush()

    def _begun(self) -> Space:
        if self._space is None:
            raise AssertionError("begin() comes first")
        return self._space
