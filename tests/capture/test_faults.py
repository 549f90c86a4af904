"""Calls of the system fail under a captured VM: the guest is told, or the map takes the log's place; never silence.

After each fault the next cut has to bring what is behind to exactly what the disks hold, and a start after kill -9 has
to know every difference. The faults are those of tests/support/recorder, in the process that serves.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hvreplica.units import KIB, MIB
from tests.support.capture_host import Host, open_machine, record_cut
from tests.support.capture_scene import (
    FIRST_NUMBER,
    HOT,
    SIZES,
    changed_grains,
    cut_numbers,
    disk_numbers,
    fast_folder,
    make_scene,
    named_grains,
)
from tests.support.nbd_client import (
    FLUSH,
    FUA,
    READ,
    SECTOR,
    TRIM,
    WRITE,
    ZEROES,
    Workload,
    content,
    numbers_of,
)
from tests.support.recorder import Faults, build, recording

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hvreplica.disk.open import Format
    from tests.support.capture_scene import Scene
    from tests.support.nbd_client import Connection

DISK, LOG, JOURNAL = "*/0.*", "*/open/*.hrl", "*/journal/0.ij"
FRESH = 20 * MIB  # of a region that nothing was written to yet
EMPTY = 30 * MIB  # of a block that has no place yet
NBD_EIO, NBD_ENOSPC = 5, 28


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with fast_folder(tmp_path) as place:
        yield place


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("recorder"))


class Bench:
    """A host under faults, and one client of its first disk."""

    def __init__(self, folder: Path, library: Path, kind: Format, **settings: Any) -> None:
        self.scene: Scene = make_scene(folder, kind, **settings)
        self.library = library
        self.number = FIRST_NUMBER
        self.start()

    def start(self) -> None:
        self.faults = Faults(self.scene.folder / "faults")
        self.host = Host(self.scene.settings, recording(self.library, faults=self.faults))
        self.client: Connection = self.host.connect()

    def write(self, offset: int, length: int, *, flags: int = 0) -> int:
        """Write numbered sectors and return the error."""
        self.number += 1
        data = content(self.number, offset // SECTOR, length // SECTOR)
        return self.client.ask(WRITE, offset, length, flags=flags, data=data)[0]

    def flush(self) -> int:
        return self.client.ask(FLUSH)[0]

    def read(self, offset: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the numbers of a range."""
        error, data = self.client.ask(READ, offset, length)
        assert error == 0
        return numbers_of(data, offset // SECTOR)

    def cut(self, order: str = "cut") -> dict[str, Any]:
        return self.host.tell(order)

    def log_state(self) -> str:
        return str(self.host.tell("status")["disks"][0]["log_state"])

    def check_cycle(self) -> None:
        """Heal and cut: the cut is what guests read. Kill: the next start knows of all that is not so any more."""
        self.faults.heal()
        answer = self.cut()
        assert "error" not in answer, answer
        for index, numbers in enumerate(cut_numbers(self.scene)):
            client = self.host.connect(index)
            window = 4 * MIB
            for offset in range(0, SIZES[index], window):
                length = min(window, SIZES[index] - offset)
                error, data = client.ask(READ, offset, length)
                assert error == 0
                sector = offset // SECTOR
                seen = numbers_of(data, sector)
                wrong = np.flatnonzero(seen != numbers[sector : sector + len(seen)])
                assert not len(wrong), f"disk {index}, sector {sector + wrong[0]} is not as in the cut"
            client.close()
        self.check_recovery()

    def check_recovery(self) -> None:
        """Kill: the next start knows of every grain that is not as in the last cut, and its cut makes up for it."""
        self.kill()
        held = [disk_numbers(path) for path in self.scene.paths]
        machine = open_machine(self.scene.settings)
        for index, numbers in enumerate(cut_numbers(self.scene)):
            unknown = np.flatnonzero(changed_grains(numbers, held[index]) & ~named_grains(machine, index))
            assert not len(unknown), f"disk {index}, grain {unknown[0]} is unknown"
        record_cut(machine, self.scene.settings)
        for index, numbers in enumerate(cut_numbers(self.scene)):
            wrong = np.flatnonzero(numbers != held[index])
            assert not len(wrong), f"disk {index}, sector {wrong[0]} is not as in the cut"
        machine.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def kill(self) -> None:
        self.client.socket.close()
        if self.host.process.poll() is None:
            self.host.kill()

    def said(self) -> str:
        """Return what the host has said to people."""
        return self.host.log.read_text()


@pytest.fixture
def bench(folder: Path, library: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(folder, library, getattr(request, "param", "vhdx"))
    with contextlib.closing(made.client.socket), made.host:
        yield made
    made.kill()


kinds = pytest.mark.parametrize("bench", ["vhdx", "raw", "vhd"], indirect=True)


@kinds
def test_failed_write_of_the_disk_is_told_to_the_guest(bench: Bench) -> None:
    for offset in (0, EMPTY):  # an overwrite, and the first write of a block
        for error, told in ((errno.EIO, NBD_EIO), (errno.ENOSPC, NBD_ENOSPC)):
            rule = bench.faults.add("write resize", DISK, error=error)
            assert bench.write(offset, 8 * KIB) == told
            assert rule.hits == 1
            assert bench.write(offset + 64 * KIB, 8 * KIB) == 0, (
                "one failed write is no reason to refuse another"
            )
            assert bench.flush() == 0
    bench.check_cycle()


@kinds
def test_short_writes_are_gone_on_with(bench: Bench) -> None:
    rules = [
        bench.faults.add("write", pattern, short_bytes=short, count=None)
        for pattern, short in ((DISK, 1500), (LOG, 1000), (JOURNAL, 100))
    ]
    for offset in (0, FRESH, FRESH + 5 * SECTOR):
        assert bench.write(offset, 64 * KIB) == 0
        assert (bench.read(offset, 64 * KIB) == bench.number).all()
    assert bench.flush() == 0
    assert all(rule.hits for rule in rules)
    bench.check_cycle()


@pytest.mark.parametrize(
    ("error", "written"), [(errno.EIO, None), (errno.ENOSPC, 700)], ids=["whole", "torn"]
)
def test_failed_write_of_the_log_leaves_the_changes_to_the_map(
    bench: Bench, error: int, written: int | None
) -> None:
    assert bench.write(0, 8 * KIB) == 0
    if written is not None:
        bench.faults.add("write", LOG, short_bytes=written)
    rule = bench.faults.add("write", LOG, error=error, count=None, skip=0 if written is None else 1)
    assert bench.write(32 * KIB, 8 * KIB) == 0, "the log is no business of the guest's"
    assert rule.hits == 1
    assert bench.write(FRESH, 8 * KIB) == 0
    assert bench.flush() == 0
    assert bench.log_state() == "failed"
    assert rule.hits == 1, "a log that failed is left alone"
    bench.faults.heal()
    bench.check_cycle()


def test_log_is_kept_again_after_the_cut_that_follows_a_failed_one(bench: Bench) -> None:
    bench.faults.add("write", LOG, error=errno.ENOSPC)
    assert bench.write(0, 8 * KIB) == 0
    assert bench.log_state() == "failed"
    assert "error" not in bench.cut()
    assert bench.log_state() == "open"
    bench.write(4 * KIB, 8 * KIB)
    bench.check_cycle()


@kinds
@pytest.mark.parametrize(
    ("operation", "error", "told"), [("write", errno.ENOSPC, NBD_ENOSPC), ("sync", errno.EIO, NBD_EIO)]
)
def test_failed_journal_lets_no_new_region_change(
    bench: Bench, operation: str, error: int, told: int
) -> None:
    assert bench.write(0, 8 * KIB) == 0
    rule = bench.faults.add(operation, JOURNAL, error=error)
    before = bench.read(FRESH, 64 * KIB)
    assert bench.write(FRESH, 8 * KIB) == told
    assert rule.hits == 1
    assert (bench.read(FRESH, 64 * KIB) == before).all(), "a write was refused and done"
    assert bench.write(8 * KIB, 8 * KIB) == 0, "this region was armed before"
    assert bench.flush() == 0
    if operation == "sync":
        # Nothing proves any more what of the journal is durable: only a new process may go on.
        assert bench.write(FRESH, 8 * KIB) == told
        bench.check_recovery()
        bench.start()
    assert bench.write(FRESH, 8 * KIB) == 0
    bench.check_cycle()


@kinds
@pytest.mark.parametrize("command", [ZEROES, TRIM])
def test_failed_journal_lets_no_new_region_be_zeroed(bench: Bench, command: int) -> None:
    bench.faults.add("sync", JOURNAL, error=errno.EIO, count=None)
    length = 192 * KIB
    before = bench.read(40_500 * SECTOR // (64 * KIB) * 64 * KIB, length)
    assert before.any()
    assert bench.client.ask(command, 40_500 * SECTOR // (64 * KIB) * 64 * KIB, length)[0] == NBD_EIO
    assert (bench.read(40_500 * SECTOR // (64 * KIB) * 64 * KIB, length) == before).all()
    bench.restart()
    bench.check_cycle()


@kinds
def test_failed_sync_of_the_disk_ends_all_flushes_and_says_what_to_do(bench: Bench) -> None:
    assert bench.write(0, 8 * KIB) == 0
    assert bench.flush() == 0
    assert bench.write(FRESH, 8 * KIB) == 0
    rule = bench.faults.add("sync", DISK, error=errno.EIO)
    assert bench.flush() == NBD_EIO
    assert rule.hits == 1
    bench.faults.heal()
    assert bench.flush() == NBD_EIO, "no later sync of this file proves anything"
    assert bench.write(0, 4 * KIB, flags=FUA) == NBD_EIO
    assert bench.said().count("stop capture and start it again") == 1, "somebody has to know what to do now"
    bench.check_recovery()
    bench.start()
    assert bench.write(FRESH, 8 * KIB) == 0
    assert bench.flush() == 0
    bench.check_cycle()


@pytest.mark.parametrize("bench", ["vhdx", "vhd"], indirect=True)
@pytest.mark.parametrize("operation", ["resize", "allocate"])
def test_disk_that_cannot_grow_is_told_to_the_guest(bench: Bench, operation: str) -> None:
    rule = bench.faults.add(operation, DISK, error=errno.ENOSPC, count=None)
    for step in range(4):
        error = bench.write(FRESH + step * 2 * MIB, 8 * KIB)
        assert error == (NBD_ENOSPC if rule.hits else 0)
    assert bench.write(0, 8 * KIB) == 0
    assert bench.flush() == 0
    bench.faults.heal()
    assert bench.write(FRESH, 8 * KIB) == 0
    bench.check_cycle()


@pytest.mark.parametrize(
    ("operations", "pattern"),
    [
        ("open", LOG),
        ("write", LOG),
        ("sync", LOG),
        ("rename", "*/logs/*"),
        ("sync", "*/logs"),
    ],
)
def test_cut_that_fails_is_made_up_for_by_the_next(bench: Bench, operations: str, pattern: str) -> None:
    """Strike each of the calls that a cut makes on logs and their folder, first, second and third."""
    for skip, error in enumerate((errno.EIO, errno.ENOSPC, errno.EIO)):
        for offset in (0, 64 * KIB, FRESH, FRESH + MIB):
            assert bench.write(offset + skip * 8 * KIB, 8 * KIB) == 0
        assert bench.client.ask(TRIM, 9900 * SECTOR, (skip + 1) * MIB)[0] == 0
        bench.faults.add(operations, pattern, error=error, skip=skip)
        answer = bench.cut()
        bench.faults.heal()
        assert bench.write(FRESH + 2 * MIB, 64 * KIB) == 0, answer
        assert bench.flush() == 0
    bench.check_cycle()


@kinds
def test_kill_of_a_guest_that_never_flushes_is_known_of_after_many_cuts(bench: Bench) -> None:
    """A cut may hold what the disk loses: until the disk is flushed, tracking must not forget it."""
    assert bench.write(EMPTY, 64 * KIB) == 0
    for _ in range(8):
        answer = bench.cut()
        assert "error" not in answer, answer
        assert bench.write(0, 4 * KIB) == 0
    bench.check_recovery()


def test_cut_whose_reading_fails_is_made_up_for_by_the_next(folder: Path, library: Path) -> None:
    """Without a log the cut is made of what it reads and writes; a guest that waits for it goes on."""
    bench = Bench(folder, library, "raw", log_budget_bytes=0)
    with contextlib.closing(bench.client.socket), bench.host:
        for offset in range(0, 30 * MIB, 3 * MIB):
            assert bench.write(offset, 128 * KIB) == 0
        rule = bench.faults.add("write", LOG, error=errno.ENOSPC, skip=3)
        assert "error" in bench.cut()
        assert rule.hits == 1
        for offset in range(MIB, 30 * MIB, 3 * MIB):
            assert bench.write(offset, 64 * KIB) == 0
        assert bench.flush() == 0
        bench.check_cycle()


@pytest.mark.parametrize("kind", ["vhdx", "raw", "vhd"])
def test_faults_at_random_places_lose_nothing(folder: Path, library: Path, seed: int, kind: Format) -> None:
    """Strike now here, now there, under load: whatever the guest was told, the cut is what the disks hold."""
    rng = random.Random(f"{seed}/{kind}")
    operations = ("write", "write", "resize", "open", "rename", "allocate")
    patterns = (DISK, "*/1.*", LOG, JOURNAL, "*/journal/1.ij", "*/logs/*")
    bench = Bench(folder, library, kind)
    with contextlib.closing(bench.client.socket), bench.host, contextlib.ExitStack() as stack:
        connections = bench.host.connections(4)
        for _, connection in connections:
            stack.callback(connection.close)
        workload = Workload(seed, [size // SECTOR for size in SIZES], HOT, first_number=FIRST_NUMBER)
        workload.model = [base.copy() for base in bench.scene.base]
        struck, cut = 0, functools.partial(bench.cut)
        for _ in range(20):
            rule = bench.faults.add(
                rng.choice(operations),
                rng.choice(patterns),
                error=rng.choice((errno.EIO, errno.ENOSPC)),
                skip=rng.randrange(3),
                count=rng.choice((1, 1, 2, 5)),
            )
            workload.run(connections, 40, at={20: cut})
            rule.disarm()
            struck += rule.hits
        assert struck > 2
        stack.close()
        bench.check_cycle()
