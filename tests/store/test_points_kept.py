"""Older points stay exactly what they were while the disks move on, and while others of them go."""

from __future__ import annotations

import errno
import random
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from hvreplica.disk import open_disk
from hvreplica.errors import HvReplicaError, InvalidTransition, NoSuchPoint, PointInUse, StoreFull
from hvreplica.formats.hrl import FILE_TYPE_UNDO
from hvreplica.store import AlreadyHave, Store
from hvreplica.store.counter import Counter
from hvreplica.store.points_kept import chain, drop_point, part_path, spoiled_points
from hvreplica.store.policy import Policy, pack_policy
from hvreplica.store.undo import log_extents
from tests.store.history import put_catalog
from tests.store.world import MIB, NIL, Primary, guid, ram_folder, send_disks, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles
from tests.support.points import read_point

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store.home import VmHome

IS_DEEP = settings().max_examples > 1000
EVERY = Policy(recovery_point_every_s=0)
PERIOD = Policy(recovery_point_every_s=30)  # the first point has one of its own, all cycles share the next


class Life:
    """A primary, its store, and what each point must show."""

    def __init__(self, root: Path, policy: Policy = EVERY, disks: int = 2) -> None:
        self.root = root
        self.files = FaultFiles(root)
        self.clock = FakeClock(seed=3)
        self.rng = random.Random(3)
        self.primary = Primary(self.clock, [small_disk(index, 2) for index in range(disks)])
        self.store = Store.create_or_open(self.files, root, clock=self.clock)
        self.primary.scribble(self.rng, 8)
        self.images: dict[str, dict[int, bytes]] = {}
        self.replica = self.primary.replicate(self.store)
        self.images[str(guid(100))] = self.primary.image()
        self.set_policy(policy)

    @property
    def home(self) -> VmHome:
        return self.store._known("web01")

    def set_policy(self, policy: Policy) -> None:
        with self.home.catalog.transaction():
            self.home.catalog.set_policy(self.home.vm_id, pack_policy(policy))

    def cycle(self, writes: int = 6, *, apply: bool = True, **options: Any) -> str:
        """Let the guest write and ship it; return the point's id."""
        self.primary.scribble(self.rng, writes)
        cycle = self.primary.cut(**options)
        self.primary.ship(self.replica, cycle)
        if apply:
            self.replica.apply()
        self.images[str(cycle.point_id)] = cycle.disks
        return str(cycle.point_id)

    def again(self, number: int, **options: Any) -> str:
        """Send a whole copy again; return the point's id."""
        self.primary.scribble(self.rng, 6)
        image = self.primary.image()
        replica = self.primary.claim(self.store)
        sink = self.primary.begin_initial(replica, number, **options)
        assert not isinstance(sink, AlreadyHave)
        send_disks(sink, image)
        sink.commit()
        self.replica = replica
        self.primary.last_point = guid(number)
        self.primary.last_log = dict.fromkeys(self.primary.last_log, NIL)
        self.primary.changes = {index: [] for index in self.primary.changes}
        self.images[str(guid(number))] = image
        return str(guid(number))

    def parts(self, kind: str = "undo") -> list[Path]:
        """Return the files of the parts of one kind."""
        rows = self.home.catalog.undo_rows(self.home.vm_id)
        return [part_path(self.home, row) for row in rows if row.kind == kind]

    def restart(self, files: FaultFiles | None = None) -> list[str | None]:
        """End the process and start it again; return what recovery could not finish."""
        self.store.close()
        self.files = files or self.files
        self.store = Store.create_or_open(self.files, self.root, clock=self.clock)
        found = [vm.error for vm in self.store.recover()]
        self.replica = self.primary.claim(self.store)
        return found

    def listed(self) -> list[str]:
        return [point.id for point in self.store.points("web01") if point.state == "complete"]

    def check(self) -> None:
        """Compare every listed point with what the primary had, and the parts' rows with their files."""
        for point_id in self.listed():
            found = read_point(self.files, self.root, point_id, self.clock)
            assert found == self.images[point_id], point_id
        known = {part_path(self.home, part) for part in self.home.catalog.undo_rows(self.home.vm_id)}
        assert known == {path for path in self.files.files() if path.suffix in {".hru", ".vhdx"}} - {
            self.home.paths.disk(index) for index in range(64)
        }


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


def test_every_point_stays_as_it_was(root: Path) -> None:
    life = Life(root)
    made = [str(guid(100))] + [life.cycle() for _ in range(5)]
    assert life.listed() == made
    life.check()


