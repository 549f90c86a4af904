"""Parts that are written anew hold what they held, cost what was planned, and survive a cut anywhere."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import ChecksumMismatch, Locked, StoreFull
from hvreplica.store import compact_parts as module
from hvreplica.store.compact_parts import Compacted, compact_parts, joined_change
from hvreplica.store.part_plan import MERGE_MIN
from tests.store.history import put_catalog
from tests.store.parts import (
    GRAIN_BYTES,
    add_part,
    add_points,
    names_in,
    opened_home,
    part_names,
    read_part,
    read_parts,
)
from tests.store.world import guid, ram_folder
from tests.support.faultfile import FaultFiles, Killed, crash_states

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store.home import VmHome
    from hvreplica.store.records import UndoRow


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def home(root: Path) -> Iterator[VmHome]:
    made = opened_home(root)
    yield made
    made.catalog.close()


@pytest.fixture
def point(home: VmHome) -> uuid.UUID:
    return add_points(home, 1)[0]


def grains(rng: random.Random, numbers: range | list[int]) -> dict[int, bytes]:
    return {
        number: bytes(GRAIN_BYTES) if rng.random() < 0.2 else rng.randbytes(GRAIN_BYTES) for number in numbers
    }


def rows_of(home: VmHome, point: uuid.UUID) -> list[UndoRow]:
    return home.catalog.undo_rows(home.vm_id, point_id=point, disk_index=0)


def test_one_part_is_left_alone(home: VmHome, point: uuid.UUID, seed: int) -> None:
    add_part(home, point, grains(random.Random(seed), range(5)))
    assert compact_parts(home, point, 0, look=True) == Compacted()


def test_part_without_a_live_byte_is_forgotten_and_what_it_knew_of_digests_stays(
    home: VmHome, point: uuid.UUID, seed: int
) -> None:
    rng = random.Random(seed)
    add_part(home, point, grains(rng, range(10)), change=f"{1:016x}{2:016x}")
    dead = add_part(home, point, grains(rng, range(2, 7)), change=f"{3:016x}{(1 << 64) - 1:016x}")
    before = read_parts(home, rows_of(home, point))
    done = compact_parts(home, point, 0, look=True)
    assert done == Compacted(1, 0, dead.file_bytes)
    [left] = rows_of(home, point)
    assert left.digest_change == f"{4:016x}{1:016x}"
    assert read_parts(home, [left]) == before
    assert names_in(home) == part_names([left])


def test_wasteful_part_is_written_without_what_is_dead(home: VmHome, point: uuid.UUID, seed: int) -> None:
    rng = random.Random(seed)
    first = add_part(home, point, grains(rng, range(10)))
    add_part(home, point, grains(rng, range(5, 15)))
    before = read_parts(home, rows_of(home, point))
    done = compact_parts(home, point, 0, look=True)
    assert (done.parts, done.written_bytes) == (0, 5 * GRAIN_BYTES)
    assert done.freed_bytes > 4 * GRAIN_BYTES
    found = rows_of(home, point)
    assert found[0] == first
    assert set(read_part(home, found[1])) == set(range(10, 15))
    assert read_parts(home, found) == before
    assert names_in(home) == part_names(found)


def test_without_a_look_only_the_number_of_parts_counts(home: VmHome, point: uuid.UUID, seed: int) -> None:
    rng = random.Random(seed)
    for place in range(MERGE_MIN - 1):
        add_part(home, point, grains(rng, range(9 * place, 9 * place + 10)))
    assert compact_parts(home, point, 0, look=False) == Compacted()
    add_part(home, point, grains(rng, range(100, 110)))
    before = read_parts(home, rows_of(home, point))
    done = compact_parts(home, point, 0, look=False)
    assert done.written_bytes == GRAIN_BYTES * len(before)
    [left] = rows_of(home, point)
    assert read_parts(home, [left]) == before
    assert names_in(home) == part_names([left])


def test_parts_behind_a_whole_disk_are_not_looked_at(home: VmHome, point: uuid.UUID, seed: int) -> None:
    rng = random.Random(seed)
    whole = rows_of(home, point) or [add_part(home, point, grains(rng, range(3)))]
    with home.catalog.transaction():
        home.catalog.delete_undo(home.vm_id, whole[0].id)
        for number in range(2 * MERGE_MIN):
            kind = "whole" if number == 1 else "undo"
            row = module.replace(whole[0], id=guid(number), kind=kind)
            home.catalog.add_undo(home.vm_id, row)
    assert compact_parts(home, point, 0, look=True) == Compacted()


@given(data=st.data())
def test_any_parts_hold_the_same_afterwards(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    with ram_folder() as root:
        home = opened_home(root)
        [point] = add_points(home, 1)
        for _ in range(data.draw(st.integers(1, 14))):
            start, count = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 30))
            chosen = [number for number in range(start, start + count) if rng.random() < 0.7] or [start]
            add_part(home, point, grains(rng, chosen), change=f"{rng.getrandbits(128):032x}")
        before = rows_of(home, point)
        content = read_parts(home, before)
        module_window, module._WINDOW_BYTES = module._WINDOW_BYTES, 3 * GRAIN_BYTES
        try:
            done = compact_parts(home, point, 0, look=data.draw(st.booleans()))
            after = rows_of(home, point)
            assert read_parts(home, after) == content
            assert joined_change(after) == joined_change(before)
            assert len(before) - len(after) == done.parts
            assert names_in(home) == part_names(after)
            compact_parts(home, point, 0, look=True)
            assert compact_parts(home, point, 0, look=True) == Compacted(), "nothing is left to do"
        finally:
            module._WINDOW_BYTES = module_window
            home.catalog.close()


def test_damage_is_not_written_anew(home: VmHome, point: uuid.UUID, seed: int) -> None:
    rng = random.Random(seed)
    add_part(home, point, grains(rng, range(10)))
    part = add_part(home, point, grains(rng, range(5, 15)))
    assert isinstance(home.files, FaultFiles)
    path = home.paths.undo(part.id)
    content = bytearray(home.files.content_of(path))
    content[4096 + 4096 + 100] ^= 1
    home.files.load(path, bytes(content))
    before = rows_of(home, point)
    with pytest.raises(ChecksumMismatch):
        compact_parts(home, point, 0, look=True)
    assert rows_of(home, point) == before
    assert names_in(home) == part_names(before)


def test_point_that_was_dropped_meanwhile_keeps_its_heirs_parts(
    home: VmHome, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    older, point = add_points(home, 2)
    for place in range(MERGE_MIN):
        add_part(home, point, grains(rng, range(place * 10, place * 10 + 10)))
    content = read_parts(home, rows_of(home, point))
    write = module._write_part

    def write_and_drop(*arguments: object) -> UndoRow:
        row = write(*arguments)  # type: ignore[arg-type]
        with home.catalog.transaction():
            home.catalog.move_undo(home.vm_id, point_id=point, target_id=older, disk_index=0)
        return row

    monkeypatch.setattr(module, "_write_part", write_and_drop)
    with pytest.raises(Locked, match="dropped meanwhile"):
        compact_parts(home, point, 0, look=False)
    assert read_parts(home, rows_of(home, older)) == content
    assert names_in(home) == part_names(rows_of(home, older))


@pytest.mark.parametrize("operation", ["write", "sync", "rename", "sync_directory", "open"])
def test_full_disk_leaves_the_parts_as_they_are(
    home: VmHome, point: uuid.UUID, seed: int, operation: str
) -> None:
    rng = random.Random(seed)
    for place in range(MERGE_MIN):
        add_part(home, point, grains(rng, range(9 * place, 9 * place + 10)))
    before = rows_of(home, point)
    assert isinstance(home.files, FaultFiles)
    home.files.fail(operation, path="*.partial" if operation != "sync_directory" else "*", error=errno.ENOSPC)
    with pytest.raises(StoreFull):
        compact_parts(home, point, 0, look=True)
    home.files.heal()
    assert rows_of(home, point) == before
    assert not [name for name in names_in(home) if name.endswith(".partial")]
    compact_parts(home, point, 0, look=True)
    assert len(rows_of(home, point)) == 1


def make_parts(root: Path, seed: int) -> tuple[VmHome, uuid.UUID]:
    """Make parts of which some die, some are trimmed and some become one."""
    rng = random.Random(seed)
    home = opened_home(root)
    [point] = add_points(home, 1)
    add_part(home, point, grains(rng, range(40)))
    add_part(home, point, grains(rng, range(10, 20)))
    add_part(home, point, grains(rng, range(30, 48)))
    for place in range(MERGE_MIN):
        add_part(home, point, grains(rng, [100 + place, 200 + place]))
    return home, point


def test_cut_at_any_step_leaves_what_the_point_holds(root: Path, seed: int) -> None:
    home, point = make_parts(root, seed)
    files = home.files
    assert isinstance(files, FaultFiles)
    content = read_parts(home, rows_of(home, point))
    start = len(files.trace())
    compact_parts(home, point, 0, look=True)
    home.catalog.close()
    count = 0
    for index, world in crash_states(files.trace(), seed=seed, subsets_per_prefix=4, limit=400):
        if index < start:
            continue
        put_catalog(root, world.last_note("catalog"))
        again = opened_home(root, world, clock_seed=8)
        assert read_parts(again, rows_of(again, point)) == content, world.story
        compact_parts(again, point, 0, look=True)
        assert read_parts(again, rows_of(again, point)) == content, world.story
        again.catalog.close()
        count += 1
    assert count > 50


def test_kill_at_any_step_leaves_what_the_point_holds(root: Path, seed: int) -> None:
    home, point = make_parts(root, seed)
    content = read_parts(home, rows_of(home, point))
    start = len(home.files.trace())  # type: ignore[attr-defined]
    compact_parts(home, point, 0, look=True)
    steps = len(home.files.trace())  # type: ignore[attr-defined]
    home.catalog.close()
    for step in range(start, steps):
        put_catalog(root, None)
        home, point = make_parts(root, seed)
        files = home.files
        assert isinstance(files, FaultFiles)
        files.kill_at(step)
        with pytest.raises(Killed):
            compact_parts(home, point, 0, look=True)
        home.catalog.close()
        again = opened_home(root, files.after_kill(), clock_seed=8)
        assert read_parts(again, rows_of(again, point)) == content
        compact_parts(again, point, 0, look=True)
        assert read_parts(again, rows_of(again, point)) == content
        again.catalog.close()
