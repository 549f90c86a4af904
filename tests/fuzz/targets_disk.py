"""Whole VHDX files, of which the metadata is attacked: opened, replayed, read and written."""

from __future__ import annotations

import functools
from pathlib import Path

from hvreplica.disk import create_disk, open_disk
from hvreplica.units import MIB
from tests.fuzz.registry import Fuzzer
from tests.fuzz.targets_vhdx import sealed
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

_DISK = Path("/d/disk.vhdx")
_WINDOW_BYTES = 8192


@functools.cache
def _disk_files() -> FaultFiles:
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
def _worlds() -> list[FaultFiles]:
    """Return clean and cut-off states of the disk; the cut ones need replay."""
    states = crash_states(_disk_files().trace(), subsets_per_prefix=2, limit=40)
    return [_disk_files().after_kill(), *(world for _, world in states)][::5]


@functools.cache
def _windows() -> list[tuple[int, int]]:
    """Return (offset, length) of the start of each run of bytes that the file holds."""
    with _worlds()[0].open(_DISK) as file:
        return [(start, min(length, _WINDOW_BYTES)) for start, length in file.data_extents(0, file.size())]


def _file_seeds() -> list[bytes]:
    seeds = []
    for world in _worlds():
        content = world.content_of(_DISK)
        pieces = [content[start : start + length].ljust(length, b"\0") for start, length in _windows()]
        seeds.append(len(content).to_bytes(8, "little") + b"".join(pieces))
    return seeds


def _file_repair(data: bytes) -> bytes:
    at = 8
    for start, length in _windows():
        for structure, size in ((64 << 10, 4096), (128 << 10, 4096)):
            if start <= structure and structure + size <= start + length:
                data = sealed(data, at + structure - start, size)
        at += length
    return data


def _attack_file(data: bytes) -> None:
    """Lay the attacked windows over the disk, open it as a reader and as a writer, and use it."""
    world = _disk_files().after_kill()
    with world.open(_DISK, writable=True) as file:
        at = 8
        for start, length in _windows():
            piece = data[at : at + length]
            file.write(piece, start)
            at += length
        for table in (192 << 10, 256 << 10):
            file.write(sealed(file.read(table, 64 << 10), 0, 64 << 10), table)
        file.resize(min(int.from_bytes(data[:8], "little"), 1 << 44))
    world.settle()
    for writable in (False, True):
        disk = open_disk(world, _DISK, writable=writable, clock=FakeClock())
        try:
            end = min(disk.virtual_bytes, 32 * MIB)
            extents = disk.extents(0, end)
            assert (extents >= 0).all()
            assert extents.size == 0 or int(extents.sum(axis=1).max()) <= disk.virtual_bytes
            disk.read_into(bytearray(min(end, 4096)), 0)
            disk.info()
            if writable:
                disk.write(b"\x55" * 512 * 8, 0)
                disk.flush()
                again = bytearray(4096)
                disk.read_into(again, 0)
                assert again == b"\x55" * 4096
        finally:
            disk.close()


FUZZERS = (Fuzzer("vhdx_file", _file_seeds, _attack_file, _file_repair),)
