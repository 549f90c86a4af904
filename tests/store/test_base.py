"""A first copy that was made while the VM wrote: it is no point until the next logs were applied."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from hvreplica.cli.main import cli
from hvreplica.errors import NoSuchPoint
from hvreplica.store import AlreadyHave, Store
from tests.store.world import (
    NIL,
    Primary,
    guid,
    ram_folder,
    read_replica,
    send_disks,
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
def primary(seed: int) -> Primary:
    made = Primary(FakeClock(seed=1), [small_disk(0, 2), small_disk(1, 2)])
    made.scribble(random.Random(seed), 9)
    return made


def copy_while_writing(primary: Primary, store: Store) -> VmReplica:
    """Send the disks one after the other, with the VM writing in between; the writes are for the next cut."""
    replica = primary.claim(store)
    sink = primary.begin_initial(replica, consistent=False)
    assert not isinstance(sink, AlreadyHave)
    before = primary.image()
    primary.changes = {index: [] for index in primary.disks}
    for index in primary.disks:
        primary.write(index, 4096, b"while it is copied".ljust(512))
    send_disks(sink, {0: before[0], 1: primary.image()[1]})
    sink.commit()
    primary.last_point, primary.last_log = guid(100), {0: NIL, 1: NIL}
    return replica


def test_base_is_neither_listed_nor_exported(store: Store, primary: Primary, tmp_path: Path) -> None:
    replica = copy_while_writing(primary, store)
    assert (replica.phase, replica.last_point) == ("ready", guid(100))
    assert store.points("web01") == []
    assert (store.status().vms[0].phase, store.status().vms[0].points) == ("waiting", [])
    for point in (None, guid(100)):
        with pytest.raises(NoSuchPoint, match="waits for the first cut") as caught:
            store.export_point("web01", point, 0, tmp_path / "out.raw", "raw")
        assert "next cycle" in (caught.value.hint or "")


def test_next_logs_make_a_point(
    store: Store, files: FaultFiles, root: Path, primary: Primary, tmp_path: Path
) -> None:
    replica = copy_while_writing(primary, store)
    cycle = primary.cut()
    primary.ship(replica, cycle)
    assert [point.state for point in store.points("web01")] == ["spooled"]
    assert store.status().vms[0].phase == "waiting"
    with pytest.raises(NoSuchPoint, match="first cut"):
        store.export_point("web01", None, 0, tmp_path / "out.raw", "raw")
    assert replica.apply() == cycle.point_id
    points = store.points("web01")
    assert [(point.id, point.state, point.consistency) for point in points] == [
        (str(cycle.point_id), "complete", "crash")
    ]
    assert store.status().vms[0].phase == "ready"
    assert read_replica(files, root, primary) == primary.image()


def test_lost_answer_is_given_again(store: Store, primary: Primary) -> None:
    copy_while_writing(primary, store)
    answer = primary.begin_initial(primary.claim(store), consistent=False)
    assert answer == AlreadyHave(guid(100), "base")


def test_restart_knows_a_base(store: Store, files: FaultFiles, root: Path, primary: Primary) -> None:
    copy_while_writing(primary, store)
    store.close()
    with Store.create_or_open(files, root, clock=FakeClock(seed=10)) as again:
        assert [(vm.points, vm.error) for vm in again.recover()] == [([], None)]
        assert again.points("web01") == []
        replica = primary.claim(again)
        primary.ship(replica, primary.cut())
        replica.apply()
        assert len(again.points("web01")) == 1


def test_base_over_an_older_point_leaves_it_listed(store: Store, primary: Primary) -> None:
    """A whole copy anew, made while the VM writes: from its end on the old disks are what keeps the point."""
    primary.replicate(store, 90)
    assert [point.state for point in store.points("web01")] == ["complete"]
    copy_while_writing(primary, store)
    assert [point.id for point in store.points("web01")] == [str(guid(90))], "kept by the old disks"
    assert store.status().vms[0].phase == "waiting"


def test_continued_copy_is_what_was_said_last(store: Store, primary: Primary) -> None:
    """A copy that began while the VM wrote, and was held against its disk again, shows one instant."""
    sink = primary.begin_initial(primary.claim(store), consistent=False)
    assert not isinstance(sink, AlreadyHave)
    sink = primary.begin_initial(primary.claim(store), consistent=True)
    assert not isinstance(sink, AlreadyHave)
    assert sink.continued
    send_disks(sink, primary.image())
    sink.commit()
    assert [point.state for point in store.points("web01")] == ["complete"]


def test_fingerprints_of_a_base_are_of_what_is_there(store: Store, primary: Primary) -> None:
    replica = copy_while_writing(primary, store)
    assert any(replica.fingerprints(1, 0, 16, 4096))


def test_command_says_what_a_base_waits_for(
    primary: Primary, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.create_or_open(FaultFiles(root), root, clock=FakeClock(seed=3)) as store:
        copy_while_writing(primary, store)
    with pytest.raises(SystemExit):
        cli.main(["store", "status", "--store", str(root)])
    assert "waits for the first cut" in capsys.readouterr().out