def test_drop_of_any_point_leaves_the_others_exact() -> None:
    for gone in range(5):
        with ram_folder() as folder:
            life = Life(folder)
            made = [str(guid(100))] + [life.cycle() for _ in range(5)]
            drop_point(life.home, uuid.UUID(made[gone]))
            assert life.listed() == made[:gone] + made[gone + 1 :]
            life.check()
            life.cycle()
            life.check()


def test_drop_of_all_older_points_in_any_order_leaves_no_part(root: Path, seed: int) -> None:
    life = Life(root)
    made = [str(guid(100))] + [life.cycle() for _ in range(5)]
    older = made[:-1]
    random.Random(seed).shuffle(older)
    for point_id in older:
        drop_point(life.home, uuid.UUID(point_id))
        life.check()
    assert life.listed() == made[-1:]
    assert life.home.catalog.undo_rows(life.home.vm_id) == []


def test_point_between_two_of_a_period_goes_and_the_older_one_stays(root: Path) -> None:
    """Only what the older point's parts do not cover yet is written down again."""
    life = Life(root, PERIOD)
    first = str(guid(100))
    covered = 0
    for _ in range(4):
        last = life.cycle()
        assert life.listed() == [first, last]
        life.check()
        rows = life.home.catalog.undo_rows(life.home.vm_id, disk_index=0)
        assert {str(row.point_id) for row in rows} <= {first}
        covered = sum(row.covered_bytes for row in rows)
    assert covered <= 2 * MIB, "no byte of the first point is kept twice"
    before = len(life.parts())
    life.primary.write(0, *first_extent(life, 0))
    cycle = life.primary.cut()
    life.primary.ship(life.replica, cycle)
    life.replica.apply()
    assert len(life.parts()) == before, "all of it was covered"


def first_extent(life: Life, disk_index: int) -> tuple[int, bytes]:
    part = life.home.catalog.undo_rows(life.home.vm_id, disk_index=disk_index)[0]
    extents = log_extents(life.home, part_path(life.home, part), FILE_TYPE_UNDO)[0]
    return int(extents[0, 0]), b"x" * int(extents[0, 1])


def test_no_older_point_costs_nothing(root: Path) -> None:
    life = Life(root, Policy(recovery_points=0))
    last = [life.cycle() for _ in range(3)][-1]
    assert life.listed() == [last]
    assert life.files.names(life.home.paths.points) == []
    life.check()


def test_newest_point_foreign_point_and_point_in_use_do_not_go(root: Path) -> None:
    life = Life(root)
    newest = life.cycle()
    with pytest.raises(InvalidTransition, match="the replica itself"):
        drop_point(life.home, uuid.UUID(newest))
    with pytest.raises(NoSuchPoint, match="could go"):
        drop_point(life.home, guid(7))
    lock = life.files.lock(life.home.paths.use(guid(100)), shared=True)
    with pytest.raises(PointInUse):
        drop_point(life.home, guid(100))
    life.check()
    lock.release()
    drop_point(life.home, guid(100))
    with pytest.raises(NoSuchPoint):
        drop_point(life.home, guid(100))
    assert life.listed() == [newest]


def test_walk_of_a_point_begins_with_its_own_parts_and_ends_with_a_whole_disk(root: Path) -> None:
    life = Life(root, disks=1)
    made = [str(guid(100)), life.cycle(), life.cycle()]
    life.again(200)
    life.cycle()
    for place, point_id in enumerate(made):
        walk = chain(life.home, uuid.UUID(point_id), 0)
        assert [str(part.point_id) for part in walk] == [*made[place:2], made[2]]
        assert [part.kind for part in walk][-1] == "whole"
    assert [part.kind for part in chain(life.home, guid(200), 0)] == ["undo"]


@pytest.mark.parametrize("consistent", [True, False])
def test_whole_copy_anew_keeps_every_older_point(root: Path, *, consistent: bool) -> None:
    life = Life(root)
    made = [str(guid(100)), life.cycle(), life.cycle()]
    again = life.again(200, consistent=consistent)
    assert life.listed() == made + [again] * consistent
    life.check()
    assert len(life.parts("whole")) == 2
    made += [again] * consistent + [life.cycle(), life.cycle()]
    assert life.listed() == made
    life.check()
    life.again(300, consistent=False)
    life.again(301)  # over a base, which nobody can want back
    life.check()
    assert len(life.parts("whole")) == 4
    for point_id in life.listed()[-2::-1]:
        drop_point(life.home, uuid.UUID(point_id))
        life.check()
    assert life.parts("whole") == life.parts() == []


