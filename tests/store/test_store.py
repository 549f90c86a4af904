"""Who may write a VM, and what a store's folder may be: claims, fencing, takeover, hostile announcements."""

from __future__ import annotations

import dataclasses
import random
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hvreplica.errors import (
    Fenced,
    FieldOutOfRange,
    HvReplicaError,
    InvalidTransition,
    Locked,
    NoSuchPoint,
    ReplicaDiverged,
    StoreError,
)
from hvreplica.files import OS_FILES
from hvreplica.store import DiskSpec, Store
from tests.store.world import (
    EVERY,
    NOTHING,
    Primary,
    guid,
    ram_folder,
    read_replica,
    send_disks,
    send_logs,
    small_disk,
)
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.store import VmReplica

GIB = 1 << 30


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def files(root: Path) -> FaultFiles:
    return FaultFiles(root)


@pytest.fixture
def store(files: FaultFiles, root: Path, clock: FakeClock) -> Iterator[Store]:
    with Store.create_or_open(files, root, clock=clock) as opened:
        yield opened


def claim(store: Store, vm: str = "web01", **changes: Any) -> VmReplica:
    known = {status.name: status.owners[-1].generation for status in store.status().vms}
    values: dict[str, Any] = {
        "relationship_id": guid(1),
        "generation": known.get(vm, 4) + 1,
        "certificate": "sha256:aa",
        "disks": [small_disk()],
    }
    return store.claim(vm, **{**values, **changes})


def owner_of(store: Store, vm: str = "web01") -> tuple[str, int, str]:
    owners = {status.name: status.owners[-1] for status in store.status().vms}
    return owners[vm].relationship_id, owners[vm].generation, owners[vm].certificate


def test_first_claim_makes_the_vm_and_lasts(
    store: Store, files: FaultFiles, root: Path, clock: FakeClock
) -> None:
    replica = claim(store)
    assert (replica.phase, replica.last_point, replica.transfer) == ("empty", None, None)
    assert [row.spec for row in replica.disks] == [small_disk()]
    store.close()
    with Store.create_or_open(files, root, clock=clock) as again:
        assert owner_of(again) == (str(guid(1)), 5, "sha256:aa")
        with pytest.raises(Fenced):
            claim(again, generation=4)


@pytest.mark.parametrize(
    ("relationship", "generation", "accepted"),
    [(1, 4, False), (1, 5, False), (1, 6, True), (2, 4, False), (2, 5, False), (2, 6, True)],
)
def test_fencing_rule(store: Store, relationship: int, generation: int, *, accepted: bool) -> None:
    first = claim(store)
    if accepted:
        second = claim(
            store, relationship_id=guid(relationship), generation=generation, certificate="sha256:bb"
        )
        assert second.phase == "empty"
        assert owner_of(store) == (str(guid(relationship)), generation, "sha256:bb")
        with pytest.raises(Fenced):
            first.begin_initial(guid(9), point_id=guid(10), instant_s=0.0)
        return
    with pytest.raises(Fenced) as caught:
        claim(store, relationship_id=guid(relationship), generation=generation, certificate="sha256:bb")
    assert caught.value.generation == 5
    assert owner_of(store) == (str(guid(1)), 5, "sha256:aa")
    assert first.begin_initial(guid(9), point_id=guid(10), instant_s=0.0)  # it was not disturbed


def test_fenced_error_names_the_owner(store: Store) -> None:
    claim(store)
    with pytest.raises(Fenced) as caught:
        claim(store, relationship_id=guid(2), generation=5)
    text = str(caught.value)
    assert str(guid(1)) in text
    assert "sha256:aa" in text
    assert "above 5" in text


def test_renewed_certificate_is_accepted_and_recorded(store: Store) -> None:
    claim(store)
    claim(store, certificate="sha256:bb")
    assert [owner.certificate for owner in store.status().vms[0].owners] == ["sha256:aa", "sha256:bb"]


def test_takeover_keeps_the_replica_and_its_history(store: Store, files: FaultFiles, root: Path) -> None:
    primary = Primary(FakeClock(seed=1), [small_disk()])
    primary.write(0, 4096, b"x" * 4096)
    primary.replicate(store)
    heir = dataclasses.replace(primary, relationship_id=guid(2), generation=2)
    replica = heir.claim(store)
    assert (replica.phase, replica.last_point) == ("ready", guid(100))
    with pytest.raises(Fenced):
        primary.claim(store)
    heir.write(0, 0, b"y" * 512)
    heir.ship(replica, heir.cut())
    replica.apply()
    assert read_replica(files, root, heir) == heir.image()
    assert [owner.relationship_id for owner in store.status().vms[0].owners] == [str(guid(1)), str(guid(2))]


