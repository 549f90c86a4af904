"""Convert and compare: exact offsets, sizes that differ, no target left behind by a failure."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hvreplica.disk import compare_disks, convert_disk, create_disk, open_disk
from hvreplica.errors import FieldOutOfRange, FormatError
from hvreplica.files import OS_FILES
from hvreplica.units import MIB, TIB
from tests.disk.contract import everything, make_disk
from tests.support.build import mixed_bytes
from tests.support.disks import KINDS
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from hvreplica.progress import Progress

DATA = mixed_bytes(5 * MIB, seed=2) + bytes(3 * MIB) + mixed_bytes(MIB, seed=3) + bytes(8192)


@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize(
    "target",
    [("raw", "dynamic"), ("vhdx", "dynamic"), ("vhdx", "fixed"), ("vhd", "dynamic"), ("vhd", "fixed")],
)
def test_target_holds_the_same_bytes_and_no_zeros(
    tmp_path: Path, source_kind: str, target: tuple[str, str]
) -> None:
    source = tmp_path / "source"
    with make_disk(source, source_kind) as disk:
        disk.write(DATA, 0)
    if target[0] == "vhd" and "4096" in source_kind:
        with pytest.raises(FieldOutOfRange, match="sectors of 512 bytes only"):
            convert_disk(OS_FILES, source, tmp_path / "target", format="vhd", clock=FakeClock())
        assert not (tmp_path / "target").exists()
        return
    seen: list[Progress] = []
    report = convert_disk(
        OS_FILES,
        source,
        tmp_path / "target",
        format=target[0],
        type=target[1],
        clock=FakeClock(),
        progress=seen.append,
    )
    with open_disk(OS_FILES, tmp_path / "target", clock=FakeClock()) as disk:
        assert everything(disk) == DATA
        assert disk.format == target[0]
    assert report.virtual_bytes == len(DATA)
    grains = [DATA[at : at + 4096] for at in range(0, len(DATA), 4096)]
    assert report.written_bytes == sum(len(grain) for grain in grains if any(grain))
    assert seen[-1].done_bytes == report.read_bytes
    assert compare_disks(OS_FILES, source, tmp_path / "target", clock=FakeClock()).equal


def test_raw_of_an_odd_size_is_padded(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)
    convert_disk(OS_FILES, source, tmp_path / "target", clock=FakeClock())
    with open_disk(OS_FILES, tmp_path / "target", clock=FakeClock()) as disk:
        assert everything(disk) == b"x" * 1000 + bytes(24)
    assert compare_disks(OS_FILES, source, tmp_path / "target", clock=FakeClock()).equal


def test_existing_target_is_kept_unless_asked(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(DATA)
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        convert_disk(OS_FILES, source, target, clock=FakeClock())
    assert target.read_bytes() == b"mine"
    convert_disk(OS_FILES, source, target, format="raw", clock=FakeClock(), overwrite=True)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("operation", ["write", "sync", "rename", "read"])
def test_failure_leaves_no_target_and_no_temporary_file(operation: str) -> None:
    files = FaultFiles("/d")
    files.load("/d/source", DATA)
    fault = files.fail(operation, at=3 if operation in {"write", "sync"} else 1, error=errno.ENOSPC)
    with pytest.raises(OSError) as caught:
        convert_disk(files, "/d/source", "/d/target", clock=FakeClock())
    assert caught.value.errno == errno.ENOSPC
    assert fault.hits
    assert files.names(Path("/d")) == ["source"]


@pytest.mark.parametrize("at", [0, 1, MIB - 1, MIB, 5 * MIB + 4097, 8 * MIB + 77])
def test_first_difference_is_exact(tmp_path: Path, at: int) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with make_disk(a, "dynamic") as disk:
        disk.write(DATA, 0)
    changed = bytearray(DATA)
    changed[at] ^= 0x80
    changed[9 * MIB + 8191] ^= 1  # a later one, which another thread may meet first
    b.write_bytes(changed)
    for one, two in ((a, b), (b, a)):
        report = compare_disks(OS_FILES, one, two, clock=FakeClock())
        assert (report.equal, report.first_difference) == (False, at)


def test_different_sizes_are_equal_if_the_rest_is_zeros(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(DATA)
    b.write_bytes(DATA + bytes(MIB))
    assert compare_disks(OS_FILES, a, b, clock=FakeClock()).equal
    b.write_bytes(DATA + bytes(MIB) + b"x")
    for one, two in ((a, b), (b, a)):
        report = compare_disks(OS_FILES, one, two, clock=FakeClock())
        assert report.first_difference == len(DATA) + MIB


def test_huge_empty_disks_compare_at_once(tmp_path: Path) -> None:
    for name, block_bytes in (("a", MIB), ("b", 32 * MIB)):
        create_disk(
            OS_FILES, tmp_path / name, virtual_bytes=64 * TIB, block_bytes=block_bytes, clock=FakeClock()
        )
    report = compare_disks(OS_FILES, tmp_path / "a", tmp_path / "b", clock=FakeClock())
    assert report.equal
    assert report.bytes_compared == 0
    with open_disk(OS_FILES, tmp_path / "b", writable=True, clock=FakeClock()) as disk:
        disk.write(b"x", 64 * TIB - 1)
    report = compare_disks(OS_FILES, tmp_path / "a", tmp_path / "b", clock=FakeClock())
    assert report.first_difference == 64 * TIB - 1


def test_a_refused_size_is_told_of_the_name_that_was_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "a.vhdx"
    create_disk(OS_FILES, source, virtual_bytes=8 * MIB, logical_sector_bytes=4096, clock=FakeClock())
    with pytest.raises(FormatError) as caught:
        convert_disk(OS_FILES, source, tmp_path / "b.vhd", format="vhd", clock=FakeClock())
    assert caught.value.path == tmp_path / "b.vhd"
    assert [path.name for path in tmp_path.iterdir()] == ["a.vhdx"]
