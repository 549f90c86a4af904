"""Images that other programs made are compacted, grown and shrunk, and their guests see what they saw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import compact_disk, data_windows, open_disk, resize_disk
from hvreplica.disk.resize import last_data
from hvreplica.files import OS_FILES
from hvreplica.units import GIB, MIB
from tests.support.images import digest_ranges
from tests.support.specimens import EXPECTED, READABLE, unpack_family

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.disk import Disk

CHANGED = [name for name in READABLE if "nz4k" in EXPECTED[name] and ".vhd" in name]
_FIXED_BYTES_MAX = 64 * MIB  # of a fixed disk that is copied


def ranges(disk: Disk, end: int) -> Iterator[tuple[int, int]]:
    for _, _, rows in data_windows(disk, 0, end):
        yield from map(tuple, rows.tolist())


def seen(path: Path, size: int) -> tuple[int, str]:
    """Return the size of a disk and the digest of its first `size` bytes; fails unless zeros follow."""
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        assert last_data(disk, size) is None

        def read(offset: int, length: int) -> bytearray:
            buffer = bytearray(length)
            disk.read_into(buffer, offset)
            return buffer

        return disk.virtual_bytes, digest_ranges(read, ranges(disk, size), size)


@pytest.mark.parametrize("name", CHANGED)
def test_guest_sees_the_same_in_another_file_and_size(specimens: Path, tmp_path: Path, name: str) -> None:
    assert specimens.is_dir()
    path = unpack_family(name, tmp_path)
    size, digest = EXPECTED[name]["virtual_bytes"], EXPECTED[name]["nz4k"]
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        kind, sector_bytes = disk.info().type, disk.logical_sector_bytes
    if kind == "fixed" and size > _FIXED_BYTES_MAX:
        pytest.skip("a fixed disk of this size takes long")
    if kind != "fixed":
        compact_disk(OS_FILES, path, clock=SYSTEM)
        assert seen(path, size) == (size, digest)
    grown = size + (3 * GIB if kind == "dynamic" else 5 * MIB) + sector_bytes
    resize_disk(OS_FILES, path, grown, clock=SYSTEM)
    assert seen(path, size) == (grown, digest)
    resize_disk(OS_FILES, path, size, clock=SYSTEM)
    assert seen(path, size) == (size, digest)
