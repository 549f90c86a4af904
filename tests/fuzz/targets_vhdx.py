"""The structures of a VHDX, each by itself."""

from __future__ import annotations

import dataclasses
import uuid

import numpy as np

from hvreplica import native
from hvreplica.formats import vhdx_header, vhdx_log, vhdx_metadata, vhdx_region
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


FUZZERS = (
    Fuzzer(
        "vhdx_header", _header_seeds, _attack_header, lambda data: sealed(sealed(data, 0, 4096), 4096, 4096)
    ),
    Fuzzer("vhdx_regions", _region_seeds, _attack_regions, lambda data: sealed(data, 0, 64 << 10)),
    Fuzzer("vhdx_metadata", _metadata_seeds, _attack_metadata),
    Fuzzer("vhdx_log_entry", _log_entry_seeds, _attack_log_entry, _log_entry_repair),
)
