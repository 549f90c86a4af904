"""Applying: repeated after a cut, refused where the disk or the log is not what it was, blocked by readers."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.disk import open_disk
from hvreplica.errors import (
    ChainBroken,
    FormatError,
    InvalidTransition,
    Locked,
    ReplicaDiverged,
    StoreError,
    StoreFull,
)
from hvreplica.store import DiskSpec, LogSpec, Store
from hvreplica.store import apply as module
from tests.store.world import (
    INSTANT_S,
    MIB,
    NIL,
    NO_OLDER,
    NOTHING,
    Cycle,
    Primary,
    guid,
    ram_folder,
    read_replica,
    replica_path,
    small_disk,
)
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store import VmReplica


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def files(root: Path) -> FaultFiles:
    return FaultFiles(root)


@pytest.fixture
def store(files: FaultFiles, root: Path) -> Iterator[Store]:
    with Store.create_or_open(files, root, clock=FakeClock(seed=9)) as opened:
        yield opened


@pytest.fixture
def primary() -> Primary:
    made = Primary(FakeClock(seed=1), [small_disk(0, 2), small_disk(1, 2)], policy=NO_OLDER)
    made.scribble(random.Random(3), 12)
    return made


@pytest.fixture
def replica(store: Store, primary: Primary) -> VmReplica:
    return primary.replicate(store)


def next_cycle(primary: Primary, seed: int) -> Cycle:
    primary.scribble(random.Random(seed), 10)
    return primary.cut()


def states(store: Store) -> list[str]:
    return [point.state for point in store.points("web01")]


def test_several_points_wait_and_are_applied_in_order(
    store: Store, files: FaultFiles, root: Path, primary: Primary, replica: VmReplica
) -> None:
    """A reader elsewhere holds the disks: logs go on being acknowledged."""
    before = primary.image()
    reader = files.lock(root / "web01" / "lock", shared=True)
    for seed in range(3):
        primary.ship(replica, next_cycle(primary, seed))
        with pytest.raises(Locked):
            replica.apply()
    assert states(store) == ["complete", "spooled", "spooled", "spooled"]
    assert store.status().vms[0].spool_bytes > 0
    assert read_replica(files, root, primary) == before
    reader.release()
    assert replica.apply() == primary.last_point
    assert states(store) == ["complete"]
    assert read_replica(files, root, primary) == primary.image()


def test_apply_without_a_replica_is_refused(store: Store, primary: Primary) -> None:
    with pytest.raises(InvalidTransition):
        primary.claim(store).apply()


def test_logs_before_the_initial_replication_are_refused(store: Store, primary: Primary) -> None:
    primary.last_point = guid(100)
    cycle = next_cycle(primary, 1)
    with pytest.raises(InvalidTransition, match="no complete replica"):
        primary.begin_logs(primary.claim(store), cycle)


def test_chain_of_points_is_enforced(primary: Primary, replica: VmReplica) -> None:
    first, second = next_cycle(primary, 1), next_cycle(primary, 2)
    with pytest.raises(ChainBroken) as caught:
        primary.begin_logs(replica, second)
    assert (caught.value.expected, caught.value.actual) == (guid(100), first.point_id)
    primary.ship(replica, first)
    primary.ship(replica, second)
    replica.apply()
    with pytest.raises(ChainBroken, match="long ago"):
        primary.begin_logs(replica, first)
    with pytest.raises(ChainBroken, match="long ago"):
        replica.begin_initial(guid(7), point_id=guid(100), instant_s=INSTANT_S)


def test_chain_of_logs_is_enforced(primary: Primary, replica: VmReplica) -> None:
    primary.write(0, 0, b"a" * 512)
    first = primary.cut()
    primary.ship(replica, first)
    primary.write(0, 0, b"b" * 512)
    second = primary.cut()

    def begin(log: LogSpec) -> object:
        return replica.begin_logs(
            primary.clock.guid(),
            point_id=guid(6),
            previous_point_id=first.point_id,
            instant_s=INSTANT_S,
            logs=[log],
        )

    size = second.logs[0].log_bytes
    with pytest.raises(ChainBroken) as caught:
        begin(LogSpec(0, guid(8), guid(9), size))
    assert caught.value.field == "previous_log_id"
    with pytest.raises(ChainBroken, match="waits"):
        begin(LogSpec(0, first.logs[0].log_id, first.logs[0].log_id, size))
    assert begin(LogSpec(0, guid(8), NIL, size))  # a chain may begin anew, for a takeover
    assert begin(
        LogSpec(1, guid(8), guid(77), size)
    )  # nothing is known of disk 1 since its initial replication
    primary.ship(replica, second)
    assert replica.apply() == second.point_id


@pytest.mark.parametrize("operation", ["write", "sync", "open", "unlink", "sync_directory", "read"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_failed_apply_is_repeated(
    store: Store,
    files: FaultFiles,
    root: Path,
    primary: Primary,
    replica: VmReplica,
    operation: str,
    code: int,
    at: int,
) -> None:
    primary.ship(replica, next_cycle(primary, 1))
    files.fail(operation, at=at, path="*/web01/*", error=code)
    try:
        replica.apply()
    except StoreFull:
        assert code == errno.ENOSPC
    except OSError as error:
        assert error.errno == code
    files.heal()
    if "complete" in states(store):
        listed = store.points("web01")[0].id
        assert listed in {str(guid(100)), str(primary.last_point)}
    assert replica.apply() == primary.last_point
    assert states(store) == ["complete"]
    assert read_replica(files, root, primary) == primary.image()


def test_point_that_is_not_kept_is_not_listed_while_the_disks_are_between(
    store: Store, files: FaultFiles, primary: Primary, replica: VmReplica
) -> None:
    primary.ship(replica, next_cycle(primary, 1))
    assert states(store) == ["complete", "spooled"]
    files.fail("sync", path="*.vhdx", error=errno.EIO)
    with pytest.raises(OSError):
        replica.apply()
    assert states(store) == ["applying"]
    replica.apply()
    assert states(store) == ["complete"]


def test_restart_applies_what_was_acknowledged(
    store: Store, files: FaultFiles, root: Path, primary: Primary, replica: VmReplica
) -> None:
    cycle = next_cycle(primary, 1)
    primary.ship(replica, cycle)
    store.close()
    with Store.create_or_open(files, root, clock=FakeClock(seed=10)) as again:
        found = again.recover()
        assert [(vm.name, vm.points, vm.error) for vm in found] == [("web01", [str(cycle.point_id)], None)]
        assert read_replica(files, root, primary) == primary.image()
        assert again.recover()[0].points == []


def test_log_that_rotted_in_the_spool_leaves_the_point_before(
    store: Store, files: FaultFiles, root: Path, primary: Primary, replica: VmReplica
) -> None:
    before = primary.image()
    cycle = next_cycle(primary, 1)
    primary.ship(replica, cycle)
    store.close()
    spooled = root / "web01" / "spool" / f"{cycle.logs[0].log_id}.hrl"
    file = files.open(spooled, writable=True)
    file.write(bytes([file.read(8200, 1)[0] ^ 1]), 8200)
    with Store.create_or_open(files, root, clock=FakeClock(seed=10)) as again:
        found = again.recover()
        assert str(spooled) in str(found[0].error)
        assert states(again) == ["complete", "spooled"]
        assert read_replica(files, root, primary) == before
        with pytest.raises(FormatError):
            primary.claim(again).apply()
        assert read_replica(files, root, primary) == before


def test_disk_that_somebody_wrote_to_is_refused(
    store: Store, files: FaultFiles, root: Path, primary: Primary, replica: VmReplica
) -> None:
    with open_disk(files, replica_path(root), writable=True, clock=FakeClock(seed=50)) as disk:
        disk.write(b"mine" * 128, 0)
    primary.write(0, MIB, b"a" * 512)
    primary.ship(replica, primary.cut())
    with pytest.raises(ReplicaDiverged, match="another program"):
        replica.apply()
    assert states(store)[-1] == "spooled"


@pytest.mark.parametrize("change", ["gone", "shorter", "longer"])
@pytest.mark.usefixtures("replica")
def test_damaged_files_are_named_and_other_vms_go_on(
    store: Store, files: FaultFiles, root: Path, primary: Primary, change: str
) -> None:
    other = Primary(FakeClock(seed=2), [small_disk(0, 1)], vm="web02", relationship_id=guid(2))
    other.replicate(store)
    store.close()
    path = replica_path(root)
    if change == "gone":
        files.unlink(path)
    else:
        file = files.open(path, writable=True)
        file.resize(file.size() + (-MIB if change == "shorter" else MIB))
    with Store.create_or_open(files, root, clock=FakeClock(seed=10)) as again:
        again.recover()
        damage = {vm.name: vm.damage for vm in again.status().vms}
        assert len(damage["web01"]) == 1
        assert str(path) in damage["web01"][0]
        assert damage["web02"] == []
        found = primary.claim(again)
        assert found.damage == damage["web01"]
        cycle = next_cycle(primary, 1)
        for call in (
            lambda: primary.begin_logs(found, cycle),
            lambda: found.fingerprints(0, 0, 1, 4096),
            lambda: again.export_point("web01", None, 0, root.parent / "out.raw", "raw"),
        ):
            with pytest.raises(StoreError) as caught:
                call()
            assert str(path) in str(caught.value)
            assert caught.value.hint
        other.write(0, 0, b"n" * 512)
        healthy = other.claim(again)
        other.ship(healthy, other.cut())
        healthy.apply()
        primary.replicate(again, 300)  # the way out: from the start again
        assert again.status().vms[0].damage == []
        assert read_replica(files, root, primary) == primary.image()


def test_lost_spool_file_is_named(
    files: FaultFiles, root: Path, primary: Primary, replica: VmReplica
) -> None:
    cycle = next_cycle(primary, 1)
    primary.ship(replica, cycle)
    spooled = root / "web01" / "spool" / f"{cycle.logs[0].log_id}.hrl"
    files.unlink(spooled)
    with pytest.raises(StoreError) as caught:
        replica.apply()
    assert f"{spooled} is missing" in str(caught.value)


def test_unknown_files_are_swept_and_known_ones_kept(
    store: Store, files: FaultFiles, root: Path, primary: Primary, replica: VmReplica
) -> None:
    waiting = next_cycle(primary, 1)
    primary.ship(replica, waiting)
    under_way = next_cycle(primary, 2)
    primary.begin_logs(replica, under_way)
    store.close()
    folder = root / "web01"
    strays = ["spool/1.hrl", "spool/2.hrl.partial", "disks/0.vhdx.partial", "disks/.0.vhdx.partial.1234.tmp"]
    strangers = ["spool/notes.txt", "disks/7.vhdx", "README"]
    for name in strays + strangers:
        files.load(folder / name, b"x")
    with Store.create_or_open(files, root, clock=FakeClock(seed=10)) as again:
        reader = files.lock(folder / "lock", shared=True)
        assert again.recover()[0].error  # nothing is swept while what was acknowledged cannot be applied
        reader.release()
        again.recover()
        kept = {str(path.relative_to(folder)) for path in files.files() if folder in path.parents}
        assert kept == {
            *strangers,
            "lock",
            "applied",
            "disks/0.vhdx",
            "disks/1.vhdx",
            *(f"spool/{log.log_id}.hrl.partial" for log in under_way.logs),
        }


def test_old_points_are_forgotten_in_the_end(
    store: Store, primary: Primary, replica: VmReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POINTS_KEPT", 3)
    for number in range(6):
        primary.write(0, 0, bytes([number + 1]) * 512)
        primary.ship(replica, primary.cut())
        replica.apply()
    assert len(store._parts.catalog.points(1, superseded=True)) == 3
    assert states(store) == ["complete"]


def test_huge_disk_costs_what_its_data_costs(store: Store) -> None:
    big = DiskSpec(0, 8 << 40, 512, 4096, 256 << 20)
    replica = store.claim("big", relationship_id=guid(1), generation=1, certificate="c", disks=[big])
    sink = replica.begin_initial(guid(1), point_id=guid(100), instant_s=INSTANT_S)
    data = b"d" * 4096
    sink.write(0, 0, 4 << 40, np.array([[3 << 40, 4096]]), data)
    sink.write(0, 4 << 40, 4 << 40, *NOTHING)
    sink.commit()
    assert replica.next_data(0, 0) <= 3 << 40
    assert replica.next_data(0, (3 << 40) + (256 << 20)) == 8 << 40