def test_newer_claim_ends_every_call_of_the_older_session(store: Store) -> None:
    primary = Primary(FakeClock(seed=1), [small_disk()])
    old = primary.claim(store)
    sink = primary.begin_initial(old)
    send_disks(sink, primary.image())
    new = primary.claim(store)
    for call in (
        lambda: sink.write(0, 0, 512, *NOTHING),
        sink.flush,
        sink.commit,
        lambda: sink.resume_from(0, 0),
        lambda: primary.begin_initial(old),
        lambda: old.fingerprints(0, 0, 1, 4096),
        old.apply,
    ):
        with pytest.raises(Fenced):
            call()
    assert new.transfer == guid(100)


def claim_elsewhere(store: Store) -> None:
    """Let a newer session own the VM as far as the catalog knows, as a second process would."""
    catalog = store._parts.catalog
    with catalog.transaction():
        row = catalog.vm("web01")
        assert row is not None
        newer = dataclasses.replace(row.owner, generation=row.owner.generation + 1)
        catalog.set_owner(row.id, newer, 1.0)


@pytest.mark.parametrize("flushed", [False, True])
def test_fenced_session_cannot_commit_disks_through_the_catalog_either(
    store: Store, *, flushed: bool
) -> None:
    primary = Primary(FakeClock(seed=1), [small_disk()])
    sink = primary.begin_initial(primary.claim(store))
    send_disks(sink, primary.image())
    if flushed:
        sink.flush()
    claim_elsewhere(store)
    with pytest.raises(Fenced):
        sink.commit()
    assert store.points("web01") == []


@pytest.mark.parametrize("flushed", [False, True])
def test_fenced_session_cannot_commit_logs_through_the_catalog_either(store: Store, *, flushed: bool) -> None:
    primary = Primary(FakeClock(seed=1), [small_disk()])
    replica = primary.replicate(store)
    primary.write(0, 0, b"a" * 512)
    cycle = primary.cut()
    sink = primary.begin_logs(replica, cycle)
    send_logs(sink, cycle)
    if flushed:
        sink.flush()
    claim_elsewhere(store)
    with pytest.raises(Fenced):
        sink.commit()
    assert [point.kind for point in store.points("web01")] == ["initial"]
    with pytest.raises(Fenced):
        primary.begin_logs(replica, dataclasses.replace(cycle, transfer_id=guid(5)))
    assert replica.transfer == cycle.transfer_id  # nothing of the newer session's was dropped


