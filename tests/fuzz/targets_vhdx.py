"""The structures of a VHDX, each by itself."""

from __future__ import annotations

import dataclasses
import uuid

import numpy as np

from hvreplica import native
from hvreplica.disk.bitmaps import SectorBitmaps
from hvreplica.formats import vhdx_bat, vhdx_header, vhdx_locator, vhdx_log, vhdx_metadata, vhdx_region
from hvreplica.units import MIB
from tests.fuzz.registry import Fuzzer

_LOG_GUID = uuid.UUID(int=0x1234)


def sealed(data: bytes, start: int, length: int) -> bytes:
    """Return `data` with the CRC-32C at start + 4, over `length` bytes, set right."""
    if len(data) < start + length:
        return data
    piece = bytearray(data[start : start + length])
    piece[4:8] = bytes(4)
    piece[4:8] = native.crc32c(piece).to_bytes(4, "little")
    return data[:start] + bytes(piece) + data[start + length :]


def _attack_header(data: bytes) -> None:
    candidates: list[vhdx_header.Header] = []
    for at in (0, 4096):
        header = vhdx_header.unpack_header(data[at : at + 4096], file_offset=at)
        header.validate()
        header.validate_within(64 * MIB)
        candidates.append(header)
    assert vhdx_header.choose_header(candidates) in {0, 1}


def _header_seeds() -> list[bytes]:
    header = vhdx_header.Header(
        sequence_number=4,
        file_write_guid=uuid.UUID(int=1),
        data_write_guid=uuid.UUID(int=2),
        log_guid=uuid.UUID(int=0),
        log_length=MIB,
        log_offset=MIB,
    )
    later = dataclasses.replace(header, sequence_number=5, log_guid=_LOG_GUID, log_offset=8 * MIB)
    return [header.pack() + later.pack(), later.pack() + header.pack()]


def _attack_regions(data: bytes) -> None:
    table = vhdx_region.unpack_region_table(data, file_offset=192 << 10)
    table.validate()
    vhdx_region.validate_regions_within(
        table.regions, file_size_bytes=64 * MIB, log_offset=MIB, log_length=MIB
    )


def _region_seeds() -> list[bytes]:
    regions = [
        vhdx_region.Region(vhdx_region.BAT_REGION, 3 * MIB, MIB, 1),
        vhdx_region.Region(vhdx_region.METADATA_REGION, 2 * MIB, MIB, 1),
    ]
    return [vhdx_region.pack_region_table(regions), vhdx_region.pack_region_table(regions[:1])]


def _attack_metadata(data: bytes) -> None:
    table = vhdx_metadata.unpack_metadata_table(data, file_offset=2 * MIB)
    table.validate()
    table.validate_within(MIB)


def _metadata_seeds() -> list[bytes]:
    parameters = vhdx_metadata.DiskParameters(
        virtual_bytes=64 * MIB,
        block_bytes=MIB,
        logical_sector_bytes=512,
        physical_sector_bytes=4096,
        virtual_disk_id=uuid.UUID(int=7),
    )
    return [vhdx_metadata.pack_metadata(parameters).ljust(128 << 10, b"\0")]


def _attack_log_entry(data: bytes) -> None:
    updates = vhdx_log.unpack_entry(data, log_offset=0, log_guid=_LOG_GUID, log_length=MIB)
    assert len(updates.data) == len(updates.data_offsets)
    assert len(updates.zero_lengths) == len(updates.zero_offsets)


def _log_entry_seeds() -> list[bytes]:
    seeds = []
    for count in (0, 1, 3, 130):
        header = vhdx_log.LogEntryHeader(
            entry_length=0,
            tail=0,
            sequence_number=5 + (count << 32),
            descriptor_count=0,
            log_guid=_LOG_GUID,
            flushed_file_offset=8 * MIB,
            last_file_offset=8 * MIB,
        )
        data = np.arange(count * 4096, dtype=np.uint8).reshape(count, 4096)
        seeds.append(vhdx_log.pack_entry(header, np.arange(count, dtype=np.int64) * 4096, data))
    return seeds


def _log_entry_repair(data: bytes) -> bytes:
    length = int.from_bytes(data[8:12], "little")
    return sealed(data, 0, min(length, len(data))) if length >= 8 else data


def _attack_locator(data: bytes) -> None:
    locator = vhdx_locator.unpack_parent_locator(data, file_offset=2 * MIB)
    locator.validate()
    assert locator.paths
    assert locator.linkages
    for text in (*locator.entries, *locator.entries.values()):
        assert "\0" not in text
    # Windows' NULs at the end are dropped, and so may be a whole value: such a locator has no other form.
    again = vhdx_locator.unpack_parent_locator(
        vhdx_locator.pack_parent_locator(locator.entries), file_offset=2 * MIB
    )
    assert again.entries == locator.entries


