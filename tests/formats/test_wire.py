"""The byte layouts of the wire: what is accepted, what is refused and why, and that the documentation is theirs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import (
    BadSignature,
    ChecksumMismatch,
    FieldOutOfRange,
    FormatError,
    Overlap,
    Truncated,
    UnsupportedVersion,
)
from hvreplica.formats import wire
from hvreplica.formats.wire import Codec, FrameHeader, UnitKind

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats" / "wire.md"
GOOD = FrameHeader(
    sequence=7,
    window_offset=1 << 20,
    window_bytes=8192,
    target=1,
    codec=Codec.NONE,
    run_count=2,
    data_bytes=600,
    encoded_bytes=600,
    digest=bytes(16),
)


def runs(*rows: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.array(rows, dtype=wire.RUN_DTYPE).reshape(-1, 2)


def test_frame_header_packs_to_frozen_bytes() -> None:
    packed = wire.pack_frame_header(replace(GOOD, digest=bytes(range(16))))
    assert packed.hex() == (
        "0700000000000000"
        "0000100000000000"
        "0020000000000000"
        "0100"
        "00"
        "00"
        "02000000"
        "58020000"
        "58020000"
        "000102030405060708090a0b0c0d0e0f"
    )
    assert wire.unpack_frame_header(packed) == replace(GOOD, digest=bytes(range(16)))


def test_good_header_is_accepted() -> None:
    GOOD.validate()
    GOOD.validate_within(56 + 16 + 600)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"target": 1 << 16}, "target"),
        ({"window_bytes": 0}, "window_bytes"),
        ({"window_bytes": (1 << 32) + 1}, "window_bytes"),
        ({"window_offset": (1 << 63) - 8192}, "window_offset"),
        ({"run_count": wire.RUN_COUNT_MAX + 1}, "run_count"),
        ({"run_count": 0}, "data_bytes"),
        ({"run_count": 601}, "data_bytes"),
        ({"data_bytes": wire.DATA_BYTES_MAX + 1, "encoded_bytes": wire.DATA_BYTES_MAX + 1}, "data_bytes"),
        ({"encoded_bytes": 599}, "encoded_bytes"),
        ({"codec": Codec.ZSTD, "encoded_bytes": 601}, "encoded_bytes"),
        ({"codec": Codec.LZ4, "encoded_bytes": 0}, "encoded_bytes"),
        ({"sequence": 1 << 62}, "sequence"),
    ],
)
def test_header_field_outside_its_range_is_named(change: dict[str, int], field: str) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        replace(GOOD, **change).validate()  # type: ignore[arg-type]
    assert caught.value.field == field
    assert caught.value.actual is not None


def test_unknown_codec_is_an_unsupported_version() -> None:
    with pytest.raises(UnsupportedVersion) as caught:
        replace(GOOD, codec=3).validate()
    assert caught.value.field == "codec"


def test_reserved_byte_of_the_header_must_be_zero() -> None:
    packed = bytearray(wire.pack_frame_header(GOOD))
    packed[wire.FRAME.offset_of("reserved_1")] = 1
    with pytest.raises(FieldOutOfRange) as caught:
        wire.unpack_frame_header(packed)
    assert caught.value.field == "reserved_1"


def test_hole_of_any_length_needs_no_runs() -> None:
    hole = replace(
        GOOD, run_count=0, data_bytes=0, encoded_bytes=0, window_offset=0, window_bytes=(1 << 63) - 1
    )
    hole.validate()
    assert wire.validate_runs(runs(), hole).shape == (0, 2)


def test_body_length_other_than_its_parts_is_refused() -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        GOOD.validate_within(56 + 16 + 601)
    assert caught.value.field == "body_bytes"


def test_runs_become_absolute_extents() -> None:
    extents = wire.validate_runs(runs((0, 100), (100, 100), (7792, 400)), GOOD)
    assert extents.dtype == np.int64
    assert extents.tolist() == [[1 << 20, 100], [(1 << 20) + 100, 100], [(1 << 20) + 7792, 400]]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (((0, 600), (599, 0)), FieldOutOfRange),  # empty
        (((100, 300), (0, 300)), Overlap),  # not sorted
        (((0, 300), (299, 300)), Overlap),
        (((0, 300), (7893, 300)), FieldOutOfRange),  # beyond the window
        (((0, 300), (0xFFFFFFFF, 300)), FieldOutOfRange),  # its end does not fit into 32 bits
        (((0, 300), (400, 299)), FieldOutOfRange),  # sum
    ],
)
def test_bad_run_table_is_refused(rows: tuple[tuple[int, int], ...], kind: type[FormatError]) -> None:
    with pytest.raises(kind):
        wire.validate_runs(runs(*rows), GOOD)


def test_digest_covers_header_table_and_data_but_not_itself() -> None:
    packed = wire.pack_frame_header(GOOD)
    digest = wire.frame_digest(packed, b"table", b"data")
    assert digest == wire.frame_digest(packed[:40] + bytes(range(16)), b"table", b"data")
    assert digest != wire.frame_digest(b"\1" + packed[1:], b"table", b"data")
    assert digest != wire.frame_digest(packed, b"tabl3", b"data")
    assert digest != wire.frame_digest(packed, b"table", b"dat4")


def test_wrong_digest_is_a_checksum_mismatch_with_both_values() -> None:
    with pytest.raises(ChecksumMismatch) as caught:
        wire.validate_digest(GOOD, b"\1" * 16)
    assert (caught.value.expected, caught.value.actual) == ("00" * 16, "01" * 16)


def test_unit_header_round_trips() -> None:
    assert wire.unpack_unit_header(wire.pack_unit_header(UnitKind.MESSAGE, 1 << 20)) == (1, 1 << 20)


@pytest.mark.parametrize(
    ("packed", "field"),
    [
        ("0000000001000000", "kind"),
        ("0300000001000000", "kind"),
        ("0100010001000000", "reserved_1"),
        ("0100000000000000", "body_bytes"),
        ("0100000001001000", "body_bytes"),  # one byte above 1 MiB
        ("0200000037000000", "body_bytes"),  # shorter than a frame header
        ("02000000ffffffff", "body_bytes"),
    ],
)
def test_bad_unit_header_is_refused(packed: str, field: str) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        wire.unpack_unit_header(bytes.fromhex(packed))
    assert caught.value.field == field


def test_preamble_is_frozen_and_agrees_with_itself() -> None:
    assert wire.pack_preamble().hex() == "48565257495245000100010000000000"
    assert wire.choose_version(wire.pack_preamble()) == 1


def test_newer_peer_that_still_speaks_our_version_is_accepted() -> None:
    newer = wire.PREAMBLE.pack(magic=wire.MAGIC, version=9, version_min=1, flags=0xFFFFFFFF)
    assert wire.choose_version(newer) == wire.WIRE_VERSION


@pytest.mark.parametrize(("version", "version_min"), [(9, 2), (0, 0)])
def test_peer_without_a_common_version_is_refused(version: int, version_min: int) -> None:
    packed = wire.PREAMBLE.pack(magic=wire.MAGIC, version=version, version_min=version_min)
    with pytest.raises(UnsupportedVersion) as caught:
        wire.choose_version(packed)
    assert caught.value.hint


def test_other_protocol_is_a_bad_signature() -> None:
    with pytest.raises(BadSignature):
        wire.choose_version(b"HTTP/1.1 400 Bad")


def test_short_bytes_are_truncated() -> None:
    with pytest.raises(Truncated):
        wire.choose_version(b"HVR")
    with pytest.raises(Truncated):
        wire.unpack_unit_header(b"\1")
    with pytest.raises(Truncated):
        wire.unpack_frame_header(bytes(55))


@given(st.binary(max_size=80))
def test_any_bytes_give_a_header_or_a_format_error(data: bytes) -> None:
    for parse in (wire.choose_version, wire.unpack_unit_header):
        try:
            parse(data)
        except FormatError:
            pass
    try:
        header = wire.unpack_frame_header(data)
        header.validate()
    except FormatError:
        return
    assert header.data_bytes <= wire.DATA_BYTES_MAX
    assert header.encoded_bytes <= header.data_bytes
    assert header.run_count <= wire.RUN_COUNT_MAX


def test_document_holds_the_tables_of_the_layouts() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for layout in wire.LAYOUTS:
        assert layout.table() in text


def test_documented_example_is_a_whole_frame() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("## A frame byte by byte")[2]
    example = bytes.fromhex("".join(re.findall(r"^    ([0-9a-f ]+?)  ", text, re.MULTILINE)))
    kind, body_bytes = wire.unpack_unit_header(example)
    header = wire.unpack_frame_header(example, wire.UNIT.size)
    header.validate()
    header.validate_within(body_bytes)
    table, data = example[64:80], example[80:]
    extents = wire.validate_runs(np.frombuffer(table, wire.RUN_DTYPE).reshape(-1, 2), header)
    wire.validate_digest(header, wire.frame_digest(example[8:64], table, data))
    assert (kind, body_bytes, header.sequence, header.target) == (UnitKind.FRAME, len(example) - 8, 3, 1)
    assert (extents.tolist(), data) == ([[4096, 4], [8192, 2]], b"datahi")
