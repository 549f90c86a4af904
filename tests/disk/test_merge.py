"""A merge makes the parent show what its child showed, whatever the two hold, and refuses what would lose data."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import create_disk, merge_disk, open_disk, rebase_disk
from hvreplica.disk.open import open_layer
from hvreplica.disk.vhd.parent import ParentNames
from hvreplica.disk.vhd.relink import relink
from hvreplica.errors import FieldOutOfRange, Locked, ParentInUse, ParentMissing
from hvreplica.files import OS_FILES
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhd_locator import RELATIVE, encode_locator
from hvreplica.units import KIB, MIB
from tests.disk.contract import everything
from tests.support.fakeclock import FakeClock
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from hvreplica.progress import Progress

SIZE = 9 * MIB + 3 * 4096
FORMATS = ("vhdx", "vhd")


def make(path: Path, *, size: int | None = SIZE, seed: int = 1, **options: object) -> Path:
    if path.suffix == ".vhd":
        options = {"format": "vhd", "block_bytes": 512 * KIB} | options
    else:
        options = {"block_bytes": MIB} | options
    if options.get("parent") is not None and size == SIZE:
        size = None
    create_disk(OS_FILES, path, virtual_bytes=size, clock=FakeClock(seed=seed), **options)  # type: ignore[arg-type]
    return path


def scribble(path: Path, seed: int, *, steps: int = 12) -> None:
    """Write and zero at random, in sectors, blocks, and over the borders of both."""
    rng = random.Random(seed)
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=seed)) as disk:
        sector = disk.logical_sector_bytes
        for _ in range(steps):
            unit = rng.choice([sector, sector, 16 * KIB, 512 * KIB, MIB])
            start = rng.randrange(disk.virtual_bytes // unit) * unit
            length = min(rng.randint(1, 3) * unit, disk.virtual_bytes - start)
            kind = rng.choice(["data", "data", "zeros", "write zeros"])
            if kind == "data":
                disk.write(rng.randbytes(length), start)
            elif kind == "zeros":
                disk.write_zeroes(start, length)
            else:
                disk.write(bytes(length), start)


def read(path: Path, **options: Path) -> bytes:
    with open_disk(OS_FILES, path, clock=FakeClock(), **options) as disk:
        return everything(disk)


def merge(path: Path, **options: object) -> object:
    return merge_disk(OS_FILES, path, clock=FakeClock(seed=77), **options)  # type: ignore[arg-type]


def identity(path: Path) -> object:
    with open_layer(OS_FILES, path, clock=FakeClock()) as disk:
        return disk.data_write_guid


def chain(folder: Path, ending: str, *, seed: int, **options: object) -> list[Path]:
    """Return a base, its child and grandchild, each with content of its own."""
    base = make(folder / f"base.{ending}", **options)
    scribble(base, seed)
    child = make(folder / f"child.{ending}", parent=base, seed=2)
    scribble(child, seed + 1)
    grandchild = make(folder / f"grandchild.{ending}", parent=child, seed=3)
    scribble(grandchild, seed + 2)
    return [base, child, grandchild]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_the_parent_shows_what_the_child_showed(tmp_path: Path, ending: str, kind: str, seed: int) -> None:
    for round_number in range(3):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        options = {"block_bytes": None} if (ending, kind) == ("vhd", "fixed") else {}
        base, child, grandchild = chain(folder, ending, seed=seed + 10 * round_number, type=kind, **options)
        expected = read(grandchild)
        report = merge(grandchild)
        assert report.removed
        assert not grandchild.exists()
        assert read(child) == expected
        merge(child)
        assert read(base) == expected
        raw = folder / "expected.raw"
        raw.write_bytes(expected)
        name = {"vhdx": "vhdx", "vhd": "vpc"}[ending]
        run_tool("qemu-img", "compare", "-f", "raw", "-F", name, raw, base)
        run_tool("qemu-img", "check", "-f", name, base, expected=(0, 63))  # 63: vpc has no check


@pytest.mark.parametrize("ending", FORMATS)
def test_a_kept_child_shows_the_same_and_can_be_merged_again(tmp_path: Path, ending: str, seed: int) -> None:
    base, child, grandchild = chain(tmp_path, ending, seed=seed)
    expected, above = read(child), read(grandchild)
    assert not merge(child, keep=True).removed
    assert read(base) == read(child) == expected
    assert read(grandchild) == above
    scribble(child, seed + 7)
    expected = read(child)
    grandchild.unlink()
    merge(child)
    assert read(base) == expected
    assert not child.exists()


def test_the_parent_takes_over_the_identity_of_the_child(tmp_path: Path, seed: int) -> None:
    base, child, grandchild = chain(tmp_path, "vhdx", seed=seed)
    expected, guid = read(grandchild), identity(child)
    merge(child, force=True)
    assert identity(base) == guid
    with pytest.raises(ParentMissing):
        read(grandchild)
    assert read(grandchild, parent=base) == expected
    assert rebase_disk(OS_FILES, grandchild, base, clock=FakeClock(seed=8)).by == "identity"
    assert read(grandchild) == expected


@pytest.mark.parametrize("ending", FORMATS)
def test_other_children_of_the_parent_are_named_and_nothing_is_touched(
    tmp_path: Path, ending: str, seed: int
) -> None:
    base, child, grandchild = chain(tmp_path, ending, seed=seed)
    grandchild.unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "unreadable.vhdx").write_bytes(b"no disk")
    moved = Path(shutil.move(child, tmp_path / "elsewhere"))
    rebase_disk(OS_FILES, moved, base, unsafe=True, clock=FakeClock(seed=9))
    sibling = make(tmp_path / f"sibling.a{ending}", parent=base, seed=5, format=ending, block_bytes=2 * MIB)
    before = base.read_bytes(), moved.read_bytes()
    with pytest.raises(ParentInUse) as caught:
        merge(moved)
    assert str(sibling) in str(caught.value)
    assert caught.value.hint
    assert (base.read_bytes(), moved.read_bytes()) == before
    sibling.unlink()
    merge(moved)
    assert not moved.exists()


@pytest.mark.parametrize("ending", FORMATS)
def test_children_of_a_child_that_goes_are_named(tmp_path: Path, ending: str, seed: int) -> None:
    base, child, grandchild = chain(tmp_path, ending, seed=seed)
    expected = read(grandchild)
    with pytest.raises(ParentInUse) as caught:
        merge(child)
    assert str(grandchild) in str(caught.value)
    assert "--keep" in caught.value.hint
    merge(child, keep=True)
    report = rebase_disk(OS_FILES, grandchild, base, clock=FakeClock(seed=8))
    assert report.copied_bytes == 0
    child.unlink()
    assert read(grandchild) == expected


@pytest.mark.parametrize("ending", FORMATS)
def test_a_shorter_child_leaves_zeros_behind_its_end(tmp_path: Path, ending: str, seed: int) -> None:
    base = make(tmp_path / f"base.{ending}")
    with open_disk(OS_FILES, base, writable=True, clock=FakeClock(seed=4)) as disk:
        disk.write(b"\1" * SIZE, 0)
    child = make(tmp_path / f"child.{ending}", parent=base, seed=2, size=5 * MIB + 512)
    scribble(child, seed)
    expected = read(child)
    report = merge(child)
    assert (report.child_virtual_bytes, report.parent_virtual_bytes) == (5 * MIB + 512, SIZE)
    assert read(base) == expected.ljust(SIZE, b"\0")


def test_a_longer_child_is_refused_before_anything_changes(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    child = make(tmp_path / "child.vhdx", parent=base, seed=2, size=SIZE + MIB)
    before = base.read_bytes(), child.read_bytes()
    with pytest.raises(FieldOutOfRange) as caught:
        merge(child)
    assert "disk convert" in caught.value.hint
    assert (base.read_bytes(), child.read_bytes()) == before


def test_only_a_child_can_be_merged(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    with pytest.raises(ParentMissing, match="no differencing disk"):
        merge(base)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("which", ["base", "child"])
def test_files_that_somebody_writes_are_left_alone(
    tmp_path: Path, ending: str, which: str, seed: int
) -> None:
    base, child, grandchild = chain(tmp_path, ending, seed=seed)
    grandchild.unlink()
    before = base.read_bytes(), child.read_bytes()
    with (
        open_layer(OS_FILES, tmp_path / f"{which}.{ending}", writable=True, clock=FakeClock()),
        pytest.raises(Locked),
    ):
        merge(child)
    assert (base.read_bytes(), child.read_bytes()) == before


def test_logs_that_are_not_empty_are_replayed(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    for path, parent in ((base, None), (tmp_path / "child.vhdx", base)):
        if parent is not None:
            make(path, parent=parent, seed=2)
        disk = open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=len(path.name)))
        disk.write(random.Random(path.name).randbytes(3 * MIB), MIB if parent is None else 2 * MIB + 512)
        disk.flush()
        disk.abandon()
    expected = read(tmp_path / "child.vhdx")
    merge(tmp_path / "child.vhdx")
    assert read(base) == expected
    with open_layer(OS_FILES, base, clock=FakeClock()) as disk:
        assert disk.info().log == "clean"


def test_sectors_of_4096_bytes(tmp_path: Path, seed: int) -> None:
    base, child, grandchild = chain(tmp_path, "vhdx", seed=seed, logical_sector_bytes=4096)
    expected = read(grandchild)
    merge(grandchild)
    merge(child)
    assert read(base) == expected


def test_zeros_of_the_child_take_no_place_in_the_parent(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    with open_disk(OS_FILES, base, writable=True, clock=FakeClock(seed=4)) as disk:
        disk.write(b"\1" * (4 * MIB), 0)
    child = make(tmp_path / "child.vhdx", parent=base, seed=2)
    with open_disk(OS_FILES, child, writable=True, clock=FakeClock(seed=5)) as disk:
        disk.write_zeroes(0, SIZE)
    report = merge(child)
    assert (report.copied_bytes, report.zeroed_bytes) == (0, SIZE)
    with open_layer(OS_FILES, base, clock=FakeClock()) as disk:
        assert disk.info().allocated_bytes == 0
    assert not any(read(base))


def test_progress_reaches_the_end(tmp_path: Path, seed: int) -> None:
    base, child, grandchild = chain(tmp_path, "vhdx", seed=seed)
    told: list[Progress] = []
    merge(grandchild, progress=told.append)
    assert {each.phase for each in told} == {"merge"}
    assert [each.done_bytes for each in told] == sorted(each.done_bytes for each in told)
    assert told[-1].done_bytes <= told[-1].total_bytes
    assert base.exists()
    assert child.exists()


def test_an_identity_that_is_the_parents_by_chance_proves_nothing(tmp_path: Path) -> None:
    """A program that copies a parent's header to its new child: the child holds data, and none of it is lost."""
    base = make(tmp_path / "base.vhdx")
    scribble(base, 3)
    child = make(tmp_path / "child.vhdx", parent=base, seed=2)
    with open_disk(OS_FILES, child, writable=True, clock=FakeClock(seed=5)) as disk:
        disk.identify(identity(base))
        disk.write(b"\2" * MIB, MIB)
    expected = read(child)
    merge(child)
    assert read(base) == expected


