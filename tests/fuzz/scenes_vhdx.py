"""VHDX files for damage.Scene: a dynamic disk and a chain of two, in the states that a power cut left."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import FormatError
from hvreplica.formats import vhdx_header, vhdx_log, vhdx_region
from hvreplica.formats.vhdx_bat import BAT_ENTRY_BYTES, OFFSET_MASK, BatGeometry
from hvreplica.units import KIB, MIB
from tests.fuzz.damage import Scene, Window
from tests.fuzz.targets_vhdx import sealed
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

if TYPE_CHECKING:
    from hvreplica.files import BlockFile

FOLDER = Path("/d")
BASE, CHILD = FOLDER / "base.vhdx", FOLDER / "child.avhdx"
VIRTUAL_BYTES = 8 * MIB + 4096
_WORLD_COUNT_MAX = 16
_LOG_WINDOW_BYTES = 24 * KIB
_LOG_BYTES_MAX = MIB  # what is sealed: damage may make the header name more


@functools.cache
def dynamic_scene() -> Scene:
    """Return a dynamic disk that was cut off while it was written."""
    files = FaultFiles(FOLDER)
    clock = FakeClock()
    create_disk(files, BASE, virtual_bytes=VIRTUAL_BYTES, block_bytes=MIB, clock=clock)
    files.settle()
    _use(files, BASE, clock)
    return _scene(files, [BASE])


@functools.cache
def chain_scene() -> Scene:
    """Return a clean parent, and its child that was cut off while it was written."""
    files = FaultFiles(FOLDER)
    clock = FakeClock()
    create_disk(files, BASE, virtual_bytes=VIRTUAL_BYTES, block_bytes=2 * MIB, clock=clock)
    with open_disk(files, BASE, writable=True, clock=clock) as disk:
        for block in range(0, 8, 3):
            disk.write(bytes([0xB0 + block]) * 8192, block * MIB + 512)
    create_disk(files, CHILD, parent=BASE, block_bytes=MIB, clock=clock)
    files.settle()
    _use(files, CHILD, clock)
    return _scene(files, [CHILD, BASE])


def _use(files: FaultFiles, path: Path, clock: FakeClock) -> None:
    disk = open_disk(files, path, writable=True, clock=clock)
    for block in range(3):
        disk.write(bytes([block + 1]) * 2048, block * 3 * MIB + 1024)
        disk.flush()
    disk.write_zeroes(3 * MIB, MIB)
    disk.flush()


def _scene(files: FaultFiles, paths: list[Path]) -> Scene:
    states = crash_states(files.trace(), subsets_per_prefix=2, limit=_WORLD_COUNT_MAX)
    worlds = [files.after_kill(), *(world for _, world in states)]
    return Scene(worlds, [window for path in paths for window in _windows(files, path)], seal)


def _windows(files: FaultFiles, path: Path) -> list[Window]:
    """Return where the structures of a file stand that has just been used."""
    content = files.content_of(path)
    header = vhdx_header.unpack_header(content[vhdx_header.HEADER_OFFSETS[1] :], file_offset=0)
    regions = vhdx_region.unpack_region_table(content[vhdx_region.REGION_TABLE_OFFSETS[0] :], file_offset=0)
    bat = regions.find(vhdx_region.BAT_REGION).file_offset
    metadata = regions.find(vhdx_region.METADATA_REGION).file_offset
    geometry = BatGeometry.of(
        virtual_bytes=VIRTUAL_BYTES, block_bytes=MIB, logical_sector_bytes=512, has_parent=True
    )
    bitmap_entry = bat + geometry.bitmap_index_of(0) * BAT_ENTRY_BYTES
    windows = [
        Window(path, bat, 128),
        Window(path, bitmap_entry, BAT_ENTRY_BYTES),
        Window(path, metadata, KIB),
        Window(path, metadata + 64 * KIB, KIB),
        Window(path, 0, 64),
        *(Window(path, offset, 128) for offset in vhdx_header.HEADER_OFFSETS),
        *(Window(path, offset, 128) for offset in vhdx_region.REGION_TABLE_OFFSETS),
        *(
            Window(path, header.log_offset + sector, 256 if sector % (8 * KIB) == 0 else 32)
            for sector in range(0, _LOG_WINDOW_BYTES, 4 * KIB)
        ),
    ]
    bitmap = int.from_bytes(content[bitmap_entry : bitmap_entry + 8], "little") & OFFSET_MASK
    if bitmap:
        windows.append(Window(path, bitmap, 2 * KIB))
    return windows


def seal(file: BlockFile) -> None:
    """Set the checksums of headers, region tables and log entries right."""
    size = file.size()
    for offset in vhdx_header.HEADER_OFFSETS:
        _seal(file, offset, 4 * KIB, size)
    for offset in vhdx_region.REGION_TABLE_OFFSETS:
        _seal(file, offset, 64 * KIB, size)
    for offset in vhdx_header.HEADER_OFFSETS:
        if offset + 4 * KIB > size:
            continue
        try:
            header = vhdx_header.unpack_header(file.read(offset, 4 * KIB), file_offset=offset)
        except FormatError:
            continue
        start, end = header.log_offset, header.log_offset + min(header.log_length, _LOG_BYTES_MAX)
        for extent, length in file.data_extents(start, min(end, size)):
            for sector in range(extent, extent + length, 4 * KIB):
                _seal_entry(file, sector, min(end, size))


def _seal_entry(file: BlockFile, offset: int, end: int) -> None:
    if offset + 4 * KIB > end:
        return
    head = file.read(offset, 16)
    length = int.from_bytes(head[8:12], "little")
    if head.startswith(vhdx_log.ENTRY_SIGNATURE) and 64 <= length <= end - offset:
        _seal(file, offset, length, end)


def _seal(file: BlockFile, offset: int, length: int, end: int) -> None:
    if offset + length <= end:
        data = sealed(file.read(offset, length), 0, length)
        file.write(data[4:8], offset + 4)