def _locator_seeds() -> list[bytes]:
    entries = vhdx_locator.locator_entries(uuid.UUID(int=5), {vhdx_locator.RELATIVE_PATH: ".\\a.vhdx"})
    more = {
        vhdx_locator.PARENT_LINKAGE2: entries[vhdx_locator.PARENT_LINKAGE],
        vhdx_locator.ABSOLUTE_WIN32_PATH: "C:\\vm\\a.vhdx",
        vhdx_locator.VOLUME_PATH: "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\vm\\a.vhdx",
    }
    return [vhdx_locator.pack_parent_locator(each) for each in (entries, {**entries, **more})]


_BAT_FILE_BYTES = 64 * MIB


def _attack_bat(data: bytes) -> None:
    """Take the bytes as a table: what passes all checks lies in the file, outside of structures, and apart."""
    entries = np.frombuffer(data[: len(data) // 8 * 8], "<u8")
    indices = np.arange(len(entries), dtype=np.int64)
    vhdx_bat.validate_entries(entries, file_offset=3 * MIB, indices=indices, has_parent=bool(len(data) % 2))
    structures = ((0, 4 * MIB, "header section"),)
    vhdx_bat.validate_entries_within(
        entries,
        file_offset=3 * MIB,
        indices=indices,
        block_bytes=2 * MIB,
        file_size_bytes=_BAT_FILE_BYTES,
        structures=structures,
    )
    placed = np.sort(vhdx_bat.offsets_of(entries[vhdx_bat.has_place(entries)]))
    vhdx_bat.validate_apart(np.column_stack((placed, np.full(len(placed), 2 * MIB))))
    ends = [offset + 2 * MIB for offset in placed.tolist()]
    assert all(start >= end for start, end in zip(placed.tolist(), [4 * MIB, *ends], strict=False))
    assert max(ends, default=0) <= _BAT_FILE_BYTES


def _bat_seeds() -> list[bytes]:
    places = np.array([[4, 6, 8], [4, 60, 30]], np.int64) * MIB
    entries = [vhdx_bat.present_entry(row) for row in places]
    return [entries[0].tobytes(), np.concatenate((entries[1], [np.uint64(1 << 20 | 3)])).tobytes() + b"\0"]


def _attack_bitmaps(data: bytes) -> None:
    """Take the bytes as marks, clearings and questions of sector bitmaps, beside an array of flags."""
    page_sectors, page_count = 64, 8
    msb_first = bool(data[:1] and data[0] & 1)
    model = np.zeros(page_sectors * page_count, bool)
    bitmaps = SectorBitmaps(
        sector_bytes=512,
        page_sectors=page_sectors,
        msb_first=msb_first,
        load=lambda _: np.zeros(page_sectors // 8, np.uint8),
    )
    for at in range(1, len(data) - 3, 4):
        first = int.from_bytes(data[at + 1 : at + 3], "little") % len(model)
        count = min(data[at + 3] + 1, len(model) - first)
        part = model[first : first + count]
        if data[at] % 3 == 0:
            bitmaps.mark(first, count)
            part[:] = True
        elif data[at] % 3 == 1:
            bitmaps.clear(first, count)
            part[:] = False
        assert bitmaps.all_set(first, count) == part.all()
        assert bitmaps.none_set(first, count) == (not part.any())
    assert (bitmaps.lookup(np.arange(len(model))) == model).all()
    for number, octets in bitmaps.take_dirty():
        bits = np.unpackbits(octets, bitorder="big" if msb_first else "little").astype(bool)
        assert (bits == model[number * page_sectors : (number + 1) * page_sectors]).all()


FUZZERS = (
    Fuzzer("vhdx_locator", _locator_seeds, _attack_locator),
    Fuzzer("vhdx_bat", _bat_seeds, _attack_bat),
    Fuzzer("bitmaps", lambda: [bytes(41), b"\1\0\5\0\x3f\1\x0a\0\7\2\0\0\xff"], _attack_bitmaps),
    Fuzzer(
        "vhdx_header", _header_seeds, _attack_header, lambda data: sealed(sealed(data, 0, 4096), 4096, 4096)
    ),
    Fuzzer("vhdx_regions", _region_seeds, _attack_regions, lambda data: sealed(data, 0, 64 << 10)),
    Fuzzer("vhdx_metadata", _metadata_seeds, _attack_metadata),
    Fuzzer("vhdx_log_entry", _log_entry_seeds, _attack_log_entry, _log_entry_repair),
)
