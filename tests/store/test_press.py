"""Pressed undo parts: the same points in less room, whatever else happens to them."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvreplica.clock import SYSTEM
from hvreplica.errors import ChecksumMismatch, FormatError, Locked, StoreError
from hvreplica.files import OS_FILES
from hvreplica.formats.pressed import FRAME_BYTES_MAX, HEADER, is_pressed, unpack_header, unpack_table
from hvreplica.hrl import LogWriter
from hvreplica.store import part_files
from hvreplica.store.compact_parts import compact_parts
from hvreplica.store.open_point import choose_point, open_point
from hvreplica.store.pace import Pace
from hvreplica.store.part_check import check_part
from hvreplica.store.part_files import FrameMemory, PressedFile, open_part
from hvreplica.store.part_plan import MERGE_MIN
from hvreplica.store.points_kept import sweep_points
from hvreplica.store.policy import Policy, pack_policy
from hvreplica.store.press import FRAME_BYTES, PART_BYTES_MIN, is_raw, press_part, press_parts
from hvreplica.store.records import UndoRow
from hvreplica.store.undo_rows import UndoRows
from tests.store.late_commit import fail_after_commit
from tests.store.parts import add_points, opened_home
from tests.store.point_world import MIB, PAGE, PointWorld, random_writes

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path


SIZE = 6 * MIB


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PointWorld]:
    made = PointWorld(tmp_path / "store", {0: SIZE})
    yield made
    made.close()


def text_like(rng: random.Random, length: int) -> bytes:
    """Return bytes that shrink to about a third."""
    words = [rng.randbytes(3).hex().encode() for _ in range(40)]
    return b" ".join(rng.choice(words) for _ in range(length // 7 + 1))[:length]


def parts_of(world: PointWorld, point_id: uuid.UUID | None = None) -> list[UndoRow]:
    return world.catalog.undo_rows(world.home.vm_id, point_id=point_id)


def two_points(world: PointWorld, rng: random.Random, length: int = 2 * MIB) -> UndoRow:
    """Return the part of a point that holds `length` bytes of text, and a hole behind them."""
    world.cut({0: [(PAGE, text_like(rng, length))]})
    point = world.cut({0: [(PAGE, rng.randbytes(length)), (4 * MIB, b"x" * MIB)]})
    return parts_of(world, world.ids[world.ids.index(point) - 1])[0]


def assert_points(world: PointWorld) -> None:
    for point_id, disks in world.points.items():
        with open_point(world.home, point_id) as opened:
            data = bytearray(opened.disks[0].virtual_bytes)
            opened.disks[0].read_into(data, 0)
            assert bytes(data) == disks[0]


def test_pressed_part_is_the_same_log_in_less_room(world: PointWorld, rng: random.Random) -> None:
    row = two_points(world, rng)
    with open_part(OS_FILES, world.home.paths.undo(row.id)) as reader:
        plain = reader.file.read(0, reader.log_bytes)
        entries = np.concatenate(list(reader.entries()))
    assert press_part(world.home, row) > MIB
    new = parts_of(world, row.point_id)[0]
    path = world.home.paths.undo(new.id)
    assert new.id != row.id
    assert new.file_bytes == path.stat().st_size < row.covered_bytes == new.covered_bytes
    assert is_raw(row)
    assert not is_raw(new)
    assert sorted(each.name for each in world.home.paths.points.iterdir() if each.suffix == ".hru") == sorted(
        f"{each.id}.hru" for each in parts_of(world)
    )
    with open_part(OS_FILES, path) as reader:
        assert reader.header.unique_id == new.id
        assert reader.file.size() == len(plain)
        for _ in range(200):
            start = rng.randrange(4096, len(plain))
            length = rng.randrange(len(plain) - start)
            assert reader.file.read(start, length) == plain[start : start + length]
        assert (np.concatenate(list(reader.entries())) == entries).all()
        held = sum(length for _, length in reader.file.data_extents(0, len(plain)))
        assert held < 2 * MIB + 256 * 1024, "the hole stays one"
        with pytest.raises(FormatError):
            reader.file.read(len(plain) - 1, 2)
        with pytest.raises(PermissionError):
            reader.file.write(b"x", 0)
    assert_points(world)


@settings(max_examples=max(settings.default.max_examples // 8, 1))
@given(seed=st.integers(0, 1 << 32))
def test_points_of_any_history_are_what_they_were(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Cuts, drops, merges and pressing in any order, against a dictionary of snapshots."""
    rng = random.Random(seed)
    world = PointWorld(tmp_path_factory.mktemp("store") / "s", {0: 3 * MIB})
    held = open_point(world.home, "latest")
    expected = world.points[held.id][0]
    try:
        for _ in range(rng.randrange(2, 8)):
            step = rng.random()
            raw = [row for row in parts_of(world) if is_raw(row)]
            if step < 0.35 and raw:
                press_part(world.home, rng.choice(raw), held_bytes_min=0)
            elif step < 0.5 and len(world.ids) > 2:
                world.drop(rng.choice([each for each in world.ids[:-1] if each != held.id]))
            elif step < 0.6:
                compact_parts(world.home, rng.choice(world.ids), 0, look=True)
            else:
                writes = [
                    (offset, text_like(rng, len(data)) if any(data) else data)
                    for offset, data in random_writes(rng, len(world.disks[0]), 4)
                ]
                world.cut({0: writes})
            assert_points(world)
            data = bytearray(held.disks[0].virtual_bytes)
            held.disks[0].read_into(data, 0)
            assert data == expected  # opened long ago: it goes on with the files that it has
    finally:
        held.close()
        world.close()


