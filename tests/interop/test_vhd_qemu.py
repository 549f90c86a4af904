"""qemu-img and qemu-io agree with us about VHD: on sizes, on what we write, and on what we read of theirs.

qemu ignores the parent of a differencing VHD without a word (exit 0), so it is no oracle for those.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.formats.vhd_footer import VIRTUAL_BYTES_MAX
from hvreplica.units import GIB, KIB, MIB
from tests.support.build import mixed_bytes
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from pathlib import Path

SIZES = [512, 4 * MIB + 512, 10489344, 40 * MIB, 127 * GIB, 65535 * 16 * 255 * 512 + 512, VIRTUAL_BYTES_MAX]


def size_in_qemu(path: Path) -> int:
    done = run_tool("qemu-img", "info", "-f", "vpc", "--output=json", path)
    size = json.loads(done.stdout)["virtual-size"]
    assert isinstance(size, int)
    return size


def equal(path: Path, truth: Path) -> None:
    run_tool("qemu-img", "compare", "-f", "vpc", "-F", "raw", path, truth)


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
@pytest.mark.parametrize("size", SIZES)
def test_size_of_what_we_make_is_the_same_in_qemu(tmp_path: Path, kind: str, size: int) -> None:
    path = tmp_path / "a.vhd"
    create_disk(OS_FILES, path, virtual_bytes=size, format="vhd", type=kind, clock=SYSTEM)
    assert size_in_qemu(path) == size
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"z" * 512, size - 512)
    assert size_in_qemu(path) == size
    run_tool("qemu-io", "-f", "vpc", "-r", "-c", f"read -P 122 {size - 512} 512", path)


@pytest.mark.parametrize(
    ("kind", "block_bytes"), [("dynamic", 512 * KIB), ("dynamic", None), ("fixed", None)]
)
def test_what_we_write_is_what_qemu_reads(tmp_path: Path, kind: str, block_bytes: int | None) -> None:
    path, truth = tmp_path / "a.vhd", tmp_path / "a.raw"
    size = 70 * MIB + 512
    create_disk(
        OS_FILES,
        path,
        virtual_bytes=size,
        format="vhd",
        type=kind,
        block_bytes=block_bytes,
        clock=SYSTEM,
    )
    expected = bytearray(size)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        for offset, length in ((0, 4096), (MIB - 512, 1024), (40 * MIB + 3, 3 * MIB), (size - 700, 700)):
            data = mixed_bytes(length, seed=offset)
            disk.write(data, offset)
            expected[offset : offset + length] = data
        disk.flush()
        disk.write_zeroes(41 * MIB, 2 * MIB)
        expected[41 * MIB : 43 * MIB] = bytes(2 * MIB)
        disk.write(b"again", 41 * MIB)
        expected[41 * MIB : 41 * MIB + 5] = b"again"
    truth.write_bytes(expected)
    equal(path, truth)
    run_tool("qemu-io", "-f", "vpc", "-c", "write -P 7 50M 3M", "-c", f"write -P 8 {size - 512} 512", path)
    expected[50 * MIB : 53 * MIB] = b"\7" * (3 * MIB)
    expected[size - 512 :] = b"\x08" * 512
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        buffer = bytearray(size)
        disk.read_into(buffer, 0)
        assert buffer == expected


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("force", ["on", "off"])
def test_what_qemu_writes_is_what_we_read_and_change(tmp_path: Path, subformat: str, force: str) -> None:
    path, truth = tmp_path / "q.vhd", tmp_path / "q.raw"
    data = mixed_bytes(24 * MIB + 1024, seed=3, block_bytes=65536)
    truth.write_bytes(data)
    options = f"subformat={subformat},force_size={force}"
    run_tool("qemu-img", "convert", "-O", "vpc", "-o", options, truth, path)
    size = size_in_qemu(path)
    data = data.ljust(size, b"\0")
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        buffer = bytearray(disk.virtual_bytes)
        disk.read_into(buffer, 0)
        assert buffer == data
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(b"ours" * 1000, 5 * MIB + 17)
        disk.write_zeroes(9 * MIB, 7 * MIB)
        disk.flush()
        disk.write(b"more" * 1000, 12 * MIB)
    changed = bytearray(data)
    changed[5 * MIB + 17 : 5 * MIB + 4017] = b"ours" * 1000
    changed[9 * MIB : 16 * MIB] = bytes(7 * MIB)
    changed[12 * MIB : 12 * MIB + 4000] = b"more" * 1000
    truth.write_bytes(changed)
    equal(path, truth)
