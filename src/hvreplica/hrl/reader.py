"""Read a closed log: the two-pass walk, back along the metadata blocks, then forward through their entries.

    pass 1   EOLLocation - MetadataSize -> PreviousMetadataLocation -> ... -> the block whose distance is 0
    pass 2   block by block, oldest first: its entries, whose data fills the space up to the block

Guarantees: every location, count and length was checked before use; locations only go down, so no chain
loops; what is yielded keeps to the rules of [MS-HRL] 2.3 to 2.5, entry checksums included. Data checksums are
verify.py's task. Memory: 12 bytes per metadata block, at most METADATA_BLOCKS_MAX of them, and one batch of
entries.
"""

from __future__ import annotations

import contextlib
from array import array
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np

from hvreplica.errors import FieldOutOfRange, HvReplicaError, NotClosed
from hvreplica.formats.hrl import (
    FILE_TYPE_HRL,
    HEADER,
    HEADER_BYTES,
    METADATA_ENTRY,
    METADATA_HEADER_BYTES,
    LogHeader,
    MetadataHeader,
)
from hvreplica.formats.hrl_entries import entry_offset, find_entry_fault, parse_entries
from hvreplica.native import HRL_ENTRY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from numpy.typing import NDArray

    from hvreplica.files import BlockFile
    from hvreplica.formats.hrl_entries import EntryFault