def test_claims_of_one_vm_from_many_threads_leave_one_owner(store: Store) -> None:
    replicas: list[VmReplica] = []

    def work(generation: int) -> None:
        try:
            replicas.append(claim(store, relationship_id=guid(generation), generation=generation))
        except Fenced:
            pass

    threads = [threading.Thread(target=work, args=(generation,)) for generation in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live = 0
    for replica in replicas:
        try:
            replica.begin_initial(guid(50), point_id=guid(51), instant_s=0.0)
            live += 1
        except Fenced:
            pass
    assert live == 1
    assert owner_of(store)[1] == 8


def test_closed_session_says_so_and_the_next_goes_on(store: Store) -> None:
    primary = Primary(FakeClock(seed=1), [small_disk()])
    replica = primary.claim(store)
    sink = primary.begin_initial(replica)
    replica.close()
    replica.close()
    for call in (lambda: primary.begin_initial(replica), sink.flush):
        with pytest.raises(InvalidTransition, match="ended"):
            call()
    again = primary.begin_initial(primary.claim(store))
    assert again.continued


SPEC = small_disk()


@pytest.mark.parametrize(
    "disks",
    [
        [],
        [small_disk(index) for index in range(64)] + [small_disk(0)],
        [small_disk(index) for index in range(100)],
        [small_disk(64)],
        [small_disk(-1)],
        [small_disk(0), small_disk(0)],
        [dataclasses.replace(SPEC, virtual_bytes=1 << 63)],
        [dataclasses.replace(SPEC, virtual_bytes=(64 << 40) + 512)],
        [dataclasses.replace(SPEC, virtual_bytes=0)],
        [dataclasses.replace(SPEC, virtual_bytes=-512)],
        [dataclasses.replace(SPEC, virtual_bytes=1000)],
        [dataclasses.replace(SPEC, virtual_bytes=512 * 3, logical_sector_bytes=4096)],
        [dataclasses.replace(SPEC, logical_sector_bytes=520)],
        [dataclasses.replace(SPEC, physical_sector_bytes=1 << 40)],
        [dataclasses.replace(SPEC, block_bytes=3 << 20)],
        [dataclasses.replace(SPEC, block_bytes=1 << 19)],
        [dataclasses.replace(SPEC, block_bytes=1 << 40)],
    ],
)
def test_impossible_disks_are_refused_and_make_nothing(
    store: Store, files: FaultFiles, disks: list[DiskSpec]
) -> None:
    before = files.files()
    with pytest.raises(FieldOutOfRange):
        claim(store, disks=disks)
    assert store.status().vms == []
    assert files.files() == before


@pytest.mark.parametrize("generation", [-1, 1 << 63, 1 << 200])
def test_impossible_generations_are_refused(store: Store, generation: int) -> None:
    with pytest.raises(FieldOutOfRange):
        claim(store, generation=generation)


@pytest.mark.parametrize("vm", ["", "x" * 101, "a\0b", "a\nb", "\udc80"])
def test_impossible_names_are_refused(store: Store, vm: str) -> None:
    with pytest.raises(FieldOutOfRange):
        claim(store, vm)


def test_largest_disks_are_welcome(store: Store) -> None:
    replica = claim(store, disks=[DiskSpec(index, 64 << 40) for index in range(64)])
    assert len(replica.disks) == 64


def test_hostile_names_stay_in_folders_of_their_own(store: Store, files: FaultFiles, root: Path) -> None:
    names = [
        "../../etc",
        "/etc/passwd",
        "..",
        ".",
        "catalog.db",
        "store.lock",
        "web01/disks",
        "Web01",
        "web01",
        "CON",
    ]
    for number, vm in enumerate(names, 1):
        primary = Primary(FakeClock(seed=number), [small_disk(0, 1)], vm=vm, relationship_id=guid(number))
        primary.write(0, 0, bytes([number]) * 512)
        primary.replicate(store)
    folders = {Path(status.folder) for status in store.status().vms}
    assert len(folders) == len(names)
    assert all(folder.parent == root for folder in folders)
    disks = [path for path in files.files() if path.suffix == ".vhdx"]
    assert len(disks) == len(names)
    assert all(path.parents[2] == root for path in disks)


def test_labels_and_certificates_cannot_talk_to_the_terminal(store: Store) -> None:
    spec = dataclasses.replace(SPEC, label="\x1b[2Jevil\n" + "x" * 1000)
    claim(store, disks=[spec], certificate="sha256:\x1b[0m")
    status = store.status().vms[0]
    assert status.disks[0].label.startswith("?[2Jevil?")
    assert len(status.disks[0].label) <= 255
    assert status.owners[0].certificate == "sha256:?[0m"


@pytest.mark.parametrize(
    "disks",
    [
        [small_disk(1)],
        [dataclasses.replace(SPEC, logical_sector_bytes=4096)],
    ],
)
def test_other_disks_are_refused_once_there_is_a_replica(store: Store, disks: list[DiskSpec]) -> None:
    primary = Primary(FakeClock(seed=1), [SPEC])
    primary.replicate(store)
    with pytest.raises(ReplicaDiverged) as caught:
        claim(store, disks=disks, generation=7)
    assert caught.value.hint
    assert owner_of(store)[1] == 1  # a refused claim changes nothing
    assert primary.claim(store).phase == "ready"


def test_new_label_and_block_size_are_no_other_disk(store: Store) -> None:
    Primary(FakeClock(seed=1), [SPEC]).replicate(store)
    claim(store, disks=[dataclasses.replace(SPEC, label="new.vhdx", block_bytes=0)])
    assert store.status().vms[0].disks[0].label == "new.vhdx"


def test_other_disks_begin_anew_while_nothing_was_replicated(
    store: Store, files: FaultFiles, root: Path
) -> None:
    primary = Primary(FakeClock(seed=1), [SPEC])
    primary.begin_initial(primary.claim(store))
    larger = Primary(FakeClock(seed=2), [small_disk(0, 8), small_disk(1)], generation=2)
    replica = larger.claim(store)
    assert (replica.phase, replica.transfer) == ("empty", None)
    larger.scribble(random.Random(1))
    larger.replicate(store)
    assert read_replica(files, root, larger) == larger.image()


def test_one_process_serves_a_store(store: Store, files: FaultFiles, root: Path, clock: FakeClock) -> None:
    with pytest.raises(Locked):
        Store.create_or_open(files, root, clock=clock)
    store.close()
    Store.create_or_open(files, root, clock=clock).close()


def test_reader_beside_the_server_sees_but_does_not_touch(
    store: Store, files: FaultFiles, root: Path, clock: FakeClock
) -> None:
    primary = Primary(FakeClock(seed=1), [SPEC])
    primary.replicate(store)
    with Store.open_reading(files, root, clock=clock) as reader:
        assert reader.status() == store.status()
        assert [point.state for point in reader.points("web01")] == ["complete"]
        for call in (lambda: claim(reader), reader.recover):
            with pytest.raises(InvalidTransition):
                call()


def test_reading_needs_a_store(files: FaultFiles, root: Path, clock: FakeClock) -> None:
    with pytest.raises(StoreError, match="no replica store"):
        Store.open_reading(files, root / "absent", clock=clock)
    assert not (root / "absent").exists()


def test_lost_catalog_is_not_replaced_over_replicas(
    store: Store, files: FaultFiles, root: Path, clock: FakeClock
) -> None:
    Primary(FakeClock(seed=1), [SPEC]).replicate(store)
    store.close()
    for path in root.glob("catalog.db*"):
        path.unlink()
    with pytest.raises(StoreError, match="catalog is empty or lost"):
        Store.create_or_open(files, root, clock=clock)


def test_folder_of_unknown_origin_is_not_taken_over(store: Store, files: FaultFiles, root: Path) -> None:
    files.load(root / "web01" / "disks" / "0.vhdx", b"somebody's")
    with pytest.raises(StoreError, match="does not know"):
        claim(store)
    assert files.content_of(root / "web01" / "disks" / "0.vhdx") == b"somebody's"


def test_unknown_vm_is_told_with_what_there_is(store: Store, root: Path) -> None:
    claim(store)
    for call in (
        lambda: store.points("web02"),
        lambda: store.export_point("web02", None, 0, root.parent / "x.raw"),
    ):
        with pytest.raises(NoSuchPoint) as caught:
            call()
        assert "web01" in (caught.value.hint or "")


def test_store_on_the_real_file_system_works_the_same(root: Path) -> None:
    clock = FakeClock(seed=3)
    primary = Primary(clock, [small_disk(0), small_disk(1, 2)], policy=EVERY)
    rng = random.Random(7)
    primary.scribble(rng, 10)
    with Store.create_or_open(OS_FILES, root / "store", clock=clock) as store:
        replica = primary.replicate(store)
        for _ in range(3):
            primary.scribble(rng)
            primary.ship(replica, primary.cut())
            replica.apply()
            assert read_replica(OS_FILES, root / "store", primary) == primary.image()
    names = sorted(
        str(path.relative_to(root / "store")) for path in (root / "store").rglob("*") if path.is_file()
    )
    assert [name for name in names if not name.endswith(".hru")] == [
        "catalog.db",
        "store.lock",
        "web01/applied",
        "web01/disks/0.vhdx",
        "web01/disks/1.vhdx",
        "web01/lock",
    ]
    assert len([name for name in names if name.startswith("web01/points/")]) >= 3


def test_every_refusal_has_a_hint(store: Store) -> None:
    claim(store)
    for changes in ({"relationship_id": guid(2), "generation": 1}, {"generation": 1}):
        with pytest.raises(HvReplicaError) as caught:
            claim(store, **changes)
        assert caught.value.hint


def test_folder_of_a_new_store_is_its_owners_alone(tmp_path: Path) -> None:
    """It holds what the guests wrote."""
    with Store.create_or_open(OS_FILES, tmp_path / "new" / "store", clock=FakeClock(seed=1)):
        assert stat.S_IMODE((tmp_path / "new" / "store").stat().st_mode) == 0o700
