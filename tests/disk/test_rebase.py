"""A rebase changes the parent of a disk and nothing that the guest sees, and says why the new parent is right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import create_disk, open_disk, rebase_disk
from hvreplica.disk.open import open_layer
from hvreplica.errors import FieldOutOfRange, Locked, ParentLoop, ParentMismatch, ParentMissing
from hvreplica.files import OS_FILES
from hvreplica.formats.vhdx_metadata import METADATA_TABLE_BYTES, METADATA_TABLE_ENTRY, PARENT_LOCATOR_ITEM
from hvreplica.units import GIB, KIB, MIB, TIB
from tests.disk.test_merge import FORMATS, SIZE, chain, identity, make, read, scribble
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from hvreplica.progress import Progress


def rebase(child: Path, parent: Path, **options: object) -> object:
    return rebase_disk(OS_FILES, child, parent, clock=FakeClock(seed=88), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", FORMATS)
def test_another_parent_gets_what_differs_and_the_guest_sees_the_same(
    tmp_path: Path, ending: str, seed: int
) -> None:
    for round_number in range(3):
        folder = tmp_path / str(round_number)
        (folder / "new").mkdir(parents=True)
        base, child, grandchild = chain(folder, ending, seed=seed + 10 * round_number)
        other = make(folder / "new" / f"other {ending}.{ending}", seed=11)
        scribble(other, seed + 10 * round_number + 3)
        expected, above, guid = read(child), read(grandchild), identity(child)
        report = rebase(child, other)
        assert report.by == "content"
        assert report.compared_bytes >= report.copied_bytes > 0
        base.unlink()
        assert read(child) == expected
        assert read(grandchild) == above
        assert identity(child) == guid
        with open_disk(OS_FILES, child, clock=FakeClock()) as disk:
            assert disk.parent.path == other
        scribble(child, seed + 4)
        assert read(child)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_parent_of_the_same_identity_changes_names_only(tmp_path: Path, ending: str, seed: int) -> None:
    base, child, _ = chain(tmp_path, ending, seed=seed)
    expected = read(child)
    (tmp_path / "new").mkdir()
    moved = Path(shutil.move(base, tmp_path / "new" / f"moved.{ending}"))
    with pytest.raises(ParentMissing):
        read(child)
    report = rebase(child, moved)
    assert (report.by, report.compared_bytes, report.copied_bytes) == ("identity", 0, 0)
    assert read(child) == expected


@pytest.mark.parametrize("ending", FORMATS)
def test_onto_the_grandparent_flattens_the_link_between(tmp_path: Path, ending: str, seed: int) -> None:
    base, child, grandchild = chain(tmp_path, ending, seed=seed)
    expected = read(grandchild)
    assert rebase(grandchild, base).by == "content"
    child.unlink()
    assert read(grandchild) == expected


@pytest.mark.parametrize("ending", FORMATS)
def test_without_the_old_parent_only_unsafe_goes_on(tmp_path: Path, ending: str, seed: int) -> None:
    base, child, _ = chain(tmp_path, ending, seed=seed)
    expected = read(child)
    raw = read(base)
    base.unlink()
    copy = make(tmp_path / f"copy.{ending}", seed=12)
    with open_disk(OS_FILES, copy, writable=True, clock=FakeClock(seed=13)) as disk:
        disk.write(raw, 0)
    with pytest.raises(ParentMissing) as caught:
        rebase(child, copy)
    assert "--unsafe" in caught.value.hint
    assert rebase(child, copy, unsafe=True).by == "unsafe"
    assert read(child) == expected


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(("old_mib", "new_mib"), [(3, 12), (12, 3)])
def test_parents_of_other_lengths(tmp_path: Path, ending: str, old_mib: int, new_mib: int, seed: int) -> None:
    old = make(tmp_path / f"old.{ending}", size=old_mib * MIB, seed=21)
    new = make(tmp_path / f"new.{ending}", size=new_mib * MIB, seed=22)
    for path in (old, new):
        with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=ord(path.name[0]))) as disk:
            disk.write(path.name[:1].encode() * disk.virtual_bytes, 0)
    child = make(tmp_path / f"child.{ending}", parent=old, size=7 * MIB + 512, seed=2)
    scribble(child, seed, steps=4)
    expected = read(child)
    rebase(child, new)
    old.unlink()
    assert read(child) == expected


@pytest.mark.parametrize("ending", FORMATS)
def test_a_loop_is_refused(tmp_path: Path, ending: str, seed: int) -> None:
    _, child, grandchild = chain(tmp_path, ending, seed=seed)
    before = child.read_bytes()
    for parent in (child, grandchild):
        with pytest.raises(ParentLoop) as caught:
            rebase(child, parent, unsafe=True)
        assert caught.value.hint
    link = tmp_path / f"link.{ending}"
    link.symlink_to(grandchild)
    with pytest.raises(ParentLoop):
        rebase(child, link, unsafe=True)
    assert child.read_bytes() == before


def test_only_kin_can_be_a_parent(tmp_path: Path, seed: int) -> None:
    _, child, _ = chain(tmp_path, "vhdx", seed=seed)
    before = child.read_bytes()
    for other, field in (
        (make(tmp_path / "other.vhd"), "format"),
        (make(tmp_path / "4096.vhdx", logical_sector_bytes=4096), "logical_sector_size"),
    ):
        with pytest.raises(ParentMismatch) as caught:
            rebase(child, other, unsafe=True)
        assert caught.value.field == field
    base = make(tmp_path / "alone.vhdx")
    with pytest.raises(ParentMissing, match="no differencing disk"):
        rebase(base, child, unsafe=True)
    assert child.read_bytes() == before


@pytest.mark.parametrize("ending", FORMATS)
def test_files_that_somebody_writes_are_left_alone(tmp_path: Path, ending: str, seed: int) -> None:
    base, child, _ = chain(tmp_path, ending, seed=seed)
    other = make(tmp_path / f"other.{ending}", seed=11)
    for path in (base, child, other):
        before = child.read_bytes()
        with open_layer(OS_FILES, path, writable=True, clock=FakeClock()), pytest.raises(Locked):
            rebase(child, other)
        assert child.read_bytes() == before


@pytest.mark.parametrize("ending", FORMATS)
def test_names_of_any_length_find_room_again_and_again(tmp_path: Path, ending: str, seed: int) -> None:
    """Longer than the room of the old name, and shorter again: the file does not grow with each change."""
    base, child, _ = chain(tmp_path, ending, seed=seed)
    expected = read(child)
    sizes = []
    for round_number in range(6):
        folder = tmp_path.joinpath(*["n" * 200] * (round_number * 3 % 7)) / f"r{round_number}"
        folder.mkdir(parents=True)
        base = Path(shutil.move(base, folder / base.name))
        rebase(child, base)
        assert read(child) == expected
        sizes.append(child.stat().st_size)
    assert max(sizes) - sizes[0] <= 2 * 8 * KIB
    scribble(child, seed + 5)


def test_a_vhdx_without_room_for_the_name_is_refused(tmp_path: Path, seed: int) -> None:
    """User items fill the metadata region up to its end, and the name gets longer."""
    base, child, _ = chain(tmp_path, "vhdx", seed=seed)
    with child.open("r+b") as file:
        file.seek(2 * MIB)
        table = bytearray(file.read(METADATA_TABLE_BYTES))
        rows = [METADATA_TABLE_ENTRY.unpack(table, 32 + index * 32) for index in range(6)]
        end = max(row["offset"] + row["length"] for row in rows)
        table[10:12] = (7).to_bytes(2, "little")
        table[32 + 6 * 32 : 32 + 7 * 32] = METADATA_TABLE_ENTRY.pack(
            item_id=FakeClock(seed=99).guid(), offset=end, length=MIB - end, flags=1
        )
        file.seek(2 * MIB)
        file.write(table)
    expected, before = read(child), child.read_bytes()
    moved = Path(shutil.move(base, tmp_path / ("n" * 100 + ".vhdx")))
    with pytest.raises(FieldOutOfRange, match="no room") as caught:
        rebase(child, moved)
    assert caught.value.hint
    assert before[2 * MIB : 3 * MIB] == child.read_bytes()[2 * MIB : 3 * MIB]
    shutil.move(moved, base)
    rebase(child, base)
    assert read(child) == expected


def test_what_is_not_ours_in_the_metadata_stays(tmp_path: Path, seed: int) -> None:
    base, child, _ = chain(tmp_path, "vhdx", seed=seed)
    before = child.read_bytes()[2 * MIB : 3 * MIB]
    moved = Path(shutil.move(base, tmp_path / ("n" * 100 + ".vhdx")))
    rebase(child, moved)
    after = child.read_bytes()[2 * MIB : 3 * MIB]
    for index in range(6):
        row = METADATA_TABLE_ENTRY.unpack(before, 32 + index * 32)
        if row["item_id"] == PARENT_LOCATOR_ITEM:
            continue
        assert METADATA_TABLE_ENTRY.unpack(after, 32 + index * 32) == row
        assert after[row["offset"] :][: row["length"]] == before[row["offset"] :][: row["length"]]


def test_a_vhd_keeps_its_layout(tmp_path: Path, seed: int) -> None:
    base, child, _ = chain(tmp_path, "vhd", seed=seed)
    other = make(tmp_path / "other.vhd", seed=11)
    size = child.stat().st_size
    rebase(child, other, unsafe=True)
    content = child.read_bytes()
    assert len(content) == size
    assert content[:512] == content[-512:]
    assert content[512:520] == b"cxsparse"
    assert base.exists()


def test_what_neither_chain_holds_is_not_read(tmp_path: Path) -> None:
    """64 TiB on both sides and a little data: a few pieces are compared, and only what differs is copied."""
    paths = []
    for name in ("old", "new"):
        path = tmp_path / f"{name}.vhdx"
        create_disk(OS_FILES, path, virtual_bytes=64 * TIB, clock=FakeClock(seed=len(paths) + 1))
        with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=len(paths) + 5)) as disk:
            extents = np.array([[0, 4096], [5 * TIB, 4096], [40 * TIB + 512, 512]], np.int64)
            disk.write_extents(extents, b"\1" * 8704)
            disk.write(name.encode().ljust(512), 33 * GIB)
        paths.append(path)
    child = tmp_path / "child.vhdx"
    create_disk(OS_FILES, child, parent=paths[0], clock=FakeClock(seed=3))
    report = rebase(child, paths[1])
    assert report.copied_bytes == 512
    assert report.compared_bytes <= 64 * KIB
    with open_disk(OS_FILES, child, clock=FakeClock()) as disk:
        buffer = bytearray(3)
        disk.read_into(buffer, 33 * GIB)
        assert buffer == b"old"


def test_progress_is_told(tmp_path: Path, seed: int) -> None:
    _, child, _ = chain(tmp_path, "vhdx", seed=seed)
    told: list[Progress] = []
    rebase(child, make(tmp_path / "other.vhdx", seed=11), progress=told.append)
    assert {each.phase for each in told} == {"rebase"}
    assert [each.done_bytes for each in told] == sorted(each.done_bytes for each in told)
    assert told[-1].total_bytes == SIZE
