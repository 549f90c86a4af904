"""How the parents of a differencing disk are found and proven, and each way in which that fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from hvreplica.disk import convert_disk, create_disk, map_disk, open_disk, resize_disk
from hvreplica.disk.open import CHAIN_LENGTH_MAX, open_layer
from hvreplica.disk.paths import candidate_paths, relative_windows_path
from hvreplica.errors import (
    BadSignature,
    FieldOutOfRange,
    FormatError,
    HvReplicaError,
    Locked,
    ParentInUse,
    ParentLoop,
    ParentMismatch,
    ParentMissing,
    UnsupportedVersion,
)
from hvreplica.files import OS_FILES
from hvreplica.formats.guid import NIL, braced
from hvreplica.formats.vhdx_bat import BatGeometry
from hvreplica.formats.vhdx_locator import pack_parent_locator
from hvreplica.units import MIB
from tests.disk.contract import everything
from tests.support.fakeclock import FakeClock

SIZE = 5 * MIB
METADATA_OFFSET = 2 * MIB


def make(path: Path, *, parent: Path | None = None, seed: int = 1, **options: object) -> Path:
    create_disk(
        OS_FILES,
        path,
        virtual_bytes=None if parent else SIZE,
        block_bytes=MIB,
        parent=parent,
        clock=FakeClock(seed=seed),
        **options,  # type: ignore[arg-type]
    )
    return path


def write(path: Path, data: bytes, offset: int, seed: int = 50) -> None:
    with open_disk(OS_FILES, path, writable=True, clock=FakeClock(seed=seed)) as disk:
        disk.write(data, offset)


def read(path: Path, **options: Path) -> bytes:
    with open_disk(OS_FILES, path, clock=FakeClock(), **options) as disk:
        return everything(disk)


def patch_locator(path: Path, entries: dict[str, str]) -> None:
    """Put another locator in the place of the one in a child, by hand: the item is the last of the metadata."""
    item = pack_parent_locator(entries)
    with path.open("r+b") as file:
        file.seek(METADATA_OFFSET)
        table = bytearray(file.read(65536))
        row = table[32 + 5 * 32 : 32 + 6 * 32]
        offset = int.from_bytes(row[16:20], "little")
        table[32 + 5 * 32 + 20 : 32 + 5 * 32 + 24] = len(item).to_bytes(4, "little")
        file.seek(METADATA_OFFSET)
        file.write(table)
        file.seek(METADATA_OFFSET + offset)
        file.write(item)


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Return a base with data, a child and a grandchild in folders of their own."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    base = make(tmp_path / "a" / "base disk.vhdx")
    write(base, b"\1" * SIZE, 0)
    child = make(tmp_path / "b" / "child.avhdx", parent=base, seed=2)
    write(child, b"\2" * MIB, MIB + 512)
    grandchild = make(tmp_path / "c" / "grandchild.avhdx", parent=child, seed=3)
    write(grandchild, b"\3" * 1024, 3 * MIB)
    return [base, child, grandchild]


def test_a_disk_is_differencing_where_it_has_a_parent_and_only_there(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    for options in ({"type": "differencing"}, {"type": "fixed", "parent": base}):
        with pytest.raises(FieldOutOfRange):
            make(tmp_path / "x.vhdx", **options)
        assert not (tmp_path / "x.vhdx").exists()
    make(tmp_path / "x.vhdx", type="differencing", parent=base)


def test_a_link_that_leads_nowhere_is_no_parent(chain: list[Path]) -> None:
    chain[0].unlink()
    chain[0].symlink_to("nowhere")
    with pytest.raises(ParentMissing):
        read(chain[1])


def test_a_chain_shows_the_newest_of_each_sector(chain: list[Path]) -> None:
    expected = bytearray(b"\1" * SIZE)
    expected[MIB + 512 : 2 * MIB + 512] = b"\2" * MIB
    expected[3 * MIB : 3 * MIB + 1024] = b"\3" * 1024
    assert read(chain[2]) == expected
    with open_disk(OS_FILES, chain[2], clock=FakeClock()) as disk:
        assert disk.info().type == "differencing"
        assert disk.info().parent == str(chain[1])
        depths = {entry.start: (entry.depth, entry.filename) for entry in map_disk(disk)}
        assert depths[3 * MIB] == (0, str(chain[2]))
        assert depths[MIB + 512] == (1, str(chain[1]))
        assert depths[0] == (2, str(chain[0]))


def test_a_chain_that_was_moved_as_a_whole_is_found_beside_its_child(
    chain: list[Path], tmp_path: Path
) -> None:
    expected = read(chain[2])
    (tmp_path / "moved").mkdir()
    moved = [Path(shutil.move(path, tmp_path / "moved")) for path in chain]
    assert read(moved[2]) == expected


def test_a_parent_given_by_hand_replaces_the_names(chain: list[Path], tmp_path: Path) -> None:
    expected = read(chain[1])
    hidden = Path(shutil.move(chain[0], tmp_path / "somewhere else"))
    with pytest.raises(ParentMissing):
        read(chain[1])
    assert read(chain[1], parent=hidden) == expected


def test_a_missing_parent_is_named_with_what_was_tried(chain: list[Path]) -> None:
    chain[0].unlink()
    with pytest.raises(ParentMissing) as caught:
        read(chain[2])
    assert caught.value.path == chain[1]
    assert "base disk.vhdx" in str(caught.value)
    assert caught.value.hint
    with open_layer(OS_FILES, chain[1], clock=FakeClock()) as alone:
        assert alone.info().parent == ".\\..\\a\\base disk.vhdx".removeprefix(".\\")
        buffer = bytearray(512)
        alone.read_into(buffer, MIB + 512)
        assert buffer == b"\2" * 512
        with pytest.raises(ParentMissing):
            alone.read_into(buffer, 0)
        with pytest.raises(ParentMissing):
            list(map_disk(alone))


def test_a_parent_that_was_written_is_refused(chain: list[Path]) -> None:
    write(chain[0], b"x", 0, seed=51)
    with pytest.raises(ParentMismatch) as caught:
        read(chain[2])
    assert caught.value.path == chain[0]
    assert caught.value.field == "parent_linkage"
    assert caught.value.hint


def test_another_disk_under_the_parents_name_is_refused(chain: list[Path]) -> None:
    chain[0].unlink()
    make(chain[0], seed=77)
    with pytest.raises(ParentMismatch):
        read(chain[1])
    chain[0].write_bytes(b"a raw file".ljust(SIZE))
    with pytest.raises(BadSignature):
        read(chain[1])
    raw = chain[1].parent / "raw"
    raw.write_bytes(b"a raw file".ljust(SIZE))
    with pytest.raises(ParentMismatch, match="must be a VHDX"):
        read(chain[1], parent=raw)


def test_a_damaged_parent_is_told_of_as_such(chain: list[Path]) -> None:
    with chain[0].open("r+b") as file:
        for offset in (65536, 131072):
            file.seek(offset)
            file.write(b"xxxx")
    with pytest.raises(FormatError) as caught:
        read(chain[1])
    assert caught.value.path == chain[0]


def test_a_loop_is_refused(chain: list[Path]) -> None:
    with open_layer(OS_FILES, chain[1], clock=FakeClock()) as disk:
        guid = disk.data_write_guid
    patch_locator(chain[1], {"parent_linkage": braced(guid), "relative_path": ".\\child.avhdx"})
    with pytest.raises(ParentLoop) as caught:
        read(chain[2])
    assert caught.value.path == chain[1]
    assert caught.value.hint


def test_a_loop_through_links_is_seen_in_its_first_round(chain: list[Path]) -> None:
    """Each round has other names of the same files."""
    with open_layer(OS_FILES, chain[1], clock=FakeClock()) as disk:
        guid = disk.data_write_guid
    os.symlink(".", chain[1].parent / "l")
    patch_locator(chain[1], {"parent_linkage": braced(guid), "relative_path": ".\\l\\child.avhdx"})
    with pytest.raises(ParentLoop, match="leads back"):
        read(chain[1])


def test_a_chain_has_so_many_members_and_no_more(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHAIN_LENGTH_MAX > 2 * 50  # checkpoints that Hyper-V makes at most
    monkeypatch.setattr("hvreplica.disk.open.CHAIN_LENGTH_MAX", len(chain))
    read(chain[-1])
    monkeypatch.setattr("hvreplica.disk.open.CHAIN_LENGTH_MAX", len(chain) - 1)
    with pytest.raises(ParentLoop, match="more members"):
        read(chain[-1])


def test_sectors_of_parent_and_child_must_be_of_one_size(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx", logical_sector_bytes=4096)
    child = make(tmp_path / "child.vhdx", seed=2)
    with open_disk(OS_FILES, base, clock=FakeClock()) as disk:
        guid = disk.data_write_guid
    real = make(tmp_path / "real.vhdx", parent=child, seed=3)
    patch_locator(real, {"parent_linkage": braced(guid), "relative_path": ".\\base.vhdx"})
    with pytest.raises(ParentMismatch, match="sectors"):
        read(real)


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"relative_path": ".\\base.vhdx"}, FieldOutOfRange),
        ({"parent_linkage": braced(NIL), "relative_path": ".\\base.vhdx"}, FieldOutOfRange),
        ({"parent_linkage": "{not a guid}", "relative_path": ".\\base.vhdx"}, FieldOutOfRange),
        ({"parent_linkage": braced(NIL)}, ParentMissing),
        ({"parent_linkage": "GOOD", "relative_path": ".\\absent.vhdx"}, ParentMissing),
        ({"parent_linkage": "GOOD", "relative_path": ".\\absent.vhdx", "absolute_win32_path": "C:\\x\\base.vhdx"}, None),
        ({"parent_linkage": "GOOD", "absolute_win32_path": "\\\\?\\D:\\base.vhdx"}, None),
        ({"parent_linkage": "GOOD", "volume_path": "\\\\?\\Volume{1-2}\\a\\base.vhdx"}, None),
        ({"parent_linkage": braced(NIL), "parent_linkage2": "GOOD", "relative_path": "base.vhdx"}, None),
    ],
)  # fmt: skip
def test_locators(tmp_path: Path, entries: dict[str, str], error: type[HvReplicaError] | None) -> None:
    base = make(tmp_path / "base.vhdx")
    child = make(tmp_path / "child.vhdx", parent=base, seed=2)
    with open_disk(OS_FILES, base, clock=FakeClock()) as disk:
        good = braced(disk.data_write_guid)
    patch_locator(child, {key: good if value == "GOOD" else value for key, value in entries.items()})
    if error is None:
        assert not any(read(child))
        return
    with pytest.raises(error) as caught:
        read(child)
    assert caught.value.path == child
    assert caught.value.hint


def test_a_locator_of_another_type_is_refused(tmp_path: Path) -> None:
    child = make(tmp_path / "child.vhdx", parent=make(tmp_path / "base.vhdx"), seed=2)
    content = bytearray(child.read_bytes())
    at = content.index(bytes.fromhex("b7ef4ab09ed1814ab78925b8e9445913"))
    content[at] ^= 1
    child.write_bytes(content)
    with pytest.raises(UnsupportedVersion):
        read(child)


def test_a_parent_holds_off_writers_while_its_child_is_open(chain: list[Path]) -> None:
    with open_disk(OS_FILES, chain[2], clock=FakeClock()):
        with pytest.raises(Locked):
            open_disk(OS_FILES, chain[0], writable=True, clock=FakeClock())
        open_disk(OS_FILES, chain[2], writable=True, clock=FakeClock()).close()
    open_disk(OS_FILES, chain[0], writable=True, clock=FakeClock()).close()
    with open_disk(OS_FILES, chain[0], writable=True, clock=FakeClock()), pytest.raises(Locked):
        read(chain[2])


def test_a_dirty_parent_is_replayed_in_memory_and_stays_as_it_is(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    disk = open_disk(OS_FILES, base, writable=True, clock=FakeClock(seed=9))
    disk.write(b"\7" * SIZE, 0)
    disk.flush()
    disk.abandon()
    child = make(tmp_path / "child.vhdx", parent=base, seed=2)
    before = base.read_bytes()
    write(child, b"\6" * 512, 0)
    assert read(child) == b"\6" * 512 + b"\7" * (SIZE - 512)
    assert base.read_bytes() == before


def test_a_fifo_under_the_parents_name_is_refused_and_not_waited_for(chain: list[Path]) -> None:
    chain[0].unlink()
    os.mkfifo(chain[0])
    with pytest.raises(OSError, match="neither a regular file"):
        read(chain[1])


def test_a_device_under_the_parents_name_is_not_even_opened(
    chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open some devices is to use them: a watchdog starts to count."""
    chain[0].unlink()
    chain[0].symlink_to("/dev/null")
    opened: list[object] = []
    real_open = os.open

    def noted(path: os.PathLike[str], *arguments: int) -> int:
        opened.append(Path(path))
        return real_open(path, *arguments)

    monkeypatch.setattr("os.open", noted)
    with pytest.raises(OSError, match="neither a regular file"):
        read(chain[1])
    assert chain[1] in opened
    assert chain[0] not in opened


