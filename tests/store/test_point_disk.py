"""Recovery points are read as they were, while newer ones come and go."""

from __future__ import annotations

import gc
import os
import random
import resource
import threading
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvreplica.clock import SYSTEM
from hvreplica.errors import FormatError, NoSuchPoint, StoreError
from hvreplica.files import OS_FILES
from hvreplica.store.open_point import choose_point, open_point
from hvreplica.store.point_disk import PointDisk
from hvreplica.store.point_index import DISK, ZEROS, PointIndex
from hvreplica.store.point_view import PointSource
from hvreplica.store.records import DiskSpec
from tests.store.point_world import MIB, PAGE, PointWorld, random_writes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 6 * MIB


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PointWorld]:
    made = PointWorld(tmp_path / "store", {0: SIZE, 3: MIB})
    yield made
    made.close()


def content_of(world: PointWorld, point_id: uuid.UUID) -> dict[int, bytes]:
    """Read all disks of a point."""
    found = {}
    with open_point(world.home, point_id) as opened:
        for index, disk in opened.disks.items():
            data = bytearray(disk.virtual_bytes)
            disk.read_into(data, 0)
            found[index] = bytes(data)
    return found


@given(seed=st.integers(0, 1 << 32))
def test_index_names_the_first_part_of_the_walk(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1, 60) * PAGE
    index, tables = PointIndex.empty(size), []
    for _ in range(rng.randrange(1, 4)):
        added = []
        for _ in range(rng.randrange(4)):
            rows, at = [], PAGE
            for _ in range(rng.randrange(6)):
                length = rng.randrange(1, 40) * 512
                is_zero = rng.random() < 0.3
                rows.append((rng.randrange(size // 512 + 20) * 512, length, -1 if is_zero else at))
                at += 0 if is_zero else length
            added.append((len(tables), np.array(rows, np.int64).reshape(-1, 3)))
            tables.append(rows)
        index = index.under(added)
    tiles = index.tiles()
    pieces, numbers = tiles.split(np.array([[0, size, 7]], np.int64))
    covered = 0
    for (offset, length, at, file_offset), number in zip(pieces.tolist(), numbers.tolist(), strict=True):
        assert (offset, at) == (covered, covered + 7)
        for low in range(offset, offset + length, 512):
            expected = (DISK, 0)
            for part, rows in enumerate(tables):
                hits = [row for row in rows if row[0] <= low < row[0] + row[1]]
                if hits:
                    start, _, place = hits[-1]
                    expected = (ZEROS, 0) if place < 0 else (part, place + low - start)
                    break
            assert number == expected[0]
            assert number < 0 or file_offset + low - offset == expected[1]
        covered += length
    assert covered == size


@settings(max_examples=max(settings.default.max_examples // 4, 1))
@given(seed=st.integers(0, 1 << 32))
def test_points_of_any_history_are_what_they_were(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Random histories against a dictionary of snapshots: cuts, drops, resizes, disks that were replaced."""
    rng = random.Random(seed)
    world = PointWorld(tmp_path_factory.mktemp("store") / "s", {0: 3 * MIB})
    held = open_point(world.home, "latest")
    expected = dict(world.points[held.id])
    try:
        for _ in range(rng.randrange(1, 7)):
            step = rng.random()
            if step < 0.15 and len(world.ids) > 2:
                world.drop(rng.choice([each for each in world.ids[:-1] if each != held.id]))
            elif step < 0.25:
                world.replace_disk(0, rng.randbytes(PAGE) + bytes(3 * MIB - PAGE))
            else:
                size = rng.choice([None, None, None, 2 * MIB + 512, 3 * MIB, 5 * MIB])
                end = min(size or len(world.disks[0]), len(world.disks[0]))
                world.cut({0: random_writes(rng, end, 4)}, sizes={} if size is None else {0: size})
            for point_id, disks in world.points.items():
                assert content_of(world, point_id) == disks
            data = bytearray(held.disks[0].virtual_bytes)
            held.disks[0].read_into(data, 0)
            assert data == expected[0]  # opened long ago, and brought on by what came since
            _assert_holes_are_zeros(held.disks[0], expected[0])
    finally:
        held.close()
        world.close()


def _assert_holes_are_zeros(disk: PointDisk, content: bytes) -> None:
    at = 0
    for offset, length in disk.extents(0, disk.virtual_bytes).tolist():
        assert offset >= at
        assert not any(content[at:offset])
        at = offset + length
    assert not any(content[at:])


def test_spans_are_read_from_wherever_they_stand(world: PointWorld, rng: random.Random) -> None:
    first = world.cut({0: random_writes(rng, SIZE, 20)})
    for _ in range(4):
        world.cut({0: random_writes(rng, SIZE, 8)})
    content = world.points[first][0]
    with open_point(world.home, first) as opened:
        disk = opened.disks[0]
        for _ in range(200):
            rows = []
            for _ in range(rng.randrange(1, 5)):
                offset = rng.randrange(SIZE)
                rows.append((offset, rng.randrange(0, min(SIZE - offset, 200_000) + 1)))
            out = bytearray(sum(length for _, length in rows))
            disk.read_extents(np.array(rows, np.int64), out)
            assert out == b"".join(content[offset : offset + length] for offset, length in rows)
            under, data = disk.under(), bytearray(rows[0][1])
            assert under.read_into(data, rows[0][0])
            assert data == content[rows[0][0] :][: rows[0][1]]


def test_reader_never_sees_a_wrong_byte_while_points_are_applied(
    world: PointWorld, rng: random.Random
) -> None:
    """Threads read old points, through both ways, while the disk changes under them."""
    ids = [world.cut({0: random_writes(rng, SIZE, 30)}) for _ in range(3)]
    stopping, wrong, counts = threading.Event(), [], [0] * 4
    opened = [open_point(world.home, each) for each in (ids[0], ids[0], ids[2], ids[2])]

    def read(number: int) -> None:
        point = opened[number]
        disk, content = point.disks[0], world.points[point.id][0]
        own = random.Random(number)
        under = disk.under()
        while not stopping.is_set():
            length = own.choice([512, PAGE, 64 << 10, MIB])
            offset = own.randrange((SIZE - length) // 512 + 1) * 512
            data = bytearray(length)
            if number % 2:
                disk.read_into(data, offset)
            else:
                while not under.read_into(data, offset):
                    under = disk.under(under)
            counts[number] += 1
            if data != content[offset : offset + length]:
                wrong.append((number, offset, length))
                return

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for step in range(20):
        sizes = {0: SIZE + (step % 3) * MIB} if step % 5 == 0 else None
        world.cut({0: random_writes(rng, SIZE, 10)}, sizes=sizes)
    stopping.set()
    for thread in threads:
        thread.join()
    for each in opened:
        each.close()
    assert not wrong
    assert all(counts)


def test_read_that_a_change_comes_into_counts_not(
    world: PointWorld, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk changes after the read has begun: its bytes are those of a newer point."""
    point_id = world.cut({0: [(0, rng.randbytes(MIB))]})
    with open_point(world.home, point_id) as opened:
        disk = opened.disks[0]
        below = disk.view._base.disk
        real_spans, real_extents = below.read_spans, below.extents

        def read_spans(spans: Any, out: Any) -> Any:
            world.cut({0: [(0, rng.randbytes(MIB))]})
            return real_spans(spans, out)

        def extents(start: int, end: int) -> Any:
            world.cut({0: [(0, bytes(2 * MIB))]})
            return real_extents(start, end)

        monkeypatch.setattr(below, "read_spans", read_spans)
        monkeypatch.setattr(below, "extents", extents)
        assert disk.view.extents(0, SIZE) is None
        disk.renewed(disk.view)
        below = disk.view._base.disk
        real_spans = below.read_spans
        monkeypatch.setattr(below, "read_spans", read_spans)
        data = bytearray(2 * MIB)
        disk.read_into(data, 0)
        assert data == world.points[point_id][0][: 2 * MIB]
        assert disk.extents(0, SIZE).tolist() == [[0, MIB]]


def test_read_that_a_change_comes_into_is_repeated(world: PointWorld, rng: random.Random) -> None:
    """The disk's file is read, and only then the counter: what was read of a newer point does not count."""
    point_id = world.cut({0: [(0, rng.randbytes(MIB))]})
    with open_point(world.home, point_id) as opened:
        disk = opened.disks[0]
        view, under = disk.view, disk.under()
        world.cut({0: [(0, rng.randbytes(MIB))]})
        data = bytearray(MIB)
        assert not view.read(np.array([[0, MIB, 0]], np.int64), data)
        assert view.extents(0, SIZE) is None
        assert not under.read_into(data, 0)
        disk.read_into(data, 0)
        assert data == world.points[point_id][0][:MIB]
        assert disk.view is not view
        newer = disk.under(under)
        assert newer.read_into(data, 0)
        assert data == world.points[point_id][0][:MIB]
        assert disk.under(under).kept is newer.kept  # made once for all who ask


def test_what_is_in_parts_alone_needs_no_new_view(world: PointWorld, rng: random.Random) -> None:
    first = world.cut({0: [(0, rng.randbytes(MIB))]})
    world.cut({0: [(0, rng.randbytes(MIB))]})
    with open_point(world.home, first) as opened:
        under = opened.disks[0].under()
        world.cut({0: [(2 * MIB, rng.randbytes(MIB))]})
        data = bytearray(MIB)
        assert under.read_into(data, 0)
        assert not under.read_into(data, 2 * MIB)


def test_removed_parts_stay_readable(world: PointWorld, rng: random.Random) -> None:
    ids = [world.cut({0: random_writes(rng, SIZE, 10)}) for _ in range(3)]
    with open_point(world.home, ids[0]) as opened:
        for name in OS_FILES.names(world.home.paths.points):
            if name.endswith(".hru"):
                OS_FILES.unlink(world.home.paths.points / name)
        data = bytearray(SIZE)
        opened.disks[0].read_into(data, 0)
        assert data == world.points[ids[0]][0]


def _open_below(folder: Path) -> int:
    """Count this process's files below `folder`: what others' garbage closes meanwhile does not count."""
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return sum(link.startswith(f"{folder}/") for link in links)


@pytest.mark.parametrize(("damage", "error"), [("missing", StoreError), ("cut", FormatError)])
def test_part_that_is_missing_or_damaged_is_told_with_what_to_do(
    world: PointWorld, damage: str, error: type[Exception]
) -> None:
    first = world.ids[0]
    world.cut({0: [(0, b"x" * PAGE)]})
    (part,) = world.home.paths.points.glob("*.hru")
    if damage == "missing":
        part.unlink()
    else:
        os.truncate(part, 3)
    with pytest.raises(error) as caught, open_point(world.home, first) as opened:
        opened.disks[0].read_into(bytearray(PAGE), 0)
    assert part.name in str(caught.value)
    assert "store verify" in (getattr(caught.value, "hint", None) or "")


def test_files_are_closed_with_the_last_who_reads_them(world: PointWorld, rng: random.Random) -> None:
    ids = [world.cut({0: random_writes(rng, SIZE, 10)}) for _ in range(5)]
    folder = world.root.resolve()
    gc.collect()
    before = _open_below(folder)
    opened = open_point(world.home, ids[0])
    under = opened.disks[0].under()
    assert _open_below(folder) > before + 4
    opened.close()
    data = bytearray(PAGE)
    assert under.read_into(data, 0)  # a connection that is still there
    assert data == world.points[ids[0]][0][:PAGE]
    del under
    gc.collect()
    assert _open_below(folder) == before


def test_point_of_more_parts_than_files_are_open_usually(world: PointWorld) -> None:
    first = world.ids[0]
    count = 40
    for number in range(count):
        world.cut({3: [(number * PAGE, b"x" * PAGE)]})
    gc.collect()  # what others' garbage closes later would be room that this test does not mean
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + count // 2, hard))
    try:
        assert content_of(world, first) == world.points[first]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_damaged_part_is_named_and_spoils_no_newer_point(world: PointWorld, rng: random.Random) -> None:
    ids = [world.cut({0: random_writes(rng, SIZE, 10)}) for _ in range(3)]
    row = world.catalog.undo_rows(world.home.vm_id, point_id=ids[0])[0]
    path = world.home.paths.undo(row.id)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError) as caught:
        open_point(world.home, ids[0])
    assert str(path) in str(caught.value)
    assert content_of(world, ids[1]) == world.points[ids[1]]
    assert content_of(world, ids[2]) == world.points[ids[2]]


def test_points_are_chosen_by_name(world: PointWorld, rng: random.Random) -> None:
    app = world.cut({0: random_writes(rng, SIZE, 3)}, consistency="app")
    newest = world.cut({0: random_writes(rng, SIZE, 3)})
    assert choose_point(world.home, "latest").id == newest
    assert choose_point(world.home, "latest-app").id == app
    assert choose_point(world.home, str(app)).id == app
    assert choose_point(world.home, app).id == app
    for which in ("newest", uuid.UUID(int=5), ""):
        with pytest.raises(NoSuchPoint):
            choose_point(world.home, which)
    world.drop(app)
    with pytest.raises(NoSuchPoint, match="application-consistent"):
        choose_point(world.home, "latest-app")
    with world.catalog.transaction():
        world.catalog.damage_point(world.home.vm_id, newest, "0.hru has a hole")
    with pytest.raises(StoreError, match=r"0\.hru has a hole"):
        choose_point(world.home, newest)


def test_point_that_is_dropped_under_a_reader_is_no_wrong_byte(world: PointWorld, rng: random.Random) -> None:
    """Nobody drops a point that is held; if it comes to that, the reader is told."""
    point_id = world.cut({0: random_writes(rng, SIZE, 3)})
    with open_point(world.home, point_id) as opened:
        world.cut({0: random_writes(rng, SIZE, 3)})
        world.drop(point_id)
        with pytest.raises(NoSuchPoint):
            opened.disks[0].read_into(bytearray(SIZE), 0)


def test_held_point_is_locked_for_who_would_drop_it(world: PointWorld) -> None:
    point_id = world.ids[0]
    use = world.home.paths.use(point_id)
    with open_point(world.home, point_id), open_point(world.home, point_id), pytest.raises(StoreError):
        OS_FILES.lock(use)
    OS_FILES.lock(use).release()


def test_what_no_file_has_any_more_is_zeros(world: PointWorld) -> None:
    """A point whose disk is longer than what the walk ends in, with no part for the rest."""
    source = PointSource(
        files=OS_FILES,
        clock=SYSTEM,
        disk_path=world.home.paths.disk(3),
        virtual_bytes=2 * MIB + 512,
        walk=list,
        watch=None,
    )
    disk = PointDisk(source, world.root, point_id=world.ids[0], spec=DiskSpec(3, MIB))
    for read in (disk.read_into, disk.under().read_into):
        data = bytearray(b"x" * (MIB + 1024))
        read(data, MIB - 512)
        assert not any(data)
    assert not len(disk.extents(0, disk.virtual_bytes))


def test_disk_of_a_point_is_for_reading(world: PointWorld) -> None:
    with open_point(world.home, "latest", disks=[3]) as opened:
        assert list(opened.disks) == [3]
        disk = opened.disks[3]
        for change in (
            lambda: disk.write(b"x" * 512, 0),
            lambda: disk.write_zeroes(0, 512),
            lambda: disk.write_extents(np.array([[0, 512]]), bytes(512)),
        ):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(FormatError):
            disk.read_into(bytearray(512), MIB)
        assert disk.data_write_guid == world.ids[0]
        assert disk.info().type == "point"
    with pytest.raises(NoSuchPoint, match="no disk 1"):
        open_point(world.home, "latest", disks=[1])
