"""Receiving: a window defines all its bytes, what was flushed is continued, nothing incomplete is committed."""

from __future__ import annotations

import dataclasses
import errno
import random
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hvreplica.errors import (
    ChecksumMismatch,
    Fenced,
    FieldOutOfRange,
    FormatError,
    Locked,
    NotClosed,
    Overlap,
    ResumeRefused,
    StoreError,
    StoreFull,
)
from hvreplica.files import OS_FILES
from hvreplica.store import AlreadyHave, InitialSink, LogSink, Store
from tests.store.world import (
    EVERY,
    MIB,
    NOTHING,
    Primary,
    data_extents,
    guid,
    ram_folder,
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
def primary() -> Primary:
    made = Primary(FakeClock(seed=1), [small_disk(0, 2), small_disk(1, 2)], policy=EVERY)
    made.scribble(random.Random(3), 12)
    return made


def initial(primary: Primary, replica: VmReplica, number: int = 100) -> InitialSink:
    sink = primary.begin_initial(replica, number)
    assert isinstance(sink, InitialSink)
    return sink


def shipping(primary: Primary, replica: VmReplica, cycle: Any) -> LogSink:
    sink = primary.begin_logs(replica, cycle)
    assert isinstance(sink, LogSink)
    return sink


def test_initial_makes_the_replica_equal(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    replica = primary.claim(store)
    sink = initial(primary, replica)
    assert (replica.phase, replica.transfer, sink.continued) == ("initial", guid(100), False)
    assert sink.targets == {0: 2 * MIB, 1: 2 * MIB}
    send_disks(sink, primary.image(), window_bytes=256 << 10)
    assert sink.covered_bytes == 4 * MIB
    assert not files.exists(replica_path(root))
    assert sink.commit() == guid(100)
    assert (replica.phase, replica.transfer, replica.last_point) == ("ready", None, guid(100))
    assert read_replica(files, root, primary) == primary.image()


def test_commit_gives_the_same_answer_again(store: Store, primary: Primary) -> None:
    replica = primary.claim(store)
    sink = initial(primary, replica)
    send_disks(sink, primary.image())
    assert sink.commit() == sink.commit() == guid(100)
    assert primary.begin_initial(replica) == AlreadyHave(guid(100), "complete")
    primary.last_point = guid(100)
    primary.changes = {0: [], 1: []}
    primary.scribble(random.Random(1))
    cycle = primary.cut()
    shipped = shipping(primary, replica, cycle)
    send_logs(shipped, cycle)
    assert shipped.commit() == shipped.commit() == cycle.point_id
    assert primary.begin_logs(replica, cycle) == AlreadyHave(cycle.point_id, "spooled")
    replica.apply()
    assert primary.begin_logs(replica, cycle) == AlreadyHave(cycle.point_id, "complete")


@pytest.mark.parametrize("missing", ["first", "middle", "last", "other disk"])
def test_initial_with_a_gap_is_not_committed(store: Store, primary: Primary, missing: str) -> None:
    replica = primary.claim(store)
    sink = initial(primary, replica)
    windows = [(index, offset) for index in (0, 1) for offset in range(0, 2 * MIB, MIB // 2)]
    left_out = {"first": (0, 0), "middle": (0, MIB), "last": (1, 3 * MIB // 2), "other disk": (1, 0)}[missing]
    for index, offset in windows:
        if (index, offset) != left_out:
            sink.write(
                index,
                offset,
                MIB // 2,
                *data_extents(primary.image()[index][offset : offset + MIB // 2], offset),
            )
    with pytest.raises(StoreError, match="not whole") as caught:
        sink.commit()
    assert caught.value.offset == left_out[1]
    assert replica.phase == "initial"
    index, offset = left_out
    sink.write(
        index, offset, MIB // 2, *data_extents(primary.image()[index][offset : offset + MIB // 2], offset)
    )
    assert sink.commit() == guid(100)


def test_one_window_without_data_covers_a_whole_disk(store: Store, files: FaultFiles, root: Path) -> None:
    primary = Primary(FakeClock(), [small_disk(0, 2)])
    sink = initial(primary, primary.claim(store))
    sink.write(0, 0, 2 * MIB, *NOTHING)
    sink.commit()
    assert read_replica(files, root, primary) == primary.image()


def test_windows_that_overlap_or_leave_the_disk_are_refused(store: Store, primary: Primary) -> None:
    sink = initial(primary, primary.claim(store))
    sink.write(0, MIB, 4096, *NOTHING)
    for offset, length in ((MIB, 4096), (MIB - 512, 1024), (0, 2 * MIB)):
        with pytest.raises(Overlap):
            sink.write(0, offset, length, *NOTHING)
    for target, offset, length in (
        (2, 0, 512),
        (-1, 0, 512),
        (0, 2 * MIB, 512),
        (0, 0, 1 << 62),
        (0, 100, 512),
    ):
        with pytest.raises(FieldOutOfRange):
            sink.write(target, offset, length, *NOTHING)
    with pytest.raises(FieldOutOfRange):
        sink.write(0, 0, 4096, np.array([[0, 512]]), bytes(511))
    assert sink.covered_bytes == 4096


def test_session_that_died_is_continued_from_what_was_flushed(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    image = primary.image()
    sink = initial(primary, primary.claim(store))
    sink.write(0, 0, MIB, *data_extents(image[0][:MIB]))
    sink.write(1, MIB, MIB, *data_extents(image[1][MIB:], MIB))  # durable, but behind a gap
    sink.flush()
    sink.write(
        0, MIB, MIB, *data_extents(b"\xee" * MIB, MIB)
    )  # never flushed, and changed before it comes again
    replica = primary.claim(store)
    assert replica.transfer == guid(100)
    again = initial(primary, replica)
    assert (again.continued, again.position(0), again.position(1)) == (True, MIB, 0)
    with pytest.raises(ResumeRefused):
        again.resume_from(0, MIB + 512)
    with pytest.raises(ResumeRefused):
        again.resume_from(1, MIB)
    again.resume_from(0, MIB)
    assert again.covered_bytes == MIB
    with pytest.raises(ResumeRefused):
        again.resume_from(0, 0 + MIB)
    for index, start in ((0, MIB), (1, 0)):
        again.write(index, start, 2 * MIB - start, *data_extents(image[index][start:], start))
    again.commit()
    assert read_replica(files, root, primary) == image


def test_continued_transfer_may_also_be_sent_whole(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    sink = initial(primary, primary.claim(store))
    for index in (0, 1):
        sink.write(index, 0, 2 * MIB, *data_extents(b"\xdd" * 2 * MIB))
    sink.flush()
    again = initial(primary, primary.claim(store))
    for index, content in primary.image().items():
        again.write(index, 0, len(content), *data_extents(content))
    again.commit()
    assert read_replica(files, root, primary) == primary.image()


def test_other_transfer_starts_clean(store: Store, files: FaultFiles, root: Path, primary: Primary) -> None:
    sink = initial(primary, primary.claim(store))
    sink.write(0, 0, MIB, *data_extents(b"\xdd" * MIB))
    sink.flush()
    again = initial(primary, primary.claim(store), 200)
    assert (again.continued, again.position(0)) == (False, 0)
    send_disks(again, primary.image())
    again.commit()
    assert read_replica(files, root, primary) == primary.image()


def test_transfer_id_with_other_contents_is_refused(store: Store, primary: Primary) -> None:
    replica = primary.claim(store)
    initial(primary, replica)
    with pytest.raises(StoreError, match="other contents"):
        primary.begin_initial(replica, 100, point=101)


def test_partial_disk_that_vanished_starts_clean(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    sink = initial(primary, primary.claim(store))
    sink.write(0, 0, MIB, *NOTHING)
    sink.flush()
    files.unlink(root / "web01" / "disks" / "1.vhdx.partial")
    again = initial(primary, primary.claim(store))
    assert (again.continued, again.position(0)) == (False, 0)
    send_disks(again, primary.image())
    again.commit()
    assert read_replica(files, root, primary) == primary.image()


def test_windows_from_many_threads_while_one_flushes(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    primary.scribble(random.Random(5), 40)
    image = primary.image()
    sink = initial(primary, primary.claim(store))
    step = 64 << 10
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for index, content in image.items():
                for offset in range(first * step, len(content), 3 * step):
                    sink.write(index, offset, step, *data_extents(content[offset : offset + step], offset))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        sink.flush()
    for thread in threads:
        thread.join()
    assert errors == []
    sink.commit()
    assert read_replica(files, root, primary) == image


def test_position_never_passes_a_window_that_is_being_written(
    store: Store, files: FaultFiles, primary: Primary
) -> None:
    """A flush during a write covers what returned before, not what is under way."""
    sink = initial(primary, primary.claim(store))
    sink.write(0, 0, 4096, *NOTHING)
    seen: list[int] = []

    def flush_meanwhile(operation: str, path: Path) -> None:
        if operation == "write" and path.name == "0.vhdx.partial" and not seen:
            seen.append(-1)
            thread = threading.Thread(target=lambda: seen.append(sink._targets[0].coverage.prefix_bytes))
            thread.start()
            thread.join()

    files.hook = flush_meanwhile
    sink.write(0, 4096, 4096, *data_extents(b"a" * 4096, 4096))
    files.hook = None
    assert seen == [-1, 4096]
    sink.flush()
    assert sink.position(0) == 8192


def test_full_disk_while_receiving_is_told_and_survived(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    sink = initial(primary, primary.claim(store))
    image = primary.image()
    sink.write(0, 0, MIB, *data_extents(image[0][:MIB]))
    files.fail("write", path="*.partial", error=errno.ENOSPC, written_bytes=1000)
    data = b"\xcc" * MIB
    with pytest.raises(StoreFull) as caught:
        sink.write(0, MIB, MIB, *data_extents(data, MIB))
    assert "0.vhdx.partial" in str(caught.value)
    assert "1.0 MiB" in str(caught.value)
    assert sink.covered_bytes == MIB
    for index, start in ((0, MIB), (1, 0)):  # the same window comes again, with other bytes and gaps
        sink.write(index, start, 2 * MIB - start, *data_extents(image[index][start:], start))
    sink.commit()
    assert read_replica(files, root, primary) == primary.image()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failed_sync_ends_the_sink_and_the_next_one_continues(
    store: Store, files: FaultFiles, root: Path, primary: Primary, code: int
) -> None:
    sink = initial(primary, primary.claim(store))
    sink.write(0, 0, MIB, *data_extents(primary.image()[0][:MIB]))
    sink.flush()
    sink.write(0, MIB, MIB, *data_extents(primary.image()[0][MIB:], MIB))
    files.fail("sync", path="*.partial", error=code)
    with pytest.raises(StoreFull if code == errno.ENOSPC else OSError):
        sink.flush()
    for call in (sink.flush, lambda: sink.write(1, 0, MIB, *NOTHING)):
        with pytest.raises((StoreFull, OSError)):
            call()
    again = initial(primary, primary.claim(store))
    assert again.position(0) == MIB
    send_disks(again, primary.image())
    again.commit()
    assert read_replica(files, root, primary) == primary.image()


def test_expected_bytes_beyond_the_free_ones_are_refused_early(
    store: Store, files: FaultFiles, primary: Primary
) -> None:
    replica = primary.claim(store)
    files.capacity_bytes = 16 * MIB
    with pytest.raises(StoreFull) as caught:
        replica.begin_initial(guid(1), point_id=guid(2), instant_s=0.0, expected_bytes=1 << 40)
    assert "1.0 TiB" in str(caught.value)
    assert replica.transfer is None
    assert replica.begin_initial(guid(1), point_id=guid(2), instant_s=0.0, expected_bytes=MIB)


@pytest.mark.parametrize("instant_s", [float("nan"), float("inf"), -1.0, 1e12])
def test_impossible_instants_are_refused(store: Store, primary: Primary, instant_s: float) -> None:
    with pytest.raises(FieldOutOfRange):
        primary.claim(store).begin_initial(guid(1), point_id=guid(2), instant_s=instant_s)


def test_new_initial_replaces_the_disks_only_at_its_commit(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    replica = primary.replicate(store)
    before = primary.image()
    primary.scribble(random.Random(8), 20)
    sink = initial(primary, replica, 200)
    assert (replica.phase, replica.last_point) == ("initial", guid(100))
    send_disks(sink, primary.image())
    assert read_replica(files, root, primary) == before
    assert [point.id for point in store.points("web01")] == [str(guid(100))]
    sink.commit()
    assert read_replica(files, root, primary) == primary.image()
    assert [point.id for point in store.points("web01")] == [str(guid(100)), str(guid(200))]


def test_initial_commit_waits_for_readers_elsewhere_and_can_be_repeated(
    store: Store, files: FaultFiles, root: Path, primary: Primary
) -> None:
    replica = primary.replicate(store)
    sink = initial(primary, replica, 200)
    send_disks(sink, primary.image())
    reader = files.lock(root / "web01" / "lock", shared=True)
    with pytest.raises(Locked):
        sink.commit()
    assert [point.id for point in store.points("web01")] == [str(guid(100))]
    reader.release()
    assert sink.commit() == guid(200)


# Logs


@pytest.fixture
def ready(store: Store, primary: Primary) -> VmReplica:
    return primary.replicate(store)


def test_logs_are_spooled_then_applied(
    files: FaultFiles, root: Path, primary: Primary, ready: VmReplica
) -> None:
    before = primary.image()
    primary.scribble(random.Random(4), 10)
    cycle = primary.cut()
    sink = shipping(primary, ready, cycle)
    assert sink.targets == {place: log.log_bytes for place, log in enumerate(cycle.logs)}
    send_logs(sink, cycle)
    assert ready.last_point == guid(100)
    sink.commit()
    assert ready.last_point == cycle.point_id
    assert [row.last_log_id for row in ready.disks] == list(primary.last_log.values())
    assert read_replica(files, root, primary) == before
    assert ready.apply() == cycle.point_id == ready.apply()
    assert read_replica(files, root, primary) == primary.image()
    assert files.names(root / "web01" / "spool") == []


def test_cut_shipping_is_continued(store: Store, primary: Primary, ready: VmReplica) -> None:
    primary.scribble(random.Random(4), 20, 64)
    cycle = primary.cut()
    sink = shipping(primary, ready, cycle)
    first = cycle.contents[0]
    sink.write(0, 0, 8192, *data_extents(first[:8192]))
    sink.flush()
    sink.write(0, 8192, 4096, np.array([[8192, 4096]]), b"\xee" * 4096)
    again = shipping(primary, primary.claim(store), cycle)
    assert (again.continued, again.position(0)) == (True, 8192)
    send_logs(again, cycle)
    again.commit()


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda content: _flip(content, 4100), FormatError),
        (lambda content: _flip(content, 8192 + 100), ChecksumMismatch),
        (lambda content: _flip(content, len(content) - 4096 + 40), FormatError),
        (lambda content: bytes(len(content)), FormatError),
        (lambda content: content[:44] + bytes(8) + content[52:], FormatError),
        (lambda content: random.Random(1).randbytes(len(content)), FormatError),
    ],
)
def test_damaged_log_is_never_acknowledged_and_the_next_starts_clean(
    files: FaultFiles, root: Path, primary: Primary, ready: VmReplica, damage: Any, error: Any
) -> None:
    primary.scribble(random.Random(4), 10)
    cycle = primary.cut()
    broken = dataclasses.replace(cycle, contents=[damage(cycle.contents[0]), *cycle.contents[1:]])
    sink = shipping(primary, ready, broken)
    send_logs(sink, broken)
    with pytest.raises((error, NotClosed)) as caught:
        sink.commit()
    assert str(cycle.logs[0].log_id) in str(caught.value)
    with pytest.raises((error, NotClosed)):
        sink.commit()
    assert (ready.last_point, ready.transfer) == (guid(100), None)
    assert files.names(root / "web01" / "spool") == []
    again = shipping(primary, ready, cycle)
    assert not again.continued
    send_logs(again, cycle)
    again.commit()
    ready.apply()
    assert read_replica(files, root, primary) == primary.image()


def test_log_that_writes_beyond_the_disk_is_refused(primary: Primary, ready: VmReplica) -> None:
    larger = Primary(FakeClock(seed=8), [small_disk(0, 8), small_disk(1, 2)])
    larger.last_point = guid(100)
    larger.write(0, 6 * MIB, b"z" * 512)
    cycle = dataclasses.replace(larger.cut(), disks=primary.image())  # said to be of the disk's own size
    sink = shipping(primary, ready, cycle)
    send_logs(sink, cycle)
    with pytest.raises(FormatError):
        sink.commit()
    assert ready.last_point == guid(100)


def test_logs_swapped_between_disks_are_refused(primary: Primary, ready: VmReplica) -> None:
    primary.write(0, 0, b"a" * 512)
    primary.write(1, 0, b"b" * 512)
    cycle = primary.cut()
    swapped = dataclasses.replace(cycle, contents=cycle.contents[::-1])
    sink = shipping(primary, ready, swapped)
    send_logs(sink, swapped)
    with pytest.raises(FieldOutOfRange, match="announced") as caught:
        sink.commit()
    assert caught.value.field == "UniqueId"


def test_incomplete_log_is_not_acknowledged(primary: Primary, ready: VmReplica) -> None:
    primary.scribble(random.Random(4), 10)
    cycle = primary.cut()
    sink = shipping(primary, ready, cycle)
    content = cycle.contents[0]
    sink.write(0, 0, len(content) - 512, *data_extents(content[:-512]))
    with pytest.raises(StoreError, match="not whole"):
        sink.commit()
    assert ready.transfer == cycle.transfer_id


@pytest.mark.parametrize("operation", ["write", "sync", "rename", "sync_directory"])
def test_full_disk_while_spooling_keeps_the_store_usable(
    store: Store, files: FaultFiles, root: Path, primary: Primary, ready: VmReplica, operation: str
) -> None:
    primary.scribble(random.Random(4), 10)
    cycle = primary.cut()
    sink = shipping(primary, ready, cycle)
    files.fail(operation, path="*/spool*", error=errno.ENOSPC)

    def send() -> None:
        send_logs(sink, cycle)
        sink.commit()

    with pytest.raises(StoreFull):
        send()
    assert ready.last_point == guid(100)
    ready = primary.claim(store)
    primary.ship(ready, cycle)
    ready.apply()
    assert read_replica(files, root, primary) == primary.image()


def test_claim_does_not_wait_for_a_long_verification(
    store: Store, primary: Primary, ready: VmReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older session's commit notices the newer claim between two steps, and gives up."""
    primary.scribble(random.Random(4), 10)
    cycle = primary.cut()
    sink = shipping(primary, ready, cycle)
    send_logs(sink, cycle)
    claims: list[Any] = []
    check = sink._gate.check

    def claim_meanwhile() -> None:
        if not claims:
            thread = threading.Thread(target=lambda: claims.append(primary.claim(store)))
            claims.append(thread)
            thread.start()
            while sink._gate._reason is None:
                pass
        check()

    monkeypatch.setattr(sink._gate, "check", claim_meanwhile)
    with pytest.raises(Fenced):
        sink.commit()
    claims[0].join()
    assert claims[1].last_point == guid(100)
    primary.ship(claims[1], cycle)


def test_sinks_work_on_real_files_from_many_threads(root: Path) -> None:
    primary = Primary(FakeClock(seed=2), [small_disk(0, 8)])
    primary.scribble(random.Random(1), 60, 64)
    image = primary.image()[0]
    with Store.create_or_open(OS_FILES, root / "store", clock=FakeClock(seed=3)) as store:
        sink = initial(primary, primary.claim(store))
        step = 128 << 10

        def work(first: int) -> None:
            for offset in range(first * step, len(image), 4 * step):
                sink.write(0, offset, step, *data_extents(image[offset : offset + step], offset))

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        sink.flush()
        for thread in threads:
            thread.join()
        sink.commit()
        assert read_replica(OS_FILES, root / "store", primary) == primary.image()