def test_longer_and_shorter_children(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    write(base, b"\1" * SIZE, 0)
    for size in (3 * MIB + 512, 9 * MIB):
        child = tmp_path / f"{size}.vhdx"
        create_disk(
            OS_FILES, child, virtual_bytes=size, block_bytes=MIB, parent=base, clock=FakeClock(seed=size)
        )
        expected = (b"\1" * SIZE).ljust(size, b"\0")[:size]
        assert read(child) == expected
        write(child, b"\2" * 100, size - 100)
        assert read(child) == expected[:-100] + b"\2" * 100
        with open_disk(OS_FILES, child, clock=FakeClock()) as disk:
            assert sum(entry.length for entry in map_disk(disk)) == size
            rows = disk.extents(0, size)
            assert int(rows.sum(axis=1).max()) == size


def test_blocks_of_256_mib_share_a_bitmap_and_span_its_pages(tmp_path: Path) -> None:
    base = tmp_path / "base.vhdx"
    size = 6 << 30
    create_disk(OS_FILES, base, virtual_bytes=size, block_bytes=MIB, clock=FakeClock())
    write(base, b"\1" * (3 * MIB), 15 * MIB)
    write(base, b"\1" * MIB, (4 << 30) - 512 * 1024)
    child = tmp_path / "child.vhdx"
    create_disk(OS_FILES, child, block_bytes=256 * MIB, parent=base, clock=FakeClock(seed=2))
    write(child, b"\2" * 1024, 16 * MIB - 512)
    write(child, b"\2" * 1024, (4 << 30) - 512)
    with open_disk(OS_FILES, child, clock=FakeClock()) as disk:
        for offset in (16 * MIB, 4 << 30):
            buffer = bytearray(4096)
            disk.read_into(buffer, offset - 2048)
            assert buffer == b"\1" * 1536 + b"\2" * 1024 + b"\1" * 1536
        assert (
            BatGeometry.of(
                virtual_bytes=size, block_bytes=256 * MIB, logical_sector_bytes=512, has_parent=True
            ).entry_count
            == 34
        )
        rows = disk.extents(0, size)
        assert int(rows[:, 1].sum()) == 4 * MIB


def test_a_partial_block_without_its_bitmap_is_refused(tmp_path: Path) -> None:
    child = make(tmp_path / "child.vhdx", parent=make(tmp_path / "base.vhdx"), seed=2)
    write(child, b"\2" * 512, 0)
    with child.open("r+b") as file:
        file.seek(3 * MIB + 4096 * 8)
        assert int.from_bytes(file.read(8), "little") & 7 == 6
        file.seek(3 * MIB + 4096 * 8)
        file.write(bytes(8))
    with pytest.raises(FieldOutOfRange) as caught:
        read(child)
    assert caught.value.path == child
    assert caught.value.offset == 3 * MIB + 4096 * 8
    assert caught.value.hint


def test_names_are_looked_for_where_they_point_and_beside_the_child() -> None:
    child = Path("/vm/disks/child.vhdx")
    names = [
        ".\\base.vhdx",
        "..\\other\\base.vhdx",
        "sub\\b.vhdx",
        "C:\\vm\\c.vhdx",
        "\\\\?\\D:\\d.vhdx",
        "\\\\server\\share\\e.vhdx",
        "/abs/f.vhd",
        "file://./g%20h.vhd",
        "file:///i.vhd",
        "",
        "..",
        "nul\0.vhdx",
        "x" * 5000,
    ]
    assert candidate_paths(child, names) == [
        Path(path)
        for path in (
            "/vm/disks/base.vhdx",
            "/vm/other/base.vhdx",
            "/vm/disks/sub/b.vhdx",
            "/abs/f.vhd",
            "/vm/disks/g h.vhd",
            "/i.vhd",
            "/vm",
            "/vm/disks/b.vhdx",
            "/vm/disks/c.vhdx",
            "/vm/disks/d.vhdx",
            "/vm/disks/e.vhdx",
            "/vm/disks/f.vhd",
            "/vm/disks/i.vhd",
        )
    ]


@pytest.mark.parametrize(
    ("parent", "name"),
    [("/vm/a.vhdx", ".\\a.vhdx"), ("/vm/b/a.vhdx", ".\\b\\a.vhdx"), ("/x/a b.vhdx", "..\\x\\a b.vhdx")],
)
def test_relative_names_are_spelled_as_windows_does(parent: str, name: str) -> None:
    assert relative_windows_path(Path("/vm/child.vhdx"), Path(parent)) == name
    assert candidate_paths(Path("/vm/child.vhdx"), [name])[0] == Path(parent)


@pytest.mark.parametrize("name", [b"a\\b.vhdx", b"\xff.vhdx"])
@pytest.mark.parametrize("format_", ["vhdx", "vhd"])
def test_a_name_that_a_child_cannot_hold_is_refused(tmp_path: Path, name: bytes, format_: str) -> None:
    base = (
        make(tmp_path / os.fsdecode(name), format=format_)
        if format_ == "vhdx"
        else tmp_path / os.fsdecode(name)
    )
    if format_ == "vhd":
        create_disk(OS_FILES, base, virtual_bytes=SIZE, format="vhd", clock=FakeClock())
    with pytest.raises(FieldOutOfRange) as caught:
        create_disk(OS_FILES, tmp_path / "c.disk", format=format_, parent=base, clock=FakeClock(seed=2))
    assert caught.value.hint
    assert not (tmp_path / "c.disk").exists()


def test_what_is_open_for_writing_is_not_replaced(chain: list[Path]) -> None:
    with open_disk(OS_FILES, chain[2], writable=True, clock=FakeClock()):
        for call in (
            lambda: convert_disk(OS_FILES, chain[0], chain[2], overwrite=True, clock=FakeClock()),
            lambda: create_disk(OS_FILES, chain[2], virtual_bytes=SIZE, overwrite=True, clock=FakeClock()),
            lambda: convert_disk(OS_FILES, chain[2], chain[0], overwrite=True, clock=FakeClock()),
        ):
            with pytest.raises(Locked):
                call()
    with pytest.raises(Locked):
        convert_disk(OS_FILES, chain[2], chain[0], overwrite=True, clock=FakeClock())
    assert read(chain[2])[:512] == b"\1" * 512


def test_a_fifo_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="regular"):
        make(tmp_path / "fifo", overwrite=True)
    assert (tmp_path / "fifo").is_fifo()


