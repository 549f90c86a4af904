"""Writing the VHDX's own log: BAT sectors become durable all together, once per flush.

One round of commit():

    sync                 all payload, and the BAT sectors that the round before wrote in place, are durable
    write entries        behind the last sequence, which a replay finds until the new one stands
    sync                 from here the new sequence is found
    header               first round of a session only: LogGuid becomes that of the entries
    write BAT in place   durable with the next sync, at the latest that of the next round

The new sequence starts at its own first entry, because everything before it is durable in place by then. A
round uses at most half of the ring, so that two sequences always fit side by side.

append() lengthens the sequence that stands, without a sync: what a process that dies has appended is replayed
by who opens the file next. A power cut may keep any of it, so only what may become durable early goes there.

Deviates from [MS-VHDX] 2.2.2, which wants LogGuid in the header before the log is written: LogGuid is zero
until then, so nothing in the ring counts, while the other order would leave, after a power cut, a LogGuid
without any valid entry, a file that 2.3.3 calls corrupt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hvreplica.formats.guid import NIL
from hvreplica.formats.vhdx_log import (
    DESCRIPTORS_IN_HEADER_SECTOR,
    LOG_SECTOR_BYTES,
    LogEntryHeader,
    entry_bytes,
    pack_entry,
)

if TYPE_CHECKING:
    import uuid

    import numpy as np
    from numpy.typing import NDArray

    from hvreplica.disk.vhdx.headers import Headers
    from hvreplica.files import BlockFile

# qemu cannot replay an entry with more: it refuses a second descriptor sector.
ENTRY_DESCRIPTOR_COUNT_MAX = DESCRIPTORS_IN_HEADER_SECTOR


class FileSizes(NamedTuple):
    """How long the file is, in multiples of 1 MiB.

    flushed_bytes: the size that is durable. last_bytes: the end of what is used.
    """

    flushed_bytes: int
    last_bytes: int


class LogRing:
    """The log of one session. Owned by the flushing thread; a failure leaves it unusable."""

    def __init__(self, file: BlockFile, headers: Headers, log_guid: uuid.UUID) -> None:
        """log_guid: new, not zero. The ring is the one that the current header names; its length is not 0."""
        self._file = file
        self._headers = headers
        self._log_guid = log_guid
        self._log_offset = headers.current.log_offset
        self._log_length = headers.current.log_length
        self._position = 0
        self._tail = 0
        self._sequence_number = 0

    def commit(self, file_offsets: NDArray[np.int64], data: NDArray[np.uint8], sizes: FileSizes) -> None:
        """Make data[i], 4096 bytes, the durable content of file_offsets[i]; the caller has synced payload.

        Returns when a replay would restore all of it. Spec: [MS-VHDX] 2.3.
        """
        done = 0
        while done < len(file_offsets):
            if done:
                self._file.sync()
            count = self._write_round(file_offsets[done:], data[done:], sizes)
            self._file.sync()
            if self._headers.current.log_guid != self._log_guid:
                self._headers.update(log_guid=self._log_guid, log_version=0)
            for at in range(done, done + count):
                self._file.write(data[at].data, int(file_offsets[at]))
            done += count

    def append(self, file_offsets: NDArray[np.int64], data: NDArray[np.uint8], sizes: FileSizes) -> bool:
        """Put data[i], 4096 bytes, behind what the log holds for file_offsets[i], without making it durable.

        Changes nothing and returns False if nothing was committed since the log was empty, or if the sequence
        would take more than its half of the ring.
        """
        length = entry_bytes(len(file_offsets))
        used = (self._position - self._tail) % self._log_length
        if self._headers.current.log_guid != self._log_guid or used + length > self._log_length // 2:
            return False
        self._write_entry(file_offsets, data, sizes)
        return True

    def clear(self) -> None:
        """Empty the log, so that any program opens the file without replay; syncs what it covered before."""
        if self._headers.current.log_guid != NIL:
            self._file.sync()
            self._headers.update(log_guid=NIL)

    def _write_round(self, file_offsets: NDArray[np.int64], data: NDArray[np.uint8], sizes: FileSizes) -> int:
        """Write entries for as many sectors as half of the ring holds, and return how many."""
        room = self._log_length // 2
        self._tail = self._position
        done = 0
        while done < len(file_offsets):
            count = min(len(file_offsets) - done, ENTRY_DESCRIPTOR_COUNT_MAX, room // LOG_SECTOR_BYTES - 1)
            if count < 1:
                break
            room -= self._write_entry(file_offsets[done : done + count], data[done : done + count], sizes)
            done += count
        return done

    def _write_entry(self, file_offsets: NDArray[np.int64], data: NDArray[np.uint8], sizes: FileSizes) -> int:
        """Write the next entry of the sequence, and return its length."""
        self._sequence_number += 1
        header = LogEntryHeader(
            entry_length=entry_bytes(len(file_offsets)),
            tail=self._tail,
            sequence_number=self._sequence_number,
            descriptor_count=len(file_offsets),
            log_guid=self._log_guid,
            flushed_file_offset=sizes.flushed_bytes,
            last_file_offset=sizes.last_bytes,
            log_offset=self._position,
        )
        entry = pack_entry(header, file_offsets, data)
        self._write_wrapped(entry)
        return len(entry)

    def _write_wrapped(self, entry: bytes) -> None:
        view = memoryview(entry)
        first = min(len(view), self._log_length - self._position)
        self._file.write(view[:first], self._log_offset + self._position)
        if first < len(view):
            self._file.write(view[first:], self._log_offset)
        self._position = (self._position + len(view)) % self._log_length
