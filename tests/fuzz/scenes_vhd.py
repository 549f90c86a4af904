"""VHD files for damage.Scene: a dynamic disk, a fixed one, and a chain of two, as a power cut left them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.disk import create_disk, open_disk
from hvreplica.formats.vhd_footer import FOOTER, FOOTER_BYTES, vhd_checksum
from hvreplica.formats.vhd_header import DYNAMIC_HEADER, DYNAMIC_HEADER_BYTES, unpack_dynamic_header
from hvreplica.units import KIB, MIB
from tests.fuzz.damage import Scene, Window
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

if TYPE_CHECKING:
    from hvreplica.files import BlockFile

FOLDER = Path("/d")
BASE, CHILD = FOLDER / "base.vhd", FOLDER / "child.avhd"
VIRTUAL_BYTES = 8 * MIB + 4096
_WORLD_COUNT_MAX = 16


@functools.cache
def dynamic_scene() -> Scene:
    """Return a dynamic disk that was cut off while it was written."""
    files = FaultFiles(FOLDER)
    clock = FakeClock()
    create_disk(files, BASE, format="vhd", virtual_bytes=VIRTUAL_BYTES, block_bytes=512 * KIB, clock=clock)
    files.settle()
    _use(files, BASE, clock)
    return _scene(files, [BASE])


@functools.cache
def fixed_scene() -> Scene:
    """Return a fixed disk."""
    files = FaultFiles(FOLDER)
    clock = FakeClock()
    create_disk(files, BASE, format="vhd", type="fixed", virtual_bytes=VIRTUAL_BYTES, clock=clock)
    files.settle()
    _use(files, BASE, clock)
    footer = Window(BASE, -FOOTER_BYTES, 96)
    return Scene(
        [files.after_kill()], [footer, Window(BASE, -FOOTER_BYTES - 1, 96), Window(BASE, 0, 96)], seal
    )


@functools.cache
def chain_scene() -> Scene:
    """Return a clean parent, and its child that was cut off while it was written."""
    files = FaultFiles(FOLDER)
    clock = FakeClock()
    create_disk(files, BASE, format="vhd", virtual_bytes=VIRTUAL_BYTES, clock=clock)
    with open_disk(files, BASE, writable=True, clock=clock) as disk:
        for block in range(0, 8, 3):
            disk.write(bytes([0xB0 + block]) * 8192, block * MIB + 512)
    create_disk(
        files, CHILD, format="vhd", type="differencing", parent=BASE, block_bytes=512 * KIB, clock=clock
    )
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
    header = unpack_dynamic_header(
        content[FOOTER_BYTES : FOOTER_BYTES + DYNAMIC_HEADER_BYTES], file_offset=FOOTER_BYTES
    )
    locators = DYNAMIC_HEADER.offset_of("parent_locator_entry_1")
    first_block = int.from_bytes(content[header.table_offset : header.table_offset + 4], "big") * 512
    windows = [
        Window(path, header.table_offset, 96),
        Window(path, FOOTER_BYTES, 128),
        Window(path, FOOTER_BYTES + locators, 192),
        Window(path, 0, 96),
        Window(path, -FOOTER_BYTES, 96),
        Window(path, -FOOTER_BYTES - 1, 96),
    ]
    windows += [
        Window(path, entry.platform_data_offset, max(entry.platform_data_length, 1))
        for entry in header.locators
        if entry.is_used
    ]
    if first_block < len(content):
        windows.append(Window(path, first_block, 512))
    return windows


def seal(file: BlockFile) -> None:
    """Set the checksums of both footers, and of the header that the first one names, right."""
    size = file.size()
    for offset in (0, size - FOOTER_BYTES, size - FOOTER_BYTES + 1):
        if offset >= 0 and offset + FOOTER_BYTES - 1 <= size:
            _seal(file, offset, min(FOOTER_BYTES, size - offset), FOOTER.offset_of("checksum"))
    if size >= FOOTER_BYTES:
        at = int(FOOTER.unpack(file.read(0, FOOTER_BYTES))["data_offset"])
        if 0 < at <= size - DYNAMIC_HEADER_BYTES:
            _seal(file, at, DYNAMIC_HEADER_BYTES, DYNAMIC_HEADER.offset_of("checksum"))


def _seal(file: BlockFile, offset: int, length: int, checksum_offset: int) -> None:
    data = file.read(offset, length)
    if data[:8] in {b"conectix", b"cxsparse"}:
        file.write(vhd_checksum(data, checksum_offset).to_bytes(4, "big"), offset + checksum_offset)