def test_whole_copy_anew_over_logs_that_wait_or_are_half_applied() -> None:
    for half in (False, True):
        with ram_folder() as folder:
            life = Life(folder)
            made = [str(guid(100)), life.cycle()]
            life.cycle(apply=False)
            if half:
                life.files.fail("sync", path="*.vhdx")
                with pytest.raises(OSError):
                    life.replica.apply()
                life.files.heal()
            again = life.again(200)
            assert life.listed() == [*made, again]
            life.check()
            life.cycle()
            life.check()


def test_whole_copy_anew_over_a_disk_that_is_gone_or_strange_damages_older_points() -> None:
    for change in ("gone", "strange"):
        with ram_folder() as folder:
            life = Life(folder)
            life.cycle()
            path = life.home.paths.disk(0)
            if change == "gone":
                life.files.unlink(path)
            else:
                with open_disk(life.files, path, writable=True, clock=FakeClock(seed=50)) as disk:
                    disk.write(b"mine" * 128, 0)
            again = life.again(200)
            points = life.store.points("web01")
            assert [point.state for point in points] == ["damaged", "damaged", "complete"]
            assert all("disk 0" in (point.damage or "") for point in points[:2])
            life.cycle()
            assert life.listed()[0] == again
            life.check()


def test_disks_that_grow_shrink_come_and_go_leave_older_points_as_they_were(root: Path) -> None:
    life = Life(root)
    primary = life.primary
    life.cycle()
    for size in (4 * MIB, MIB, 3 * MIB, 2 * MIB + 1536, 5 * MIB):
        primary.resize(0, size)
        life.replica = primary.claim(life.store)
        life.cycle(2)
        life.check()
        life.cycle(8)
        life.check()
    primary.add(small_disk(2, 1))
    primary.write(2, 4096, b"n" * 512)
    life.replica = primary.claim(life.store)
    sink = primary.begin_initial(life.replica, 300, joining=(2,))
    assert not isinstance(sink, AlreadyHave)
    send_disks(sink, {2: primary.image()[2]})
    sink.commit()
    life.cycle()
    life.cycle()
    life.check()
    primary.remove(1)
    life.replica = primary.claim(life.store)
    life.cycle()
    life.cycle()
    assert len(life.listed()) == 16
    life.check()
    life.rng.shuffle(older := life.listed()[:-1])
    for point_id in older:
        drop_point(life.home, uuid.UUID(point_id))
        life.check()
    assert life.parts() == []


@pytest.mark.parametrize("damage", ["gone", "header", "data"])
def test_damaged_part_spoils_older_points_and_never_newer_ones(root: Path, damage: str) -> None:
    life = Life(root, disks=1)
    made = [str(guid(100))] + [life.cycle() for _ in range(3)]
    part = chain(life.home, uuid.UUID(made[1]), 0)[0]
    assert [str(point.id) for point in spoiled_points(life.home, part)] == made[:2]
    path = part_path(life.home, part)
    if damage == "gone":
        life.files.unlink(path)
    else:
        file = life.files.open(path, writable=True)
        at = 60 if damage == "header" else 8192 + 100
        file.write(bytes([file.read(at, 1)[0] ^ 1]), at)
        file.close()
    for point_id in made[:2]:
        with pytest.raises((OSError, HvReplicaError)):
            read_point(life.files, life.root, point_id, life.clock)
    made.append(life.cycle())
    for point_id in made[2:]:
        assert read_point(life.files, life.root, point_id, life.clock) == life.images[point_id]


def test_damaged_part_of_the_point_that_keeps_is_told_and_replication_goes_on(root: Path) -> None:
    life = Life(root, PERIOD, disks=1)
    life.cycle()
    life.files.unlink(life.parts()[0])
    last = life.cycle()
    points = life.store.points("web01")
    assert [(point.id, point.state) for point in points] == [(str(guid(100)), "damaged"), (last, "complete")]
    assert "undo part" in (points[0].damage or "")
    assert life.restart() == [None]
    drop_point(life.home, guid(100))
    assert life.parts() == []


