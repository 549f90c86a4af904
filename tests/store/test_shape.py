"""Disks that grow, shrink, come and go while they are replicated: each point has the disks of its instant."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.errors import (
    ChainBroken,
    FieldOutOfRange,
    FormatError,
    InvalidTransition,
    NoSuchPoint,
    ReplicaDiverged,
    StoreError,
)
from hvreplica.store import AlreadyHave, InitialSink, Store
from tests.store.world import (
    MIB,
    NIL,
    Cycle,
    Primary,
    data_extents,
    guid,
    ram_folder,
    read_disk,
    read_replica,
    replica_path,
    send_disks,
    send_logs,
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
def primary(seed: int, store: Store) -> Primary:
    """Return a primary with two disks that the replica has."""
    made = Primary(FakeClock(seed=1), [small_disk(0, 2), small_disk(1, 2)])
    made.scribble(random.Random(seed), 9)
    made.replicate(store)
    return made


def cycle(primary: Primary, store: Store, **options: Any) -> VmReplica:
    """Run a whole cycle."""
    replica = primary.claim(store)
    primary.ship(replica, primary.cut(**options))
    replica.apply()
    return replica


def join(primary: Primary, replica: VmReplica, index: int, number: int = 200) -> InitialSink | AlreadyHave:
    return primary.begin_initial(replica, number, joining=[index], consistent=False)


def joined(primary: Primary, replica: VmReplica, index: int, number: int = 200) -> None:
    """Send a disk that was added; what is written from now on comes with logs."""
    sink = join(primary, replica, index, number)
    assert isinstance(sink, InitialSink)
    send_disks(sink, {index: primary.image()[index]})
    sink.commit()
    primary.changes[index] = []


def disks_of(store: Store) -> list[tuple[int, int, str]]:
    return [(disk.index, disk.virtual_bytes, disk.state) for disk in store.status().vms[0].disks]


def test_grown_disk_grows_with_the_first_logs_after_it(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    before = read_replica(files, root, primary)
    primary.resize(0, 5 * MIB)
    primary.write(0, 4 * MIB, b"new" * 512)
    replica = primary.claim(store)
    primary.ship(replica, primary.cut())
    assert read_replica(files, root, primary) == before  # the point before is as it was
    replica.apply()
    assert read_replica(files, root, primary) == primary.image()
    assert disks_of(store) == [(0, 5 * MIB, "protected"), (1, 2 * MIB, "protected")]


def test_disk_that_only_grew_grows_at_the_replica(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    """The log of a cycle may be empty, and of another disk than the one that grew."""
    primary.resize(1, 3 * MIB)
    cycle(primary, store)
    assert read_replica(files, root, primary) == primary.image()


def test_shrunk_disk_loses_what_is_cut_off(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    primary.write(0, 2 * MIB - 512, b"x" * 512)
    cycle(primary, store)
    primary.resize(0, MIB + 512)
    cycle(primary, store)
    assert read_replica(files, root, primary) == primary.image()
    primary.resize(0, 2 * MIB)
    cycle(primary, store)
    assert read_replica(files, root, primary) == primary.image()  # nothing of it comes back


def test_logs_that_wait_are_applied_to_the_size_they_were_cut_at(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    replica = primary.claim(store)
    primary.write(0, 2 * MIB - 512, b"a" * 512)
    cuts = [primary.cut()]
    primary.resize(0, MIB)
    cuts.append(primary.cut())
    primary.resize(0, 3 * MIB)
    primary.write(0, 3 * MIB - 512, b"b" * 512)
    cuts.append(primary.cut())
    replica = primary.claim(store)  # announces the newest size
    for each in cuts:
        primary.ship(replica, each)
    replica.apply()
    assert read_replica(files, root, primary) == primary.image()


def test_log_beyond_the_size_of_its_point_is_refused(store: Store, primary: Primary) -> None:
    primary.write(0, 2 * MIB - 512, b"a" * 512)
    cut = primary.cut()
    replica = primary.claim(store)
    sink = replica.begin_logs(
        cut.transfer_id,
        point_id=cut.point_id,
        previous_point_id=cut.previous_point_id,
        instant_s=1.0,
        logs=cut.logs,
        disks={0: MIB, 1: 2 * MIB},
    )
    assert not isinstance(sink, AlreadyHave)
    send_logs(sink, cut)
    with pytest.raises(FormatError):
        sink.commit()


@pytest.mark.parametrize(
    ("disks", "error"),
    [
        ({0: 2 * MIB, 1: 2 * MIB, 2: MIB}, ReplicaDiverged),
        ({0: 100}, FieldOutOfRange),
        ({64: MIB}, FieldOutOfRange),
        ({1: 2 * MIB}, FieldOutOfRange),  # without the disk that a log is for
    ],
)
def test_impossible_disks_of_a_point_are_refused(
    store: Store, primary: Primary, disks: dict[int, int], error: type[Exception]
) -> None:
    primary.write(0, 0, b"a" * 512)
    cut = primary.cut()
    with pytest.raises(error):
        primary.claim(store).begin_logs(
            cut.transfer_id,
            point_id=cut.point_id,
            previous_point_id=cut.previous_point_id,
            instant_s=1.0,
            logs=cut.logs,
            disks=disks,
        )


def test_disk_that_grows_while_it_is_first_sent_goes_on(store: Store, files: FaultFiles, root: Path) -> None:
    other = Primary(FakeClock(seed=2), [small_disk(0, 2)], vm="db01", relationship_id=guid(2))
    other.write(0, 0, b"d" * 512)
    sink = other.begin_initial(other.claim(store))
    assert isinstance(sink, InitialSink)
    sink.write(0, 0, MIB, *data_extents(other.image()[0][:MIB]))
    sink.flush()
    other.resize(0, 3 * MIB)
    other.write(0, 3 * MIB - 512, b"e" * 512)
    sink = other.begin_initial(other.claim(store))
    assert isinstance(sink, InitialSink)
    assert (sink.continued, sink.position(0), sink.targets) == (True, MIB, {0: 3 * MIB})
    send_disks(sink, other.image())
    sink.commit()
    assert read_replica(files, root, other) == other.image()


def test_added_disk_arrives_beside_the_logs_of_the_others(
    store: Store, files: FaultFiles, root: Path, primary: Primary, tmp_path: Path
) -> None:
    primary.add(small_disk(2, 3))
    primary.scribble(random.Random(4), 12)
    replica = primary.claim(store)
    assert disks_of(store)[2] == (2, 3 * MIB, "arriving")
    sink = join(primary, replica, 2)
    assert isinstance(sink, InitialSink)
    assert sink.targets == {2: 3 * MIB}
    content = primary.image()[2]
    send_part(sink, content, MIB)
    sink.flush()
    # A cycle of the others comes between, and the copy goes on where it was.
    primary.ship(replica, primary.cut(without=(2,)))
    replica.apply()
    with pytest.raises(NoSuchPoint, match="does not have disk 2") as caught:
        store.export_point("web01", None, 2, tmp_path / "out.raw", "raw")
    assert "next one" in (caught.value.hint or "")
    sink = join(primary, replica, 2)
    assert isinstance(sink, InitialSink)
    assert (sink.continued, sink.position(2)) == (True, MIB)
    send_disks(sink, {2: content})
    sink.commit()
    assert replica.last_point == primary.last_point  # it is no point of its own
    assert disks_of(store)[2] == (2, 3 * MIB, "waiting")
    assert replica.phase == "ready"
    assert join(primary, replica, 2) == AlreadyHave(guid(200), "base")
    primary.changes[2] = []
    primary.write(2, 512, b"later" * 512)
    cycle(primary, store)
    assert read_replica(files, root, primary) == primary.image()
    assert [state for *_, state in disks_of(store)] == ["protected"] * 3


def send_part(sink: InitialSink, content: bytes, length: int) -> None:
    """Send the first bytes of disk 2."""
    sink.write(2, 0, length, *data_extents(content[:length]))


def test_added_disk_of_an_older_cut_is_not_part_of_its_point(store: Store, primary: Primary) -> None:
    """Cuts that wait from before the disk came are shipped behind it."""
    primary.scribble(random.Random(5), 3)
    waiting = primary.cut()
    primary.add(small_disk(2, 2))
    replica = primary.claim(store)
    joined(primary, replica, 2)
    primary.ship(replica, waiting)
    replica.apply()
    assert disks_of(store)[2] == (2, 2 * MIB, "waiting")
    cycle(primary, store)
    assert disks_of(store)[2] == (2, 2 * MIB, "protected")


def test_disk_of_the_newest_point_cannot_join(store: Store, primary: Primary) -> None:
    with pytest.raises(InvalidTransition, match="belongs to its newest point"):
        join(primary, primary.claim(store), 1)


def test_disk_that_was_not_announced_cannot_join(store: Store, primary: Primary) -> None:
    with pytest.raises(FieldOutOfRange, match="did not announce"):
        join(primary, primary.claim(store), 7)


def test_disk_cannot_join_before_there_is_a_point(store: Store) -> None:
    other = Primary(FakeClock(seed=2), [small_disk(0, 2)], vm="db01", relationship_id=guid(2))
    with pytest.raises(InvalidTransition, match="no complete replica"):
        join(other, other.claim(store), 0)


def test_whole_copy_drops_a_disk_on_its_way(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    primary.add(small_disk(2, 2))
    primary.scribble(random.Random(6), 9)
    join(primary, primary.claim(store), 2)
    primary.replicate(store, 300)
    assert read_replica(files, root, primary) == primary.image()
    assert store.status().vms[0].joining is None
    assert [path.name for path in files.files() if path.suffix == ".partial"] == []


def test_removed_disk_leaves_with_the_next_point_and_its_file_stays(
    store: Store, files: FaultFiles, root: Path, primary: Primary, tmp_path: Path
) -> None:
    last = primary.image()[1]
    primary.remove(1)
    replica = primary.claim(store)
    assert disks_of(store)[1] == (1, 2 * MIB, "protected")
    files.make_directory(tmp_path)
    store.export_point("web01", None, 1, tmp_path / "then.raw", "raw")
    primary.write(0, 0, b"z" * 512)
    primary.ship(replica, primary.cut())
    replica.apply()
    assert disks_of(store)[1] == (1, 2 * MIB, "removed")
    assert read_disk(files, replica_path(root, disk_index=1), primary.clock) == last
    with pytest.raises(NoSuchPoint, match="does not have disk 1") as caught:
        store.export_point("web01", None, 1, tmp_path / "now.raw", "raw")
    assert "removed" in (caught.value.hint or "")
    files.unlink(replica_path(root, disk_index=1))
    assert store.status().vms[0].damage == []  # whoever needs the room may take it


def test_missing_disk_is_refused_unless_it_is_said_to_be_removed(store: Store, primary: Primary) -> None:
    primary.specs = primary.specs[:1]
    with pytest.raises(ReplicaDiverged) as caught:
        primary.claim(store)
    assert "--remove-disk" in (caught.value.hint or "")
    assert caught.value.field == "disk 1"
    assert caught.value.removed_disk is None


def test_index_of_a_removed_disk_is_never_used_again(store: Store, primary: Primary) -> None:
    primary.remove(1)
    cycle(primary, store)
    primary.add(small_disk(1, 2))
    primary.removed = []
    with pytest.raises(ReplicaDiverged, match="it was removed") as caught:
        primary.claim(store)
    assert caught.value.removed_disk == 1


def test_added_disk_that_goes_before_it_was_in_a_point_is_removed_at_once(
    store: Store, primary: Primary
) -> None:
    primary.add(small_disk(2, 2))
    joined(primary, primary.claim(store), 2)
    primary.remove(2)
    primary.claim(store)
    assert disks_of(store)[2] == (2, 2 * MIB, "removed")
    cycle(primary, store)


def test_other_disks_in_each_others_place_are_known_by_identity(store: Store) -> None:
    specs = [dataclasses.replace(small_disk(index, 2), virtual_disk_id=guid(70 + index)) for index in (0, 1)]
    primary = Primary(FakeClock(seed=1), specs)
    primary.replicate(store)
    swapped = [guid(71), guid(70)]
    primary.specs = [
        dataclasses.replace(spec, virtual_disk_id=disk_id)
        for spec, disk_id in zip(specs, swapped, strict=True)
    ]
    with pytest.raises(ReplicaDiverged, match="VirtualDiskId"):
        primary.claim(store)
    primary.specs = [dataclasses.replace(spec, virtual_disk_id=guid(90)) for spec in specs[:1]] + specs[1:]
    primary.claim(store)  # a disk that was put in the place of another: its content will say


def test_sector_size_of_a_disk_must_stay(store: Store, primary: Primary) -> None:
    primary.specs = [dataclasses.replace(primary.specs[0], logical_sector_bytes=4096), primary.specs[1]]
    with pytest.raises(ReplicaDiverged):
        primary.claim(store)


def test_logs_that_name_no_disks_are_for_all_that_were_announced(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    """As a primary sends them that knows nothing of sizes."""
    primary.write(0, 0, b"q" * 512)
    cut: Cycle = primary.cut()
    replica = primary.claim(store)
    sink = replica.begin_logs(
        cut.transfer_id,
        point_id=cut.point_id,
        previous_point_id=cut.previous_point_id,
        instant_s=1.0,
        logs=cut.logs,
    )
    assert not isinstance(sink, AlreadyHave)
    send_logs(sink, cut)
    sink.commit()
    replica.apply()
    assert read_replica(files, root, primary) == primary.image()
    assert disks_of(store) == [(0, 2 * MIB, "protected"), (1, 2 * MIB, "protected")]


def test_first_log_of_a_joined_disk_may_follow_any(store: Store, primary: Primary) -> None:
    primary.add(small_disk(2, 2))
    joined(primary, primary.claim(store), 2)
    primary.last_log = {0: NIL, 1: NIL, 2: guid(5)}
    primary.write(2, 0, b"f" * 512)
    cycle(primary, store)
    primary.last_log[2] = guid(6)
    primary.write(2, 0, b"g" * 512)
    with pytest.raises(ChainBroken):
        cycle(primary, store)


def test_size_of_an_announced_transfer_must_stay(store: Store, primary: Primary) -> None:
    primary.write(0, 0, b"h" * 512)
    cut = primary.cut()
    replica = primary.claim(store)
    primary.begin_logs(replica, cut)
    cut.disks[1] = bytes(3 * MIB)
    with pytest.raises(StoreError, match="other contents"):
        primary.begin_logs(replica, cut)
