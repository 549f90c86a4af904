"""Whole VHDX files, of which the metadata is attacked: opened, replayed, read and written."""

from __future__ import annotations

import functools
from pathlib import Path

from hvreplica.disk import create_disk, open_disk
from hvreplica.formats import vhdx_header, vhdx_region
from hvreplica.units import KIB, MIB
from tests.fuzz.registry import Fuzzer
from tests.fuzz.targets_vhdx import sealed
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

_DISK = Path("/d/disk.vhdx")
_HEADERS = (64 * KIB, 128 * KIB)
_REGION_TABLES = (192 * KIB, 256 * KIB)
_LOG_WINDOW_BYTES = 48 * KIB
_SIZE_BYTES = 8  # of the file, at the end of an input


@functools.cache
def _files() -> FaultFiles:
    """Return the making of a small dynamic disk, so that a cut leaves entries in its log."""
    files = FaultFiles("/d")
    clock = FakeClock()
    create_disk(files, _DISK, virtual_bytes=64 * MIB, block_bytes=MIB, clock=clock)
    files.sync_directory(_DISK.parent)
    files.settle()
    disk = open_disk(files, _DISK, writable=True, clock=clock)
    for block in range(3):
        disk.write(bytes([block + 1]) * 4096, block * 5 * MIB)
        disk.flush()
    return files


@functools.cache
def _windows() -> tuple[tuple[int, int], ...]:
    """Return (offset, length) of every structure of the file, the start of the log included."""
    content = _files().content_of(_DISK)
    header = vhdx_header.unpack_header(content[_HEADERS[0] :], file_offset=0)
    regions = vhdx_region.unpack_region_table(content[_REGION_TABLES[0] :], file_offset=0)
    bat = regions.find(vhdx_region.BAT_REGION).file_offset
    metadata = regions.find(vhdx_region.METADATA_REGION).file_offset
    return (
        (0, 4 * KIB),
        *((offset, 4 * KIB) for offset in _HEADERS),
        *((offset, KIB) for offset in _REGION_TABLES),
        (header.log_offset, _LOG_WINDOW_BYTES),
        (metadata, KIB),
        (metadata + 64 * KIB, KIB),
        (bat, 4 * KIB),
    )


def _hot() -> list[int]:
    """Return where each window begins in an input, and the log's first sectors besides."""
    starts: list[int] = []
    at = 0
    for _, length in _windows():
        starts += range(at, at + (3 * 4 * KIB if length == _LOG_WINDOW_BYTES else 1), 4 * KIB)
        at += length
    return starts


def _seeds() -> list[bytes]:
    seeds = []
    for _, world in crash_states(_files().trace(), subsets_per_prefix=2, limit=24):
        content = world.content_of(_DISK)
        pieces = [content[start : start + length].ljust(length, b"\0") for start, length in _windows()]
        seeds.append(b"".join(pieces) + len(content).to_bytes(_SIZE_BYTES, "little"))
    return seeds


def _repair(data: bytes) -> bytes:
    """Set the checksums of headers and of log entries right; the target does so for region tables."""
    at = 0
    for start, length in _windows():
        if start in _HEADERS:
            data = sealed(data, at, 4 * KIB)
        if length == _LOG_WINDOW_BYTES:
            for sector in range(at, at + length, 4 * KIB):
                entry_bytes = int.from_bytes(data[sector + 8 : sector + 12], "little")
                if data[sector : sector + 4] == b"loge" and 64 <= entry_bytes <= at + length - sector:
                    data = sealed(data, sector, entry_bytes)
        at += length
    return data


def _attack(data: bytes) -> None:
    """Lay the attacked windows over the disk, open it as a reader and as a writer, and use it."""
    world = _files().after_kill()
    with world.open(_DISK, writable=True) as file:
        at = 0
        for start, length in _windows():
            file.write(data[at : at + length], start)
            at += length
        for table in _REGION_TABLES:
            file.write(sealed(file.read(table, 64 * KIB), 0, 64 * KIB), table)
        size = int.from_bytes(data[at : at + _SIZE_BYTES], "little")
        file.resize(size if 0 < size < 1 << 44 else file.size())
    world.settle()
    for writable in (False, True):
        disk = open_disk(world, _DISK, writable=writable, clock=FakeClock())
        try:
            end = min(disk.virtual_bytes, 32 * MIB)
            extents = disk.extents(0, end)
            assert (extents >= 0).all()
            assert extents.size == 0 or int(extents.sum(axis=1).max()) <= disk.virtual_bytes
            for disk_offset in (0, 5 * MIB, 10 * MIB):
                disk.read_into(bytearray(max(min(end - disk_offset, 8192), 0)), min(disk_offset, end))
            disk.info()
            if writable:
                written = b"\x55" * min(end, 4096)
                disk.write(written, 0)
                disk.flush()
                again = bytearray(len(written))
                disk.read_into(again, 0)
                assert again == written
        finally:
            disk.close()


FUZZERS = (Fuzzer("vhdx_file", _seeds, _attack, _repair, hot=_hot),)
