"""One writing session of a VHDX: header identity, allocation, and the flush that makes both last.

    open for writing   nothing is changed, but a log that is not empty is replayed and cleared
    first change       headers get new GUIDs and are durable; what lies behind the last block is cut off
    ...                blocks are allocated in memory; the file grows by zeros
    flush              payload synced, changed BAT sectors through the log, places of freed blocks punched
    clear              log emptied: any other program opens the file

Crash safety rests on three facts. A place is handed out only if it reads as zeros (grown, or zeroed after the
flush that freed it), so a BAT entry may become durable before its payload. flush() copies the changed entries
and pages of sector bitmaps before it syncs payload, so none becomes durable before what it speaks of. And
pages go before entries, those of bitmap blocks before those of payload (Bat.take_dirty), so a block that
covers a parent's bytes never shows more of itself than was written.

Thread rule: allocate(), discard() and begin() from any thread; flush() from one at a time (it locks itself).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.vhdx.bitmaps import page_offset
from hvreplica.disk.vhdx.ring import ENTRY_DESCRIPTOR_COUNT_MAX, FileSizes, LogRing
from hvreplica.disk.vhdx.space import Space
from hvreplica.errors import kept
from hvreplica.formats.vhdx_bat import BITMAP_BLOCK_BYTES, PayloadState, has_place, offsets_of, states_of
from hvreplica.units import MIB, align_up

if TYPE_CHECKING:
    import uuid

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.bitmaps import SectorBitmaps
    from hvreplica.disk.vhdx.bat import Bat
    from hvreplica.disk.vhdx.headers import Headers
    from hvreplica.disk.vhdx.image import Image
    from hvreplica.files import BlockFile

_NEW_LOG_BYTES = MIB
# Absent states whose content is only *allowed* to be zeros: explicit zeros turn them into PAYLOAD_BLOCK_ZERO.
_LOOSE_STATES = (
    PayloadState.PAYLOAD_BLOCK_UNDEFINED,
    PayloadState.PAYLOAD_BLOCK_UNMAPPED,
    PayloadState.PAYLOAD_BLOCK_UNMAPPED_V095,
)


class WriteSession:
    """What is needed to change one VHDX.

    bitmaps: of a differencing disk, else None.
    """

    has_zero_state = True

    def __init__(
        self,
        file: BlockFile,
        headers: Headers,
        image: Image,
        bat: Bat,
        *,
        bitmaps: SectorBitmaps | None,
        clock: Clock,
    ) -> None:
        self._file = file
        self._headers = headers
        self._image = image
        self._bat = bat
        self._bitmaps = bitmaps
        self._clock = clock
        self._lock = threading.Lock()  # allocation: bat, space, the flags below
        self._flush_lock = threading.Lock()
        self._space: Space | None = None
        self._ring: LogRing | None = None
        self._first_guid: uuid.UUID | None = None
        self._unsynced = False
        self._changes_data = False
        self._reuses_places = False  # since the last flush began
        self._durable_bytes = 0  # how long the file is at least after a power cut
        self._failure: BaseException | None = None

    @property
    def has_begun(self) -> bool:
        """Whether anything may have been changed."""
        return self._space is not None

    def begin(self) -> None:
        """Make the file ready for its first change.

        Does nothing later. Raises: the error that ended the session.
        """
        self._begin_as(changes_data=True)

    def begin_unseen(self) -> None:
        """Do as begin() for changes that no guest sees, such as moving blocks.

        DataWriteGuid stays, so that children still know their parent. Spec: [MS-VHDX] 2.2.2.
        """
        self._begin_as(changes_data=False)

    def _begin_as(self, *, changes_data: bool) -> None:
        if self._failure is not None:
            raise kept(self._failure)
        if self._space is None or (changes_data and not self._changes_data):
            with self._lock:
                self._begin_once(changes_data=changes_data)

    def _begin_once(self, *, changes_data: bool) -> None:
        if self._space is not None and (self._changes_data or not changes_data):
            return  # another thread was first
        self._bat.check_all()  # first, and outside of the try: refused here, the session lives on
        space = self._find_space() if self._space is None else None
        try:
            self._change_identity(changes_data=changes_data)
            if space is not None:
                self._begin(space)
                self._space = space
            self._changes_data = changes_data
        except BaseException as error:
            self._failure = kept(error)
            raise

    def _change_identity(self, *, changes_data: bool) -> None:
        """Change identity before content. Spec: [MS-VHDX] 2.2.2.1, and 2.2.2 for DataWriteGuid."""
        changes = {"file_write_guid": self._clock.guid()}
        if changes_data:
            changes["data_write_guid"] = self._first_guid or self._clock.guid()
        self._headers.update(**changes)

    def _begin(self, space: Space) -> None:
        if self._headers.current.log_length == 0:
            # Legal while LogGuid is zero, but then there is no way to change the BAT: give the file a log.
            log_offset, space.end = space.end, space.end + _NEW_LOG_BYTES
            self._file.resize(space.end)
            self._file.sync()
            self._headers.update(log_offset=log_offset, log_length=_NEW_LOG_BYTES)
        if self._file.size() != space.end:
            # A shorter file is not possible here; what is cut off is in no use, and growth then reads as
            # zeros.
            self._file.resize(space.end)

    def _find_space(self) -> Space:
        return Space(
            block_bytes=self._image.parameters.block_bytes,
            used=self._used(),
            file_bytes=self._file.size(),
            keep_tail=self._image.parameters.is_fixed,
        )

    def _used(self) -> NDArray[np.int64]:
        rows = [(file_offset, length) for file_offset, length, _ in self._image.structures]
        block_bytes = self._image.parameters.block_bytes
        size = self._file.size()
        anchors = self._bat.anchors()
        anchors = anchors[(anchors > 0) & (anchors <= size - block_bytes)]
        lengths = np.full(len(anchors), block_bytes, np.int64)
        return np.concatenate(
            (np.array(rows, np.int64), self._bat.apart_ranges(), np.column_stack((anchors, lengths)))
        )

    def identify(self, data_write_guid: uuid.UUID) -> None:
        """Begin, and give the file this DataWriteGuid, durably and after all that was written before.

        For those who know better than begin() whether the guest's view changes, and into what: a merge, and
        changes that the guest does not see. Spec: [MS-VHDX] 2.2.2.
        """
        if not self._changes_data:
            self._first_guid = data_write_guid
        self.begin()
        self.flush()
        if self._headers.current.data_write_guid == data_write_guid:
            return
        with self._flush_lock:
            try:
                self._headers.update(data_write_guid=data_write_guid)
            except BaseException as error:
                self._failure = kept(error)
                raise

    def foreign(self) -> tuple[object, ...] | None:
        """Return what tells a header that another program wrote since begin() from others; None without one.

        Every program that writes to a VHDX begins with that. Spec: [MS-VHDX] 2.2.2.
        """
        with self._flush_lock, self._lock:
            return self._headers.foreign()

    def changed(self) -> None:
        """Say that payload was written; called after the write and before it returns to its caller."""
        self._unsynced = True

    def allocate(self, blocks: NDArray[np.int64]) -> None:
        """Give each of `blocks`, unique, a place that reads as zeros, unless it has one. After begin()."""
        if not len(blocks):
            return
        with self._lock:
            self._place(blocks[~self._bat.placed(blocks)], PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT)

    def allocate_partial(self, blocks: NDArray[np.int64]) -> None:
        """Give each of `blocks`, unique, that has none a place of which nothing counts. After begin()."""
        if not len(blocks):
            return
        with self._lock:
            blocks = blocks[~self._bat.placed(blocks)]
            for block in blocks.tolist():
                self._clear_bits(block)
            self._place(blocks, PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT)

    def _place(self, blocks: NDArray[np.int64], state: PayloadState) -> None:
        if not len(blocks):
            return
        space = self._begun()
        taken = space.take(len(blocks))
        self._reuses_places |= not taken.is_new
        for file_offset in taken.stale:
            self._file.zero(file_offset, self._image.parameters.block_bytes)
        if space.end > self._file.size():
            self._file.resize(space.end)
        self._bat.place(blocks, taken.offsets, state)

    def _clear_bits(self, block: int) -> None:
        """Make sure that the block's chunk has a bitmap, in which none of the block's sectors counts."""
        if self._bitmaps is None:
            raise AssertionError("only a disk with a parent has partially present blocks")
        chunk = block // self._image.geometry.chunk_ratio
        if self._bat.bitmap_block(chunk) is None:
            space = self._begun()
            file_offset, space.end = space.end, space.end + BITMAP_BLOCK_BYTES
            self._file.resize(max(space.end, self._file.size()))
            self._bat.place_bitmap(chunk, file_offset)
        sectors = self._image.parameters.block_bytes // self._bitmaps.sector_bytes
        # Bits of a block without a place mean nothing, and may stand there from an earlier life of the block.
        if not self._bitmaps.none_set(block * sectors, sectors):
            self._bitmaps.clear(block * sectors, sectors)

    def promote(self, blocks: NDArray[np.int64]) -> None:
        """Say that all sectors of `blocks`, which have places, count. After begin()."""
        with self._lock:
            self._bat.promote(blocks)

    def discard(self, blocks: NDArray[np.int64]) -> None:
        """Make `blocks`, unique, read as zeros without a place of their own. After begin()."""
        # PAYLOAD_BLOCK_ZERO is the only absent state that every reader must show as zeros.
        self._give_back(blocks, PayloadState.PAYLOAD_BLOCK_ZERO)

    def forget(self, blocks: NDArray[np.int64]) -> None:
        """Take `blocks`, unique, out of this file, so that their bytes are the parent's. After begin()."""
        self._give_back(blocks, PayloadState.PAYLOAD_BLOCK_NOT_PRESENT)

    def _give_back(self, blocks: NDArray[np.int64], state: PayloadState) -> None:
        space = self._begun()
        with self._lock:
            entries = self._bat.entries_of(blocks)
            self._bat.set_state(blocks, state)
            space.release(offsets_of(entries[has_place(entries)]))

    def settle(self, blocks: NDArray[np.int64]) -> None:
        """Make those of `blocks` read as zeros everywhere that are absent in a state which only allows zeros.

        A block that another thread has just allocated is left alone. After begin().
        """
        if not len(blocks):
            return
        with self._lock:
            loose = np.unique(blocks[np.isin(states_of(self._bat.entries_of(blocks)), _LOOSE_STATES)])
            if len(loose):
                self._bat.set_state(loose, PayloadState.PAYLOAD_BLOCK_ZERO)

    def flush(self) -> None:
        """Make all that was written before durable.

        A failure ends the session: every later call raises it.
        """
        with self._flush_lock:
            if self._failure is not None:
                raise kept(self._failure)
            if self._space is None or not (self._unsynced or self._bat.is_dirty or self._has_dirty_pages):
                return
            try:
                self._flush(self._space)
            except BaseException as error:
                self._failure = kept(error)
                raise

    def publish(self) -> None:
        """Put changed entries and pages where who opens the file after this process's death finds them.

        Without a sync where a power cut may keep any part of it: new places at the end of the file, which
        hold zeros or what was written, and blocks that gave theirs back. All else is flushed: the pages of a
        sector bitmap would show more of a parent's block than was written, and a place used again its bytes
        of before.
        """
        if not (self._bat.is_unpublished or self._has_dirty_pages):
            return
        if self._bitmaps is not None or not self._append():
            self.flush()

    def _append(self) -> bool:
        """Publish changed entries by the log alone, if that may and can be."""
        with self._flush_lock, self._lock:
            if self._failure is not None:
                raise kept(self._failure)
            if self._ring is None or self._reuses_places:
                return False
            file_offsets, data = self._bat.unpublished()
            if len(file_offsets) > ENTRY_DESCRIPTOR_COUNT_MAX:
                return False
            sizes = FileSizes(flushed_bytes=self._durable_bytes, last_bytes=self._begun().end)
            try:
                if not self._ring.append(file_offsets, data, sizes):
                    return False
            except BaseException as error:
                self._failure = kept(error)
                raise
            self._bat.published()
            return True

    @property
    def _has_dirty_pages(self) -> bool:
        return self._bitmaps is not None and self._bitmaps.dirty_count > 0

    def _flush(self, space: Space) -> None:
        with self._lock:
            # Whoever writes from here on sets it again; whoever wrote before is covered by the sync below.
            self._unsynced = False
            self._reuses_places = False
            file_offsets, data = self._take_changes()
            released = space.begin_flush()
            sizes = FileSizes(flushed_bytes=self._file.size(), last_bytes=space.end)
        self._file.sync()
        self._durable_bytes = sizes.flushed_bytes
        if len(file_offsets):
            self._commit(file_offsets, data, sizes)
        if self._bitmaps is not None:
            self._bitmaps.written()
        if len(released):
            for file_offset, length in space.ranges(released).tolist():
                self._file.zero(file_offset, length)
            with self._lock:
                space.end_flush(released)

    def _take_changes(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return (file offsets, 4096 bytes each) of all that has to pass through the log, in this order."""
        pages = [] if self._bitmaps is None else self._bitmaps.take_dirty()
        file_offsets, data = self._bat.take_dirty()
        if not pages:
            return file_offsets, data
        offsets = np.array([page_offset(self._bat, number) for number, _ in pages], np.int64)
        return np.concatenate((offsets, file_offsets)), np.concatenate(
            (np.stack([page for _, page in pages]), data)
        )

    def commit_structures(self, file_offsets: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Flush, and then change sectors of metadata or region tables, durably and all of them or none.

        data[i]: the new 4096 bytes of file_offsets[i]; at most what one log entry holds. What the open disk
        knows of the structures stays as it was: close it and open it again. After begin(). Spec: [MS-VHDX]
        2.3.1.
        """
        if len(file_offsets) > ENTRY_DESCRIPTOR_COUNT_MAX:
            raise AssertionError("only what one entry of the log holds changes at once")
        self.flush()
        with self._flush_lock:
            try:
                with self._lock:
                    sizes = FileSizes(flushed_bytes=self._file.size(), last_bytes=self._begun().end)
                self._file.sync()
                self._commit(file_offsets, data, sizes)
            except BaseException as error:
                self._failure = kept(error)
                raise

    def move(self, indices: NDArray[np.int64], file_offsets: NDArray[np.int64]) -> None:
        """Let entries of the BAT point to `file_offsets`, where the caller has put copies of their blocks.

        indices: in the BAT, of payload and sector-bitmap blocks that have places. After begin().
        """
        with self._lock:
            self._bat.move(indices, file_offsets)

    def release_bitmaps(self, chunks: NDArray[np.int64]) -> None:
        """Take away the sector bitmaps of chunks in which, durably, no block is partially present.

        Their places come back with the next session.
        """
        if len(chunks):
            with self._lock:
                self._bat.release_bitmaps(chunks)

    def reserve(self, length: int) -> int:
        """Return where `length` bytes of zeros, a multiple of 1 MiB, begin that are new at the file's end.

        Nothing names them yet: the next session would cut them off. After begin().
        """
        with self._lock:
            space = self._begun()
            file_offset, space.end = space.end, space.end + length
            self._file.resize(max(space.end, self._file.size()))
        return file_offset

    def cut(self) -> None:
        """Flush, empty the log, and cut off what lies behind the last thing in the file, durably.

        The log goes first: its entries say how long the file is, and a replay refuses a shorter one. After
        begin().
        """
        self.clear()
        with self._flush_lock, self._lock:
            try:
                end = align_up(int(self._used().sum(axis=1).max()), MIB)
                if end < self._file.size():
                    self._file.resize(end)
                    self._file.sync()
                self._space = self._find_space()
            except BaseException as error:
                self._failure = kept(error)
                raise

    def _commit(self, file_offsets: NDArray[np.int64], data: NDArray[np.uint8], sizes: FileSizes) -> None:
        if self._ring is None:
            self._ring = LogRing(self._file, self._headers, self._clock.guid())
        self._ring.commit(file_offsets, data, sizes)

    def clear(self) -> None:
        """Flush, and empty the log."""
        self.flush()
        with self._flush_lock:
            if self._ring is not None:
                self._ring.clear()

    def _begun(self) -> Space:
        if self._space is None:
            raise AssertionError("begin() comes first")
        return self._space
