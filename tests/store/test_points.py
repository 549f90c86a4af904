"""An exported point is the disk as the primary had it; others' tools open it and find the same bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import subprocess
import uuid
from typing import TYPE_CHECKING

import pytest

from hvreplica.errors import NoSuchPoint, StoreError, StoreFull
from hvreplica.files import OS_FILES
from hvreplica.formats.messages import PointPolicy
from hvreplica.store import Store
from tests.store.world import EVERY, Primary, guid, ram_folder, read_disk, small_disk
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles
from tests.support.tools import require_tool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.store import VmReplica


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        (folder / "store").mkdir()
        yield folder / "store"


@pytest.fixture
def out(root: Path) -> Path:
    return root.parent / "out.vhdx"


@pytest.fixture
def files(root: Path) -> FaultFiles:
    return FaultFiles(root)


@pytest.fixture
def store(files: FaultFiles, root: Path) -> Iterator[Store]:
    with Store.create_or_open(files, root, clock=FakeClock(seed=9)) as opened:
        yield opened


@pytest.fixture
def primary() -> Primary:
    made = Primary(FakeClock(seed=1), [small_disk(0, 2), small_disk(1, 2)], policy=EVERY)
    made.scribble(random.Random(3), 12)
    return made


@pytest.fixture
def replica(store: Store, primary: Primary) -> VmReplica:
    return primary.replicate(store)


@pytest.mark.parametrize("name", ["vhdx", "raw"])
@pytest.mark.parametrize("disk_index", [0, 1])
@pytest.mark.usefixtures("replica")
def test_export_is_the_primary_of_that_instant(
    store: Store, files: FaultFiles, primary: Primary, out: Path, name: str, disk_index: int
) -> None:
    report = store.export_point("web01", guid(100), disk_index, out, name)
    assert read_disk(files, out, primary.clock, name) == primary.image()[disk_index]
    assert (report.point, report.disk, report.format) == (str(guid(100)), disk_index, name)
    assert report.file_bytes == len(files.content_of(out))
    assert [path for path in files.files() if path.parent == out.parent] == [out]


def test_reader_exports_beside_the_server(
    files: FaultFiles, root: Path, primary: Primary, replica: VmReplica, out: Path
) -> None:
    with Store.open_reading(files, root, clock=FakeClock(seed=4)) as reader:
        reader.export_point("web01", None, 0, out, "raw")
        assert files.content_of(out) == primary.image()[0]
        before = primary.image()[0]
        primary.scribble(random.Random(5), 9)
        primary.ship(replica, primary.cut())
        reader.export_point("web01", None, 0, out, "raw", overwrite=True)
        assert files.content_of(out) == before  # what waits in the spool is no point yet
        assert [point.state for point in reader.points("web01")] == ["complete", "spooled"]


def test_cut_apply_is_finished_by_whoever_exports(
    store: Store, files: FaultFiles, root: Path, primary: Primary, replica: VmReplica, out: Path
) -> None:
    primary.scribble(random.Random(5), 9)
    primary.ship(replica, primary.cut())
    files.fail("sync", path="*.vhdx", error=errno.EIO)
    with pytest.raises(OSError):
        replica.apply()
    store.close()
    with Store.open_reading(files, root, clock=FakeClock(seed=4)) as reader:
        report = reader.export_point("web01", None, 0, out, "raw")
        assert files.content_of(out) == primary.image()[0]
        assert report.point == str(primary.last_point)
        assert [point.state for point in reader.points("web01")] == ["complete"] * 2


@pytest.mark.usefixtures("replica")
def test_export_waits_for_nobody_who_changes_the_disks(
    store: Store, files: FaultFiles, root: Path, primary: Primary, out: Path
) -> None:
    lock = files.lock(root / "web01" / "lock")
    store.export_point("web01", None, 0, out, "raw")
    assert files.content_of(out) == primary.image()[0]
    lock.release()


@pytest.mark.usefixtures("replica")
def test_export_refuses_what_it_does_not_have(store: Store, out: Path) -> None:
    for point, disk in ((uuid.UUID(int=5), 0), (None, 2), (None, -1)):
        with pytest.raises(NoSuchPoint):
            store.export_point("web01", point, disk, out)
    with pytest.raises(StoreError, match="no export as"):
        store.export_point("web01", None, 0, out, "qcow2")  # type: ignore[arg-type]


def test_older_points_are_given_out_as_they_were(
    store: Store, files: FaultFiles, primary: Primary, replica: VmReplica, out: Path
) -> None:
    images = {guid(100): primary.image()[0]}
    with contextlib.ExitStack() as held:
        held.enter_context(store.open_point("web01", "latest"))
        for seed in (5, 6, 7):
            primary.scribble(random.Random(seed), 9)
            primary.ship(replica, primary.cut())
            replica.apply()
            opened = held.enter_context(
                store.open_point("web01", "latest")
            )  # else only the last of an hour stays
            images[opened.id] = primary.image()[0]
        assert len(images) == 4
    for point_id, image in images.items():
        store.export_point("web01", point_id, 0, out, "raw", overwrite=True)
        assert files.content_of(out) == image


@pytest.mark.usefixtures("replica")
def test_point_that_is_read_stays_when_the_disks_move_on(store: Store, primary: Primary) -> None:
    """The rule lets all but one point of an hour go, and no reader loses what it reads."""
    primary.policy = PointPolicy(recovery_point_every_s=3600)
    replica = primary.claim(store)
    primary.scribble(random.Random(5), 9)
    primary.ship(replica, primary.cut())
    replica.apply()
    expected = primary.image()[0]
    assert primary.last_point is not None
    with store.open_point("web01", "latest") as opened:
        assert opened.id == primary.last_point
        for seed in (6, 7):
            primary.scribble(random.Random(seed), 9)
            primary.ship(replica, primary.cut())
            replica.apply()
            data = bytearray(len(expected))
            opened.disks[0].read_into(data, 0)
            assert data == expected
    ids = [point.id for point in store.points("web01")]
    assert ids == [str(opened.id), str(primary.last_point)]  # the one between has left, as had the first


def test_vm_without_a_point_has_nothing_to_export(store: Store, primary: Primary, out: Path) -> None:
    primary.begin_initial(primary.claim(store))
    with pytest.raises(NoSuchPoint, match="no complete point"):
        store.export_point("web01", None, 0, out)


@pytest.mark.usefixtures("replica")
def test_output_that_exists_is_kept_unless_told(
    store: Store, files: FaultFiles, primary: Primary, out: Path
) -> None:
    files.load(out, b"precious")
    with pytest.raises(StoreError, match="exists"):
        store.export_point("web01", None, 0, out, "raw")
    assert files.content_of(out) == b"precious"
    store.export_point("web01", None, 0, out, "raw", overwrite=True)
    assert files.content_of(out) == primary.image()[0]


@pytest.mark.usefixtures("replica")
@pytest.mark.parametrize("name", ["web01/disks/0.vhdx", "new.vhdx", "../store/x.vhdx"])
def test_store_itself_is_no_place_for_exports(store: Store, root: Path, name: str) -> None:
    with pytest.raises(StoreError, match="store itself"):
        store.export_point("web01", None, 0, root / name, overwrite=True)


@pytest.mark.usefixtures("replica")
@pytest.mark.parametrize("operation", ["write", "sync", "rename", "sync_directory"])
def test_full_disk_leaves_nothing_half_exported(
    store: Store, files: FaultFiles, primary: Primary, out: Path, operation: str
) -> None:
    before = files.files()
    files.fail(
        operation, error=errno.ENOSPC, path=f"{out.parent}*out*" if operation != "sync_directory" else "*"
    )
    with pytest.raises(StoreFull) as caught:
        store.export_point("web01", None, 0, out)
    assert str(out) in str(caught.value)
    if operation != "sync_directory":
        assert [path for path in files.files() if path.suffix != ".use"] == before
    store.export_point("web01", None, 0, out, overwrite=True)
    assert read_disk(files, out, primary.clock) == primary.image()[0]
    assert "exported disk" in caught.value.message
    assert "run the same command again" in str(caught.value.hint)


def test_qemu_agrees_with_the_replica_and_its_exports(root: Path, out: Path) -> None:
    """Oracle: qemu-img opens replica and export, finds them sound, and converts both to the primary's bytes."""
    qemu_img = require_tool("qemu-img")
    primary = Primary(FakeClock(seed=1), [small_disk(0, 8)])
    rng = random.Random(3)
    primary.scribble(rng, 40, 64)
    with Store.create_or_open(OS_FILES, root, clock=FakeClock(seed=9)) as store:
        replica = primary.replicate(store)
        for _ in range(3):
            primary.scribble(rng, 20, 64)
            primary.ship(replica, primary.cut())
            replica.apply()
        store.export_point("web01", None, 0, out)
        store.export_point("web01", None, 0, out.with_suffix(".raw"), "raw")
    expected = hashlib.sha256(primary.image()[0]).hexdigest()
    assert hashlib.sha256(out.with_suffix(".raw").read_bytes()).hexdigest() == expected
    for path in (root / "web01" / "disks" / "0.vhdx", out):
        subprocess.run([qemu_img, "check", "-q", str(path)], check=True, capture_output=True)
        raw = out.with_suffix(".qemu")
        subprocess.run(
            [qemu_img, "convert", "-O", "raw", str(path), str(raw)], check=True, capture_output=True
        )
        assert hashlib.sha256(raw.read_bytes()).hexdigest() == expected