def test_a_write_of_zeros_hides_the_parent(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    write(base, b"\1" * SIZE, 0)
    child = make(tmp_path / "child.vhdx", parent=base, seed=2)
    expected = bytearray(b"\1" * SIZE)
    with open_disk(OS_FILES, child, writable=True, clock=FakeClock(seed=3)) as disk:
        disk.write(bytes(MIB), 0)
        disk.write(bytes(512), MIB + 512)
        disk.write_zeroes(2 * MIB, MIB)
        disk.write_zeroes(3 * MIB + 100, 1000)
        for start, end in (
            (0, MIB),
            (MIB + 512, MIB + 1024),
            (2 * MIB, 3 * MIB),
            (3 * MIB + 100, 3 * MIB + 1100),
        ):
            expected[start:end] = bytes(end - start)
        assert everything(disk) == expected
        assert disk.info().allocated_bytes == 2 * MIB  # whole blocks of zeros take no room
        rows = disk.extents(0, SIZE)
        assert int(rows[:, 1].sum()) <= SIZE - 2 * MIB
    assert read(child) == expected


def test_random_reads_agree_with_the_whole(chain: list[Path], seed: int) -> None:
    whole = read(chain[2])
    rng = np.random.default_rng(seed)
    with open_disk(OS_FILES, chain[2], clock=FakeClock()) as disk:
        for _ in range(30):
            starts = rng.integers(0, SIZE - 70_000, 20)
            extents = np.column_stack((starts, rng.integers(0, 70_000, 20)))
            out = bytearray(int(extents[:, 1].sum()))
            disk.read_extents(extents, out)
            assert out == b"".join(whole[start : start + length] for start, length in extents.tolist())


@pytest.mark.parametrize("which", [0, 1])
def test_a_child_is_never_made_over_one_of_its_own_parents(which: int, chain: list[Path]) -> None:
    link = chain[0].with_name("link.vhdx")
    link.symlink_to(chain[which])
    before = [path.read_bytes() for path in chain]
    for name in (chain[which], link):
        with pytest.raises(ParentLoop):
            create_disk(OS_FILES, name, parent=chain[1], clock=FakeClock(), overwrite=True)
    assert [path.read_bytes() for path in chain] == before


@pytest.mark.parametrize("name", ["a.vhdx", "a.AVHDX", "a.vhd", "a.avhd"])
def test_a_container_that_lost_its_signature_is_not_taken_for_raw(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(MIB))
    with pytest.raises(BadSignature) as caught:
        open_disk(OS_FILES, path, clock=FakeClock())
    assert caught.value.path == path
    assert "disk check" in str(caught.value.hint)
    open_disk(OS_FILES, path, format="raw", clock=FakeClock()).close()


def test_a_disk_with_children_is_not_resized(chain: list[Path]) -> None:
    beside = chain[0].parent / "child.vhdx"
    make(beside, parent=chain[0], seed=7)
    with pytest.raises(ParentInUse) as caught:
        resize_disk(OS_FILES, chain[0], 2 * SIZE, clock=FakeClock(seed=8))
    assert str(beside) in str(caught.value)
    read(beside)
    resize_disk(OS_FILES, chain[0], 2 * SIZE, force=True, clock=FakeClock(seed=8))
    with pytest.raises(ParentMismatch):
        read(beside)