def test_a_child_of_a_raw_disk(tmp_path: Path, seed: int) -> None:
    """XenServer's: nothing proves the parent but that it stands beside its child. A sibling is told by its name."""
    raw, other = tmp_path / "base.raw", tmp_path / "other.raw"
    for path in (raw, other):
        path.write_bytes(random.Random(seed).randbytes(SIZE))
    names = [tmp_path / "child.vhd", tmp_path / "sibling.vhd", tmp_path / "other.vhd"]
    for path, parent in zip(names, (raw, raw, other), strict=True):
        make_on_raw(path, parent)
        scribble(path, seed)
    expected = read(names[0])
    with pytest.raises(ParentInUse) as caught:
        merge(names[0])
    assert str(names[1]) in str(caught.value)
    assert str(names[2]) not in str(caught.value)
    names[1].unlink()
    merge(names[0])
    assert raw.read_bytes() == expected


def make_on_raw(path: Path, parent: Path) -> None:
    make(path, parent=make(path.with_name("unused.vhd")))
    path.with_name("unused.vhd").unlink()
    with open_layer(OS_FILES, path, writable=True, clock=FakeClock()) as disk:
        file, image = disk._file, disk._image
        raw = ParentNames(NIL, parent.name, ((RELATIVE, encode_locator(RELATIVE, f".\\{parent.name}")),))
        relink(file, image, bitmap_offsets=np.empty(0, np.int64), parent=raw)


def test_a_child_behind_a_link_is_removed_and_not_the_link(tmp_path: Path, seed: int) -> None:
    _, child, grandchild = chain(tmp_path, "vhdx", seed=seed)
    grandchild.unlink()
    link = tmp_path / "link.vhdx"
    link.symlink_to(child)
    merge(link)
    assert not child.exists()