# 2**22 blocks of 127 entries of 4 KiB are 2 TiB of changes in one log; the locations then take 48 MiB.
METADATA_BLOCKS_MAX = 1 << 22
ENTRIES_PER_BATCH = 1 << 16
_ENTRIES_PER_CHECK = 1 << 13
_BLOCKS_PER_TABLE = 1 << 12  # blocks may be empty, so their entries alone bound nothing


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors from code that sees bytes only the name of their file."""
    try:
        yield
    except HvReplicaError as error:
        error.at(path)
        raise


def read_header(file: BlockFile, *, file_type: int = FILE_TYPE_HRL) -> LogHeader:
    """Return the validated header of the log in `file`, closed or not. Raises: FormatError."""
    with naming(file.path):
        header = LogHeader.unpack(file.read(0, min(HEADER_BYTES, file.size())))
        header.validate(file_type=file_type)
    return header


class LogFiles(Protocol):
    """Where logs are opened: a FileSystem, or what finds a log inside of another file."""

    def open(self, path: Path) -> BlockFile:
        """Open what is named so, for reading."""
        ...


class LogReader:
    """A closed log, open for reading. One owner; concurrent iterators are allowed.

    file_type: FILE_TYPE_HRL or FILE_TYPE_UNDO; a log of another type is refused. Raises on opening: NotClosed
    if its writer never closed it or gave up; FormatError if header or chain of metadata blocks are damaged.
    Spec: [MS-HRL] 2.5.
    """

    def __init__(self, files: LogFiles, path: Path, *, file_type: int = FILE_TYPE_HRL) -> None:
        self._path = Path(path)
        self._file = files.open(self._path)
        try:
            self._header = read_header(self._file, file_type=file_type)
            with naming(self._path):
                _require_closed(self._header)
                self._header.validate_within(self._file.size())
                self._locations, self._counts = _walk_back(self._file, self._header)
        except BaseException:
            self._file.close()
            raise

    @property
    def path(self) -> Path:
        """The log's name."""
        return self._path

    @property
    def file(self) -> BlockFile:
        """The open file, for reading data at an entry's log_offset; closed with the reader."""
        return self._file

    @property
    def header(self) -> LogHeader:
        """The validated header."""
        return self._header

    @property
    def log_bytes(self) -> int:
        """The log's length: its EOLLocation. What the file holds behind it does not belong to the log."""
        return self._header.eol_location

    @property
    def block_count(self) -> int:
        """How many metadata blocks it has."""
        return len(self._locations)

    @property
    def block_offsets(self) -> array[int]:
        """Where the metadata blocks begin, ascending; not to be changed."""
        return self._locations

    @property
    def entry_count(self) -> int:
        """How many entries it has."""
        return self._header.total_metadata_entries

    @property
    def data_bytes(self) -> int:
        """The bytes of data of all entries."""
        return self.log_bytes - HEADER_BYTES - self.block_count * self._header.metadata_size

    def blocks(self, *, disk_bytes: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield the entries of each metadata block, oldest first, as arrays of native.HRL_ENTRY, some empty.

        disk_bytes: the guest's disk size, where entries beyond it shall be refused. Raises: FormatError.
        """
        for table, ends in self._tables(_ENTRIES_PER_CHECK, disk_bytes):
            for start, end in pairwise([0, *ends]):
                yield table[start:end]

    def entries(
        self, max_count: int = ENTRIES_PER_BATCH, *, disk_bytes: int | None = None
    ) -> Iterator[NDArray[Any]]:
        """Yield all entries, oldest first, at most `max_count` at a time, but no less than a whole block.

        Raises: FormatError, as blocks().
        """
        for table, _ in self._tables(max_count, disk_bytes):
            if len(table):
                yield table

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tables(self, max_count: int, disk_bytes: int | None) -> Iterator[tuple[NDArray[Any], list[int]]]:
        """Yield the checked entries of a few blocks as one table, and where in it each block ends."""
        first = 0
        while first < self.block_count:
            stop, total = first + 1, self._counts[first]
            stop_max = min(first + _BLOCKS_PER_TABLE, self.block_count)
            while stop < stop_max and total + self._counts[stop] <= max_count:
                total += self._counts[stop]
                stop += 1
            yield self._read_table(first, stop, total, disk_bytes)
            first = stop

    def _read_table(
        self, first: int, stop: int, total: int, disk_bytes: int | None
    ) -> tuple[NDArray[Any], list[int]]:
        size = self._header.metadata_size
        block = bytearray(size)
        table = np.empty(total, HRL_ENTRY)
        ends: list[int] = []
        start = 0
        data_offset = self._locations[first - 1] + size if first else HEADER_BYTES
        with naming(self._path):
            for index in range(first, stop):
                location, count = self._locations[index], self._counts[index]
                self._file.read_into(block, location)
                table[start : start + count] = parse_entries(
                    block, count=count, data_offset=data_offset, block_offset=location
                )
                start += count
                ends.append(start)
                data_offset = location + size
        fault = find_entry_fault(table, disk_bytes=disk_bytes)
        if fault is not None:
            number = bisect_right(ends, fault.index)
            row = fault.index - (ends[number - 1] if number else 0)
            self._raise_fault(fault, entry_offset(self._locations[first + number], row, fault.field))
        return table, ends

    def _raise_fault(self, fault: EntryFault, offset: int) -> NoReturn:
        raise FieldOutOfRange(
            fault.message,
            path=self._path,
            offset=offset,
            field=fault.field,
            expected=fault.expected,
            actual=fault.actual,
            spec=METADATA_ENTRY.spec,
        )


def _require_closed(header: LogHeader) -> None:
    if not header.is_closed:
        raise NotClosed(
            "the log was never closed",
            field="eol_location",
            offset=HEADER.offset_of("eol_location"),
            expected="the end of the log",
            actual=0,
            spec=HEADER.spec,
            hint="its writer runs or was cut off; `hvreplica log recover` closes it at its last whole block",
        )
    if header.error_code:
        raise NotClosed(
            "the writer of the log recorded an error",
            field="error_code",
            offset=HEADER.offset_of("error_code"),
            expected=0,
            actual=header.error_code,
            spec=HEADER.spec,
            hint="do not apply it; a comparison of the disks finds what changed",
        )


def _walk_back(file: BlockFile, header: LogHeader) -> tuple[array[int], array[int]]:
    """Return location and entry count of every metadata block, oldest first."""
    locations, counts = array("Q"), array("I")
    packed = bytearray(METADATA_HEADER_BYTES)
    location = header.eol_location - header.metadata_size
    while True:
        file.read_into(packed, location)
        block = MetadataHeader.unpack(packed)
        block.validate(block_offset=location, metadata_size=header.metadata_size)
        locations.append(location)
        counts.append(block.valid_metadata_entries)
        if block.previous_metadata_location == 0:
            break
        if len(locations) == METADATA_BLOCKS_MAX:
            raise FieldOutOfRange(
                "the log has more metadata blocks than can be held",
                field="previous_metadata_location",
                offset=location,
                expected=f"at most {METADATA_BLOCKS_MAX} blocks",
            )
        # validate() held the distance between one block and the way to the header: this ends, and never below
        # it.
        location -= block.previous_metadata_location
    total = sum(counts)
    if total != header.total_metadata_entries:
        raise FieldOutOfRange(
            "the metadata blocks have another number of entries than the header says",
            field="total_metadata_entries",
            offset=HEADER.offset_of("total_metadata_entries"),
            expected=total,
            actual=header.total_metadata_entries,
            spec=HEADER.spec,
        )
    locations.reverse()
    counts.reverse()
    return locations, counts
