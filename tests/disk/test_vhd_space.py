"""Places in a VHD that others laid out tighter, or wider, than blocks need: nothing beside them is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.check import check_disk, repair_disk
from hvreplica.files import OS_FILES
from hvreplica.formats.vhd_bat import NO_OFFSET, pack_bat
from hvreplica.units import KIB, MIB
from tests.support.edit import set_dynamic_header
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

    from hvreplica.disk import Disk
    from hvreplica.disk.open import Format

TABLE_OFFSET = 1536
FIRST_PLACE = 2 * 4096 - 512
LAST_BYTES = 512 * KIB  # of the disk in its last block
ALL_SET = b"\xff" * 512


def with_last_block_cut_off(path: Path) -> None:
    """Make a disk of 4.5 MiB: its last block ends where the disk does, and block 0 stands right behind it."""
    create_disk(OS_FILES, path, virtual_bytes=4 * MIB + LAST_BYTES, format="vhd", clock=FakeClock())
    empty = path.read_bytes()
    second = FIRST_PLACE + 512 + LAST_BYTES
    octets = bytearray(empty[:-512].ljust(FIRST_PLACE, b"\0"))
    octets[TABLE_OFFSET : TABLE_OFFSET + 12] = pack_bat(np.array([second, NO_OFFSET, FIRST_PLACE]))
    octets += ALL_SET + b"z" * LAST_BYTES + ALL_SET + b"a" * (2 * MIB) + empty[-512:]
    path.write_bytes(octets)


def content(disk: Disk) -> bytes:
    buffer = bytearray(disk.virtual_bytes)
    disk.read_into(buffer, 0)
    return bytes(buffer)


def test_last_block_that_is_cut_off_is_given_back_without_its_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    with_last_block_cut_off(path)
    footer = path.read_bytes()[-512:]
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock()) as disk:
        disk.write_zeroes(4 * MIB, LAST_BYTES)
        disk.flush()
        disk.write(b"b" * (2 * MIB), 2 * MIB)
    wanted = b"a" * (2 * MIB) + b"b" * (2 * MIB) + bytes(LAST_BYTES)
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        assert content(disk) == wanted
    assert path.read_bytes()[-512:] == footer


def test_footer_behind_a_last_block_that_is_cut_off_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    with_last_block_cut_off(path)
    whole = path.read_bytes()
    octets = bytearray(whole[: FIRST_PLACE + 512 + LAST_BYTES]) + whole[-512:]
    octets[TABLE_OFFSET : TABLE_OFFSET + 12] = pack_bat(np.array([NO_OFFSET, NO_OFFSET, FIRST_PLACE]))
    path.write_bytes(octets)
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock()) as disk:
        disk.write_zeroes(4 * MIB, LAST_BYTES)
    assert path.read_bytes()[-512:] == whole[-512:]
    with open_disk(OS_FILES, path, clock=FakeClock()) as disk:
        assert content(disk) == bytes(4 * MIB + LAST_BYTES)


@pytest.mark.parametrize("format_", ["vhd", "vhdx"])
def test_an_extent_without_bytes_at_the_end_touches_no_block(format_: Format, tmp_path: Path) -> None:
    """Behind 512 blocks the table in memory ends too."""
    path, size = tmp_path / "a", 512 * 2 * MIB
    options = {"virtual_bytes": size, "block_bytes": 2 * MIB, "clock": FakeClock()}
    create_disk(OS_FILES, tmp_path / "base", format=format_, **options)
    create_disk(OS_FILES, path, format=format_, parent=tmp_path / "base", **options)
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock()) as disk:
        disk.write_extents(np.array([[size, 0], [0, 512]]), b"a" * 512)
        out = bytearray(512)
        disk.read_extents(np.array([[0, 512], [size, 0]]), out)
        assert out == b"a" * 512
        disk.read_into(bytearray(), size)


def with_long_table(path: Path) -> int:
    """Make a disk of 8 blocks whose table has room for 2 TiB, as XenServer makes them; return the table's end."""
    create_disk(OS_FILES, path, virtual_bytes=16 * MIB, format="vhd", clock=FakeClock())
    octets, count = path.read_bytes(), 1 << 20
    path.write_bytes(octets[:TABLE_OFFSET] + b"\xff" * (4 * count) + octets[-512:])
    set_dynamic_header(path, 28, count.to_bytes(4, "big"))
    return TABLE_OFFSET + 4 * count


def test_no_repair_puts_the_footer_into_the_table(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    with_long_table(path)
    before = path.read_bytes()
    assert check_disk(OS_FILES, path, clock=FakeClock()).codes() == []
    assert not repair_disk(OS_FILES, path, clock=FakeClock()).actions
    assert path.read_bytes() == before


@pytest.mark.parametrize("by_repair", [False, True])
def test_lost_footer_is_written_behind_the_whole_table(tmp_path: Path, *, by_repair: bool) -> None:
    path = tmp_path / "a.vhd"
    end = with_long_table(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    if by_repair:
        assert repair_disk(OS_FILES, path, clock=FakeClock()).status == 0
    else:
        open_disk(OS_FILES, path, writable=True, clock=FakeClock()).close()
    assert path.read_bytes() == whole
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock()) as disk:
        disk.write(b"a" * 512, 0)
    assert path.read_bytes()[TABLE_OFFSET + 4 : end] == whole[TABLE_OFFSET + 4 : end]