@pytest.mark.parametrize("operation", ["write", "sync", "open", "unlink", "sync_directory", "rename", "read"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_apply_that_fails_anywhere_leaves_every_point_and_is_repeated(
    root: Path, operation: str, code: int
) -> None:
    # Every other place with each of both, all of them with both in the deep profile.
    first, step = (1, 1) if IS_DEEP else (1 + (code == errno.EIO), 2)
    for at in range(first, 9, step):
        life = Life(root)
        life.cycle()
        newest = life.cycle(apply=False)
        fault = life.files.fail(operation, at=at, path="*/web01/*", error=code)
        try:
            life.replica.apply()
        except StoreFull:
            assert code == errno.ENOSPC
        except OSError as error:
            assert error.errno == code
        life.files.heal()
        for point_id in life.listed():
            assert read_point(life.files, root, point_id, life.clock) == life.images[point_id]
        assert life.restart() == [None]
        assert life.listed() == [*life.images][: len(life.images)]
        assert life.listed()[-1] == newest
        life.check()
        life.store.close()
        put_catalog(root, None)
        if not fault.hits:
            break


def test_part_of_a_full_store_is_not_left_behind(root: Path) -> None:
    life = Life(root)
    life.cycle(apply=False)
    life.files.fail("write", path="*.hru.partial", error=errno.ENOSPC)
    with pytest.raises(StoreFull, match="room"):
        life.replica.apply()
    assert life.files.names(life.home.paths.points) == []
    assert [point.state for point in life.store.points("web01")] == ["complete", "spooled"]
    life.files.heal()
    life.replica.apply()
    life.check()


def test_start_removes_parts_that_nothing_speaks_of(root: Path) -> None:
    life = Life(root)
    life.cycle()
    known = life.files.names(life.home.paths.points)
    for name in ("1.hru", "2.hru.partial", "3.vhdx", "4.use"):
        life.files.load(life.home.paths.points / name, b"x")
    assert life.restart() == [None]
    assert life.files.names(life.home.paths.points) == known


def test_counter_moves_with_each_change_of_the_disks_and_before_it(root: Path) -> None:
    life = Life(root)
    with Counter(life.files, life.home.paths.counter) as counter:
        seen = [counter.value()]
        values: list[int] = []

        def look(operation: str, path: Path) -> None:
            if operation == "write" and path == life.home.paths.disk(0):
                life.files.hook = None
                values.append(counter.value())
                life.files.hook = look

        life.files.hook = look
        life.cycle()
        seen.append(counter.value())
        life.files.hook = None
        life.again(200)
        seen.append(counter.value())
    assert seen == [seen[0], seen[0] + 1, seen[0] + 2]
    assert set(values) == {seen[1]}, "no byte of a disk changed before"


def test_damaged_point_goes_as_any_other(root: Path) -> None:
    life = Life(root)
    for _ in range(3):
        life.cycle()
    with life.home.catalog.transaction():
        life.home.catalog.damage_point(life.home.vm_id, uuid.UUID(life.listed()[1]), "rotten")
    gone = next(point.id for point in life.store.points("web01") if point.state == "damaged")
    drop_point(life.home, uuid.UUID(gone))
    life.check()
    assert len(life.listed()) == 3


def test_zeros_take_no_room_in_a_part(root: Path) -> None:
    life = Life(root, disks=1)
    life.primary.write(
        0, 0, b"new" * (MIB // 3) + b"n"
    )  # over a disk that holds zeros there, but for scribbles
    life.primary.scribble(life.rng, 2)
    cycle = life.primary.cut()
    life.images[str(cycle.point_id)] = cycle.disks
    life.primary.ship(life.replica, cycle)
    life.replica.apply()
    life.check()
    file = life.files.open(life.parts()[0])
    stored = sum(length for _, length in file.data_extents(0, file.size()))
    assert file.size() > MIB
    assert stored < MIB // 2


def test_file_system_without_second_names_keeps_whole_disks_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FaultFiles, "link", lambda *_: False)
    life = Life(root)
    made = [str(guid(100)), life.cycle(), life.again(200), life.cycle()]
    assert life.listed() == made
    assert len(life.parts("whole")) == 2
    life.check()


def test_parts_behind_a_whole_disk_are_not_handed_on(root: Path) -> None:
    life = Life(root, disks=1)
    life.cycle()
    again = life.again(200)
    life.cycle()
    older = life.parts()
    assert len(older) == 2
    drop_point(life.home, uuid.UUID(again))
    assert life.parts() == older[:1] or life.parts() == older[1:]
    assert [part.kind for part in chain(life.home, guid(100), 0)] == ["undo", "whole"]
    life.check()
