"""Entries go to tables and back whole, and a table with a bad row is found out, with its place."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.errors import ChecksumMismatch, FieldOutOfRange, FormatError
from hvreplica.formats.hrl import MetadataHeader, checksum
from hvreplica.formats.hrl_entries import find_entry_fault, pack_metadata_block, parse_entries

BLOCK_AT = 1 << 24


def packed_entries(*extents: tuple[int, int]) -> bytes:
    rows = np.array(extents, np.int64).reshape(-1, 2)
    return native.pack_hrl_entries(rows, 7, np.arange(1, len(rows) + 1, dtype=np.uint32))


def block_of(*extents: tuple[int, int], metadata_size: int = 4096) -> bytes:
    return pack_metadata_block(
        packed_entries(*extents), previous_metadata_location=8192, metadata_size=metadata_size
    )


def plain_entry(**changes: int) -> bytes:
    """Pack one entry by hand, sealed."""
    fields: dict[str, int] = {
        "offset": 4096,
        "length": 512,
        "time": 1,
        "operation": 1,
        "data": 9,
        "location": 0,
    }
    fields.update(changes)
    draft = struct.pack(
        "<QIIIBIB6x",
        fields["offset"],
        0,
        fields["length"],
        fields["time"],
        fields["operation"],
        fields["data"],
        fields["location"],
    )
    return draft[:8] + struct.pack("<I", checksum(draft)) + draft[12:]


def table(**columns: list[int]) -> Any:
    count = max(len(column) for column in columns.values())
    entries = np.zeros(count, native.HRL_ENTRY)
    entries["data_length"] = 512
    entries["meta_operation"] = 1
    for name, column in columns.items():
        entries[name] = column
    return entries


def test_parse_gives_the_entries_that_were_packed() -> None:
    extents = [(4096 * index, 512 * (index + 1)) for index in range(127)]
    total = sum(length for _, length in extents)
    entries = parse_entries(
        block_of(*extents), count=127, data_offset=BLOCK_AT - total, block_offset=BLOCK_AT
    )
    assert entries["byte_offset"].tolist() == [offset for offset, _ in extents]
    assert entries["data_length"].tolist() == [length for _, length in extents]
    assert entries["log_offset"][0] == BLOCK_AT - total
    assert (np.diff(entries["log_offset"].astype(np.int64)) == entries["data_length"][:-1]).all()
    assert set(entries["time_stamp"].tolist()) == {7}
    assert entries["data_checksum"].tolist() == list(range(1, 128))


def test_pack_fills_the_block_with_a_good_header_and_zeros() -> None:
    block = block_of((0, 512), (512, 512), metadata_size=512)
    assert len(block) == 512
    header = MetadataHeader.unpack(block)
    header.validate(block_offset=BLOCK_AT, metadata_size=512)
    assert header.valid_metadata_entries == 2
    assert not any(block[32 + 64 :])


def test_pack_refuses_more_entries_than_fit() -> None:
    with pytest.raises(ValueError, match="not the entries"):
        block_of(*[(0, 512)] * 16, metadata_size=512)


def test_parse_with_any_bit_of_an_entry_flipped_is_refused() -> None:
    block = block_of((1 << 40, 4096))
    for bit in range(32 * 8):
        damaged = bytearray(block)
        damaged[32 + bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChecksumMismatch) as caught:
            parse_entries(damaged, count=1, data_offset=BLOCK_AT - 4096, block_offset=BLOCK_AT)
        assert caught.value.offset == BLOCK_AT + 32 + 8
        assert caught.value.field == "checksum"


def test_parse_names_an_unknown_operation() -> None:
    block = pack_metadata_block(
        plain_entry() + plain_entry(operation=2), previous_metadata_location=0, metadata_size=4096
    )
    with pytest.raises(FieldOutOfRange) as caught:
        parse_entries(block, count=2, data_offset=BLOCK_AT - 1024, block_offset=BLOCK_AT)
    assert caught.value.field == "meta_operation"
    assert caught.value.offset == BLOCK_AT + 32 + 32 + 20
    assert (caught.value.expected, caught.value.actual) == (1, 2)


@pytest.mark.parametrize("data_offset", [BLOCK_AT - 512, BLOCK_AT - 1536, BLOCK_AT])
def test_parse_refuses_data_that_does_not_fill_the_gap(data_offset: int) -> None:
    with pytest.raises(FieldOutOfRange, match="fill") as caught:
        parse_entries(block_of((0, 512), (512, 512)), count=2, data_offset=data_offset, block_offset=BLOCK_AT)
    assert caught.value.field == "data_length"


@pytest.mark.parametrize(
    ("columns", "disk_bytes", "index", "field"),
    [
        ({"data_length": [512, 0]}, None, 1, "data_length"),
        ({"data_length": [512, 513]}, None, 1, "data_length"),
        ({"byte_offset": [0, 0, 100]}, None, 2, "byte_offset"),
        ({"meta_operation": [1, 0]}, None, 1, "meta_operation"),
        ({"byte_offset": [0, 4096]}, 4096, 1, "byte_offset"),
        ({"byte_offset": [0, 3584], "data_length": [512, 1024]}, 4096, 1, "byte_offset"),
        ({"byte_offset": [(1 << 64) - 512]}, None, 0, "byte_offset"),
        ({"byte_offset": [(1 << 64) - 512]}, 1 << 40, 0, "byte_offset"),
    ],
)
def test_fault_is_found_with_its_row(
    columns: dict[str, list[int]], disk_bytes: int | None, index: int, field: str
) -> None:
    fault = find_entry_fault(table(**columns), disk_bytes=disk_bytes)
    assert fault is not None
    assert (fault.index, fault.field) == (index, field)


def test_fault_of_the_earliest_row_is_named_first() -> None:
    fault = find_entry_fault(table(data_length=[512, 512, 0], byte_offset=[0, 1, 0]))
    assert fault is not None
    assert (fault.index, fault.field) == (1, "byte_offset")


def test_no_fault_in_a_good_table() -> None:
    assert find_entry_fault(table(byte_offset=[0, 3584]), disk_bytes=4096) is None
    assert find_entry_fault(table(byte_offset=[0])[:0], disk_bytes=0) is None


@given(st.binary(max_size=512), st.integers(0, 127))
def test_parse_of_any_bytes_is_a_table_or_a_format_error(octets: bytes, count: int) -> None:
    try:
        entries = parse_entries(
            octets.ljust(4096, b"\xa5"), count=count, data_offset=4096, block_offset=BLOCK_AT
        )
    except FormatError:
        return
    assert len(entries) == count
