"""The entries of metadata blocks as tables: arrays of native.HRL_ENTRY, and blocks made around them.

Spec: [MS-HRL] 2.4.

A block's 127 entries are parsed, checked and packed by one call each; no entry becomes an object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica import native
from hvreplica.errors import ChecksumMismatch, FieldOutOfRange
from hvreplica.formats.hrl import (
    DISK_BYTES_MAX,
    ENTRY_BYTES,
    META_OPERATION_WRITE,
    METADATA_ENTRY,
    METADATA_HEADER_BYTES,
    SECTOR_BYTES,
    MetadataHeader,
    entry_capacity,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer


def pack_metadata_block(entries: Buffer, *, previous_metadata_location: int, metadata_size: int) -> bytes:
    """Return a metadata block of `metadata_size` bytes around packed entries (native.pack_hrl_entries)."""
    count, rest = divmod(memoryview(entries).nbytes, ENTRY_BYTES)
    if rest or count > entry_capacity(metadata_size):
        message = (
            f"{memoryview(entries).nbytes} bytes are not the entries of a block of {metadata_size} bytes"
        )
        raise ValueError(message)
    header = MetadataHeader.sealed(
        previous_metadata_location=previous_metadata_location, valid_metadata_entries=count
    )
    block = bytearray(metadata_size)
    block[:METADATA_HEADER_BYTES] = header.pack()
    block[METADATA_HEADER_BYTES : METADATA_HEADER_BYTES + count * ENTRY_BYTES] = memoryview(entries).cast("B")
    return bytes(block)


def parse_entries(block: Buffer, *, count: int, data_offset: int, block_offset: int) -> NDArray[Any]:
    """Return the `count` entries of a metadata block as a native.HRL_ENTRY array, entry checksums checked.

    block: a whole metadata block with a validated header. data_offset: where its entries' data starts in the
    log. block_offset: where it stands, for errors. The data must end exactly where the block starts. Raises:
    ChecksumMismatch, FieldOutOfRange. Spec: [MS-HRL] 2.4, 2.5.
    """
    try:
        entries = native.parse_hrl_entries(block, count, data_offset)
    except native.BadEntry as bad:
        error = ChecksumMismatch if bad.reason == "checksum" else FieldOutOfRange
        raise error(
            f"entry {bad.index} of a metadata block is damaged",
            field=bad.reason,
            offset=entry_offset(block_offset, bad.index, bad.reason),
            expected=bad.expected,
            actual=bad.actual,
            spec=METADATA_ENTRY.spec,
        ) from None
    data_end = int(entries["log_offset"][-1]) + int(entries["data_length"][-1]) if count else data_offset
    if data_end != block_offset:
        raise FieldOutOfRange(
            "the data of a metadata block does not fill the space before it",
            field="data_length",
            offset=block_offset,
            expected=f"{block_offset - data_offset} bytes in {count} entries",
            actual=f"{data_end - data_offset} bytes",
            spec="[MS-HRL] 2.5",
        )
    return entries


def entry_offset(block_offset: int, index: int, field: str) -> int:
    """Return where the field of entry `index` stands in the log."""
    return block_offset + METADATA_HEADER_BYTES + index * ENTRY_BYTES + METADATA_ENTRY.offset_of(field)


@dataclass(frozen=True, slots=True)
class EntryFault:
    """The first entry of a table that breaks a rule. index: its row."""

    index: int
    field: str
    message: str
    expected: str
    actual: int


def find_entry_fault(entries: NDArray[Any], *, disk_bytes: int | None = None) -> EntryFault | None:
    """Return the first entry that no disk, or not one of `disk_bytes`, can take; None if all are good.

    entries: native.HRL_ENTRY. Rules: meta_operation is write, lengths are not 0, both offset and length are
    whole sectors of 512 bytes, the write ends within the disk. Spec: [MS-HRL] 2.4.
    """
    limit = DISK_BYTES_MAX if disk_bytes is None else disk_bytes
    offsets, lengths = entries["byte_offset"], entries["data_length"]
    # Lengths have 32 bits, so the sum cannot wrap once the offset is known to be within the limit.
    beyond = (offsets > np.uint64(limit)) | (offsets + lengths > np.uint64(limit))
    rules = (
        (
            entries["meta_operation"] != META_OPERATION_WRITE,
            "meta_operation",
            "an unknown operation",
            "1 (write)",
        ),
        (lengths == 0, "data_length", "an entry without data", "more than 0"),
        (
            lengths % SECTOR_BYTES != 0,
            "data_length",
            "an entry that is not whole sectors",
            "a multiple of 512",
        ),
        (
            offsets % SECTOR_BYTES != 0,
            "byte_offset",
            "an entry that is not sector-aligned",
            "a multiple of 512",
        ),
        (beyond, "byte_offset", "an entry that ends beyond the disk", f"an end of at most {limit}"),
    )
    if not any(bool(broken.any()) for broken, *_ in rules):
        return None
    index, rank = min((int(broken.argmax()), rank) for rank, (broken, *_) in enumerate(rules) if broken.any())
    _, field, message, expected = rules[rank]
    return EntryFault(index, field, message, expected, int(entries[field][index]))