def test_policy_says_which_parts_are_pressed(world: PointWorld, rng: random.Random) -> None:
    for _ in range(4):
        world.cut({0: [(0, text_like(rng, MIB))]})
    world.cut({0: [(0, rng.randbytes(MIB))]})
    world.cut({0: [(0, text_like(rng, MIB))]})
    world.cut({0: [(PAGE, b"small")]})
    home, last = world.home, world.ids[-1]
    with world.catalog.transaction():
        world.catalog.set_policy(home.vm_id, pack_policy(Policy(compress_after_points=None)))
    assert press_parts(home).parts == 0
    with world.catalog.transaction():
        world.catalog.set_policy(home.vm_id, pack_policy(Policy(compress_after_points=4)))
    assert press_parts(home).parts == 3  # of eight points; the first held nothing but zeros
    with world.catalog.transaction():
        world.catalog.set_policy(home.vm_id, pack_policy(Policy()))
    pressed = press_parts(home)
    assert pressed.parts == 1  # of two: the other one is random
    assert pressed.freed_bytes > MIB // 2
    by_point = {row.point_id: row for row in parts_of(world)}
    assert [is_raw(by_point[point_id]) for point_id in world.ids if point_id != last] == [
        *(True, False, False, False, False, True, True)
    ]
    assert press_parts(home).parts == 0
    assert_points(world)


def test_pressing_ends_where_the_policy_wants_no_more(world: PointWorld, rng: random.Random) -> None:
    for _ in range(5):
        world.cut({0: [(0, text_like(rng, MIB))]})

    def stop() -> None:
        with world.catalog.transaction():
            world.catalog.set_policy(world.home.vm_id, pack_policy(Policy(compress_after_points=None)))

    assert press_parts(world.home, pause=stop).parts == 0, "the first held nothing but zeros"


def test_random_bytes_stay_as_they_are_and_are_not_tried_again(world: PointWorld, rng: random.Random) -> None:
    world.cut({0: [(0, rng.randbytes(MIB))]})
    for _ in range(3):
        world.cut({0: [(0, rng.randbytes(MIB))]})
    before = [row.id for row in parts_of(world)]
    calls: list[None] = []
    press_parts(world.home, pause=lambda: calls.append(None))
    assert calls
    kept = len(calls)
    press_parts(world.home, pause=lambda: calls.append(None))
    assert len(calls) == kept
    pressed = {row.id for row in parts_of(world)} - set(before)
    assert all(row.covered_bytes == MIB for row in parts_of(world) if row.id in pressed)
    assert_points(world)


def test_part_that_is_gone_meanwhile_leaves_nothing(world: PointWorld, rng: random.Random) -> None:
    row = two_points(world, rng)
    is_dropped = False

    def drop() -> None:
        nonlocal is_dropped
        if not is_dropped:
            is_dropped = True
            for point_id in world.ids[:-1]:
                world.drop(point_id)

    with pytest.raises(Locked, match="gone meanwhile"):
        press_part(world.home, row, pause=drop)
    assert [each.suffix for each in world.home.paths.points.iterdir() if each.suffix != ".use"] == []


def test_exchange_whose_commit_shows_up_after_a_restart_loses_nothing(
    world: PointWorld, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = two_points(world, rng)
    with monkeypatch.context() as patched:
        fail_after_commit(patched, world.catalog)
        with pytest.raises(StoreError, match="disk I/O error"):
            press_part(world.home, row)
    assert not is_raw(parts_of(world, row.point_id)[0])
    sweep_points(world.home)
    assert_points(world)


def test_a_look_for_parts_asks_the_catalog_as_often_for_many_points_as_for_few(
    world: PointWorld, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    undo_rows = UndoRows.undo_rows

    def counted(*arguments: object, **wanted: object) -> list[UndoRow]:
        asked.append(None)
        return undo_rows(*arguments, **wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(UndoRows, "undo_rows", counted)
    looks = []
    for _ in range(3):
        for _ in range(4):
            world.cut({0: [(0, rng.randbytes(PART_BYTES_MIN))]})
        press_parts(world.home)
        asked.clear()
        assert press_parts(world.home).parts == 0
        looks.append(len(asked))
    assert looks == [1, 1, 1]


def test_part_that_moves_to_another_point_meanwhile_is_exchanged_there(
    world: PointWorld, rng: random.Random
) -> None:
    row = two_points(world, rng)
    heir = world.ids[world.ids.index(row.point_id) - 1]
    is_dropped = False

    def drop() -> None:
        nonlocal is_dropped
        if not is_dropped:
            is_dropped = True
            world.drop(row.point_id)

    assert press_part(world.home, row, pause=drop) > 0
    assert [is_raw(each) for each in parts_of(world, heir)] == [True, False]
    assert_points(world)


def test_part_with_large_metadata_blocks_is_pressed(tmp_path: Path, rng: random.Random) -> None:
    """Twenty thousand entries have blocks that are longer than a frame may be."""
    home = opened_home(tmp_path, OS_FILES)
    point_id = add_points(home, 1)[0]
    part_id, count, page = SYSTEM.guid(), 20_000, text_like(rng, PAGE)
    path = home.paths.undo(part_id)
    with LogWriter.create_undo(
        OS_FILES,
        path,
        part_id=part_id,
        log_id=None,
        data_write_guid=None,
        entry_count=count,
        clock=SYSTEM,
    ) as writer:
        rows = np.column_stack((np.arange(count) * 2 * PAGE, np.full(count, PAGE)))
        writer.append(rows, page * count)
    with home.catalog.transaction():
        row = UndoRow(point_id, 0, part_id, "undo", path.stat().st_size, count * PAGE)
        home.catalog.add_undo(home.vm_id, row)
    with open_part(OS_FILES, path) as reader:
        assert reader.header.metadata_size > FRAME_BYTES_MAX
    assert press_part(home, row) > row.file_bytes // 2
    (new,) = home.catalog.undo_rows(home.vm_id)
    with open_part(OS_FILES, home.paths.undo(new.id)) as reader:
        entries = np.concatenate(list(reader.entries()))
        assert (entries["byte_offset"] == rows[:, 0]).all()
        assert reader.file.read(int(entries["log_offset"][-1]), PAGE) == page
    home.catalog.close()


# ---- damage


def damage_frame(world: PointWorld, row: UndoRow, disk_offset: int) -> None:
    """Change a stored byte of the frame that has what the part holds from `disk_offset` on."""
    path = world.home.paths.undo(row.id)
    with open_part(OS_FILES, path) as reader:
        entry = next(
            each
            for batch in reader.entries()
            for each in batch
            if 0 <= disk_offset - int(each["byte_offset"]) < int(each["data_length"])
        )
        wanted = int(entry["log_offset"]) + disk_offset - int(entry["byte_offset"])
    content = bytearray(path.read_bytes())
    assert is_pressed(content)
    header = unpack_header(content, file_bytes=len(content))
    table = unpack_table(header, content[header.table_offset :])
    frame = int(np.searchsorted(table.starts, wanted, "right")) - 1
    content[int(table.places[frame]) + 20] ^= 0x10
    path.write_bytes(content)


def test_damaged_frame_spoils_what_is_read_of_it_alone(world: PointWorld, rng: random.Random) -> None:
    row = two_points(world, rng)
    press_part(world.home, row)
    new = parts_of(world, row.point_id)[0]
    damage_frame(world, new, MIB)
    with open_point(world.home, row.point_id) as opened:
        disk, expected = opened.disks[0], world.points[row.point_id][0]
        data = bytearray(PAGE)
        disk.read_into(data, 8 * PAGE)
        assert data == expected[8 * PAGE : 9 * PAGE]
        assert choose_point(world.home, row.point_id).damage is None
        with pytest.raises(ChecksumMismatch, match="frame"):
            disk.read_into(data, MIB)
        disk.read_into(data, 3 * PAGE)
        assert data == expected[3 * PAGE : 4 * PAGE]
    found = next(point for point in world.catalog.points(world.home.vm_id) if point.id == row.point_id)
    assert found.state == "damaged"
    assert str(new.id) in str(found.damage)
    path = world.home.paths.undo(new.id)
    pace = Pace(SYSTEM, lambda _: False)
    fault = check_part(OS_FILES, path, pace, part_id=new.id, file_bytes=new.file_bytes)
    assert fault is not None
    assert fault.extents is not None
    starts, ends = fault.extents[:, 0], fault.extents.sum(axis=1)
    assert ((starts <= MIB) & (ends > MIB)).any()
    assert fault.extents[:, 1].sum() <= FRAME_BYTES + 2 * 16 * PAGE


@pytest.mark.parametrize("place", [0, 12, 30, HEADER.size + 3, -5])
def test_damaged_structure_spoils_the_part(world: PointWorld, rng: random.Random, place: int) -> None:
    row = two_points(world, rng)
    press_part(world.home, row)
    new = parts_of(world, row.point_id)[0]
    path = world.home.paths.undo(new.id)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)
    pace = Pace(SYSTEM, lambda _: False)
    fault = check_part(OS_FILES, path, pace, part_id=new.id, file_bytes=new.file_bytes)
    assert fault is not None
    assert fault.extents is None
    path.write_bytes(content[:-1])
    with pytest.raises(FormatError):
        open_part(OS_FILES, path)


def test_whole_part_is_found_whole(world: PointWorld, rng: random.Random) -> None:
    row = two_points(world, rng)
    press_part(world.home, row)
    new = parts_of(world, row.point_id)[0]
    pace = Pace(SYSTEM, lambda _: False)
    path = world.home.paths.undo(new.id)
    assert check_part(OS_FILES, path, pace, part_id=new.id, file_bytes=new.file_bytes) is None
    fault = check_part(OS_FILES, path, pace, part_id=row.id, file_bytes=new.file_bytes)
    assert fault is not None
    assert "UniqueId" in fault.sentence


def test_damaged_part_is_not_pressed(world: PointWorld, rng: random.Random) -> None:
    row = two_points(world, rng)
    path = world.home.paths.undo(row.id)
    content = bytearray(path.read_bytes())
    content[MIB] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumMismatch):
        press_part(world.home, row)
    assert [each.id for each in parts_of(world, row.point_id)] == [row.id]
    assert path.read_bytes() == content


# ---- readers


def test_parts_that_are_merged_share_the_memory_for_their_frames(
    world: PointWorld, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SIZE // MERGE_MIN // PAGE * PAGE
    world.cut({0: [(0, text_like(rng, SIZE))]})
    first = world.ids[-1]
    for place in range(MERGE_MIN):
        world.cut({0: [(place * step, rng.randbytes(step))]})
    for row in parts_of(world):
        if row.point_id in world.ids[1:]:
            press_part(world.home, row)
    for point_id in world.ids[2:-1]:
        world.drop(point_id)
    assert [is_raw(row) for row in parts_of(world, first)] == MERGE_MIN * [False]
    memories: list[FrameMemory] = []

    def made() -> FrameMemory:
        memories.append(FrameMemory(3 * FRAME_BYTES))
        return memories[-1]

    monkeypatch.setattr(part_files, "FrameMemory", made)
    assert compact_parts(world.home, first, 0, look=True).parts == MERGE_MIN - 1
    assert 0 < sum(memory.held_bytes for memory in memories) <= 3 * FRAME_BYTES
    assert_points(world)


def test_many_threads_read_at_random_within_the_memory_allowed(world: PointWorld, rng: random.Random) -> None:
    row = two_points(world, rng)
    press_part(world.home, row)
    path = world.home.paths.undo(parts_of(world, row.point_id)[0].id)
    memory = FrameMemory(bytes_max=3 * FRAME_BYTES)
    file = PressedFile(OS_FILES.open(path), memory)
    plain = file.read(0, file.size())
    failures: list[int] = []

    def read(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(150):
            start = own.randrange(len(plain) - PAGE)
            if file.read(start, PAGE) != plain[start : start + PAGE]:
                failures.append(start)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert memory.held_bytes <= 3 * FRAME_BYTES
    file.close()
