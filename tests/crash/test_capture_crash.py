"""A power cut anywhere in the life of a captured VM: no flushed write is lost, and no change is unknown to tracking.

A real process serves two disks to clients while everything that it does to files is recorded. Each world that a cut
may leave is laid out as real files, recovered, and compared with what the clients had been answered before the cut.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.disk.check import check_disk
from hvreplica.errors import HvReplicaError
from hvreplica.files import OS_FILES
from hvreplica.hrl import apply_log
from hvreplica.tracking.journal import read_regions
from hvreplica.units import KIB, MIB
from tests.support.capture_host import Host, Settings, abandon_machine, open_machine, read_cuts, record_cut
from tests.support.crash import crash_states
from tests.support.nbd_client import SECTOR, Replies, Workload, content, lost, numbers_of
from tests.support.recorder import build, recording
from tests.support.replay import Note, Recording, lay_out, photograph, read_recording

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from hvreplica.capture.machine import Machine
    from hvreplica.files import BlockFile
    from tests.support.memfiles import FaultFiles
    from tests.support.sparse import SparseBytes

DEEP = os.environ.get("HVREPLICA_PROFILE") == "deep"
ROUNDS = range(20 if DEEP else 1)
GRAIN_SECTORS = 64 * KIB // SECTOR
SIZES = (40 * MIB + 3 * SECTOR * 8, 24 * MIB)
HOT = ((0, 2048), (9000, 12000), (40_000, 43_000), (81_000, 81_944))  # in sectors
FIRST_NUMBER = 1000  # of the workload; what stood there before has smaller ones
CYCLE_EVERY = 10


@dataclass
class Scene:
    """Two disks whose state is settled, on a file system that is fast to sync where there is one.

    base: for each disk, the request number of each sector at the last cut before the recording.
    """

    folder: Path
    kind: str
    settings: Settings
    base: list[NDArray[np.int64]] = field(default_factory=list)
    logs: dict[str, tuple[SparseBytes, list[tuple[int, NDArray[np.int64]]]]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """What is recorded and laid out."""
        return self.folder / "root"

    @property
    def state(self) -> Path:
        return Path(self.settings.state)

    @property
    def paths(self) -> list[Path]:
        return [Path(path) for path in self.settings.disks]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory where the system has one: a state takes milliseconds there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    name = Path(tempfile.mkdtemp(prefix="hvreplica-", dir=memory))
    yield name
    shutil.rmtree(name)


def make_scene(folder: Path, kind: str, **settings: Any) -> Scene:
    """Make disks that are partly filled, captured once, cut and stopped."""
    (folder / "root").mkdir()
    paths = [folder / "root" / f"{index}.{kind.split(maxsplit=1)[0]}" for index in range(len(SIZES))]
    scene = Scene(
        folder,
        kind,
        Settings(
            str(folder / "root" / "state"), str(folder / "socket"), [str(path) for path in paths], **settings
        ),
    )
    for path, size in zip(paths, SIZES, strict=True):
        options: dict[str, Any] = {"block_bytes": MIB} if kind == "vhdx" else {}
        create_disk(OS_FILES, path, virtual_bytes=size, format=kind, clock=SYSTEM, **options)
        base = np.zeros(size // SECTOR, np.int64)
        with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
            for number, (sector, count) in enumerate([(0, 1500), (9900, 300), (40_500, 700)], 1):
                disk.write(content(number, sector, count), sector * SECTOR)
                base[sector : sector + count] = number
        scene.base.append(base)
    machine = open_machine(scene.settings)
    machine.settle(machine.cut(list(read_cuts(scene.state).previous(len(paths)))))
    machine.recycle((scene.state / "logs").iterdir())
    machine.close()
    return scene


def make_workload(scene: Scene, seed: int, *, first_number: int = FIRST_NUMBER) -> Workload:
    workload = Workload(seed, [size // SECTOR for size in SIZES], HOT, first_number=first_number)
    workload.model = [base.copy() for base in scene.base]
    return workload


def run_recorded(scene: Scene, library: Path, workload: Workload, count: int) -> tuple[Recording, list[Note]]:
    """Run the workload over two connections to each disk, with cuts among it; return what was recorded."""
    before = photograph(scene.root)
    (scene.folder / "trace").unlink(missing_ok=True)
    environment = recording(library, trace=scene.folder / "trace", roots=[scene.root])
    with Host(scene.settings, environment) as host, contextlib.ExitStack() as stack:
        connections = host.connections(4)
        for _, connection in connections:
            stack.callback(connection.close)

        def tell(order: str) -> None:
            step = workload.step
            answer = host.tell(order)
            assert "error" not in answer, answer
            if order == "cut":
                workload.cut_steps.append(step)

        fifth = count // 5
        orders = (
            (fifth, "cut"),
            (2 * fifth, "cut lost"),
            (3 * fifth, "cut"),
            (3 * fifth + 20, "cut"),
            (4 * fifth, "cut"),
        )
        workload.run(connections, count, at={at: functools.partial(tell, order) for at, order in orders})
        stack.close()
        host.stop()
    kept = read_recording(scene.folder / "trace", before)
    assert kept.differences(photograph(scene.root)) == []
    streams: dict[int, Replies] = {}
    notes = []
    for sent in kept.sends:
        if sent.socket not in streams:
            streams[sent.socket] = Replies(workload.read_bytes)
        for number, error in streams[sent.socket].feed(sent.data):
            if not error and number in workload.requests:
                notes.append(Note(sent.position, "acknowledged", number))
    answered = {number for number, request in workload.requests.items() if not request.error}
    assert {note.value for note in notes} == answered
    return kept, notes


def disk_numbers(path: Path) -> NDArray[np.int64]:
    """Return the request that wrote each sector of a disk, through a session that changes nothing."""
    with open_disk(OS_FILES, path, clock=SYSTEM) as disk:
        numbers = np.zeros(disk.virtual_bytes // SECTOR, np.int64)
        for offset, length in disk.extents(0, disk.virtual_bytes).tolist():
            data = bytearray(length)
            disk.read_into(data, offset)
            sector = offset // SECTOR
            numbers[sector : sector + length // SECTOR] = numbers_of(data, sector)
    return numbers


def cut_numbers(scene: Scene, world: FaultFiles | None = None) -> list[NDArray[np.int64]]:
    """Return what the disks held at the last cut that is durable: the base, and the logs of recorded cuts.

    world: what the folders were laid out from, so that a log that is as before need not be read again.
    """
    held = [base.copy() for base in scene.base]
    tree = world.trace().start if world is not None else None
    for cut in read_cuts(scene.state).cuts:
        for index, _, name in cut:
            path = scene.state / "logs" / name
            known = tree.contents[tree.names[path]] if tree is not None and path in tree.names else None
            for sector, numbers in log_numbers(scene, index, path, known):
                held[index][sector : sector + len(numbers)] = numbers
    return held


class NumberedDisk:
    """Takes what a log is applied to, as the requests of its sectors."""

    logical_sector_bytes = SECTOR

    def __init__(self, virtual_bytes: int) -> None:
        self.virtual_bytes = virtual_bytes
        self.runs: list[tuple[int, NDArray[np.int64]]] = []

    def copy_extents(self, source: BlockFile, offsets: NDArray[Any], extents: NDArray[Any]) -> None:
        for log_offset, (disk_offset, length) in zip(offsets.tolist(), extents.tolist(), strict=True):
            sector = disk_offset // SECTOR
            self.runs.append((sector, numbers_of(source.read(log_offset, length), sector)))

    def write_zeroes(self, disk_offset: int, length: int) -> None:
        self.runs.append((disk_offset // SECTOR, np.zeros(length // SECTOR, np.int64)))


def log_numbers(
    scene: Scene, index: int, path: Path, known: SparseBytes | None
) -> list[tuple[int, NDArray[np.int64]]]:
    """Return what a closed log brings, checked with all its checksums."""
    cached = scene.logs.get(path.name)
    if cached is not None and known is not None and known.equals(cached[0]):
        return cached[1]
    disk = NumberedDisk(SIZES[index])
    apply_log(OS_FILES, path, disk)
    if known is not None:
        scene.logs[path.name] = known, disk.runs
    return disk.runs


def named_grains(machine: Machine, index: int) -> NDArray[np.bool_]:
    """Return which grains tracking counts as changed since the last cut."""
    bits = np.unpackbits(machine._tracked[index].track.epoch.dirty, bitorder="little")
    return bits[: -(-SIZES[index] // (GRAIN_SECTORS * SECTOR))].astype(np.bool_)


def changed_grains(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
    padding = -len(one) % GRAIN_SECTORS
    different = np.pad(one != other, (0, padding))
    return different.reshape(-1, GRAIN_SECTORS).any(axis=1)


class Judge:
    """Holds each world against what the clients were answered."""

    def __init__(self, scene: Scene, workloads: list[Workload], *, cuts_before: int = 0) -> None:
        """workloads: oldest first, each with greater numbers than the one before. cuts_before: the last one."""
        self.scene = scene
        self.workloads = workloads
        self.zeroed = [
            np.maximum.reduce([workload.zeroed(index) for workload in workloads])
            for index in range(len(SIZES))
        ]
        self.count = 0
        self.cuts_before = cuts_before
        self.cut_floors: dict[tuple[int, int], NDArray[np.int64]] = {}

    def _floor(self, world: FaultFiles, index: int) -> NDArray[np.int64]:
        floors = [
            workload.floor(index, [number for number in world.acknowledged if number in workload.requests])
            for workload in self.workloads
        ]
        return np.maximum.reduce([*floors, self.scene.base[index]])

    def hold_all(self, worlds: Iterable[FaultFiles]) -> None:
        for world in worlds:
            self.hold(world)

    def hold(self, world: FaultFiles) -> None:
        """Lay a world out, recover it, and fail on whatever is not as promised."""
        scene, story = self.scene, world.story
        lay_out(world, [scene.root])
        floors = [self._floor(world, index) for index in range(len(SIZES))]
        before = [disk_numbers(path) for path in scene.paths]
        for index, numbers in enumerate(before):
            gone = lost(numbers, floors[index], self.zeroed[index])
            assert not len(gone), (
                f"disk {index}, sector {gone[0]}: is of request {numbers[gone[0]]}, "
                f"must be of {floors[index][gone[0]]} or newer; {story}"
            )
        cut = cut_numbers(scene, world)
        self._hold_cut(cut, story)
        journals = [
            read_regions(OS_FILES, scene.state / "journal" / f"{index}.ij")[1] for index in range(len(SIZES))
        ]
        machine = open_machine(scene.settings)
        for index, numbers in enumerate(before):
            changed = changed_grains(numbers, cut[index])
            unknown = np.flatnonzero(changed & ~named_grains(machine, index))
            assert not len(unknown), f"disk {index}, grain {unknown[0]} is unknown to tracking; {story}"
            in_journal = np.zeros(len(changed), np.bool_)
            for offset, length in journals[index].tolist():
                first = offset // (GRAIN_SECTORS * SECTOR)
                in_journal[first : first + -(-length // (GRAIN_SECTORS * SECTOR))] = True
            unknown = np.flatnonzero(changed & ~in_journal)
            assert not len(unknown), f"disk {index}, grain {unknown[0]} is not in the journal; {story}"
        self.count += 1
        if self.count % CYCLE_EVERY == 0:
            self._hold_cycle(machine, before, story)
        else:
            abandon_machine(machine)

    def _hold_cut(self, cut: list[NDArray[np.int64]], story: str) -> None:
        """Make sure that the last recorded cut holds all that was answered before it was asked for."""
        workload = self.workloads[-1]
        number = len(read_cuts(self.scene.state).cuts) - self.cuts_before
        if number <= 0:
            return
        for index, numbers in enumerate(cut):
            if (number, index) not in self.cut_floors:
                floor = workload.floor_before(index, workload.cut_steps[number - 1])
                self.cut_floors[number, index] = np.maximum(floor, self.scene.base[index])
            gone = lost(numbers, self.cut_floors[number, index], self.zeroed[index])
            assert not len(gone), (
                f"disk {index}, sector {gone[0]}: request {self.cut_floors[number, index][gone[0]]} "
                f"is not in the cut, only {numbers[gone[0]]}; {story}"
            )

    def _hold_cycle(self, machine: Machine, before: list[NDArray[np.int64]], story: str) -> None:
        """Make sure that the next cut takes what is behind to what the disks hold, and a clean stop leaves clean disks."""
        record_cut(machine, self.scene.settings)
        machine.close()
        for index, numbers in enumerate(cut_numbers(self.scene)):
            wrong = np.flatnonzero(numbers != before[index])
            assert not len(wrong), f"disk {index}, sector {wrong[0]} is not as in the logs; {story}"
        for path, numbers in zip(self.scene.paths, before, strict=True):
            report = check_disk(OS_FILES, path, clock=SYSTEM)
            assert report.status == 0, (report.codes(), story)
            assert (disk_numbers(path) == numbers).all(), story


# kind of disk, settings of capture, states in one round; deep takes more of both. In all, more than 2,000 and 100,000.
CASES = {
    "vhdx": ("vhdx", {}, 700, 1800),
    "raw": ("raw", {}, 450, 1000),
    "vhd": ("vhd", {}, 400, 1000),
    "without a log": ("vhdx", {"log_budget_bytes": 0}, 300, 800),
    "log that is soon full": ("raw", {"log_budget_bytes": MIB, "write_bytes_max": 16 * KIB}, 300, 800),
}


@pytest.mark.parametrize("round_number", ROUNDS)
@pytest.mark.parametrize("case", CASES)
def test_power_cut_anywhere_keeps_every_promise(
    folder: Path, library: Path, seed: int, case: str, round_number: int
) -> None:
    kind, settings, few, many = CASES[case]
    scene = make_scene(folder, kind, **settings)
    workload = make_workload(scene, seed + round_number)
    kept, notes = run_recorded(scene, library, workload, 400)
    judge = Judge(scene, [workload])
    limit = many if DEEP else few
    for _, world in crash_states(kept.trace(notes), seed=seed + round_number, limit=limit):
        judge.hold(world)
    assert judge.count > limit * 0.8


@pytest.mark.parametrize("round_number", ROUNDS)
def test_power_cut_during_recovery_and_after_it_keeps_every_promise(
    folder: Path, library: Path, seed: int, round_number: int
) -> None:
    """Lose power in one run, recover and serve again, and lose power once more."""
    scene = make_scene(folder, "vhdx")
    first = make_workload(scene, seed + round_number)
    kept, notes = run_recorded(scene, library, first, 120)
    worlds = [world for _, world in crash_states(kept.trace(notes), seed=seed, limit=200)]
    rng = random.Random(seed + round_number)
    limit = 300 if DEEP else 60
    for number, world in enumerate(rng.sample(worlds, 4)):
        lay_out(world, [scene.root])
        second = make_workload(scene, seed + number, first_number=2 * FIRST_NUMBER)
        cuts_before = len(read_cuts(scene.state).cuts)
        second.model = [disk_numbers(path) for path in scene.paths]
        kept, notes = run_recorded(scene, library, second, 40)
        notes += [Note(0, "acknowledged", number) for number in world.acknowledged]
        judge = Judge(scene, [first, second], cuts_before=cuts_before)
        for _, again in crash_states(kept.trace(notes), seed=seed + number, limit=limit):
            again.story = f"{world.story}; then {again.story}"
            judge.hold(again)
        assert judge.count > limit * 0.8


def test_cut_is_one_instant_of_both_disks(folder: Path, library: Path, seed: int) -> None:
    """What a cut holds of one disk was not asked for before the other disk's part was answered and left out."""
    for round_number in range(20 if DEEP else 3):
        place = folder / str(round_number)
        place.mkdir()
        scene = make_scene(place, "vhdx")
        workload = make_workload(scene, seed + round_number)
        run_recorded(scene, library, workload, 400)
        cuts = read_cuts(scene.state).cuts
        assert len(cuts) > 2
        held = [base.copy() for base in scene.base]
        for cut in cuts:
            for index, _, name in cut:
                for sector, numbers in log_numbers(scene, index, scene.state / "logs" / name, None):
                    held[index][sector : sector + len(numbers)] = numbers
            newest = max(int(numbers.max()) for numbers in held)
            issued = workload.requests[newest].issued if newest in workload.requests else 0
            for index, numbers in enumerate(held):
                floor = np.maximum(workload.floor_before(index, issued), scene.base[index])
                gone = lost(numbers, floor, workload.zeroed(index))
                assert not len(gone), (
                    f"the cut holds request {newest}, but sector {gone[0]} of disk {index} is of request "
                    f"{numbers[gone[0]]}, not {floor[gone[0]]}, which was answered before that was sent"
                )


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ("journal is not synced", "unknown to tracking"),
        ("closed log is not synced", "log"),
        ("name of a closed log is not synced", "log"),
        ("flush is not done", "must be of"),
        ("zeroes are not tracked", "is not in the cut"),
        ("cut given back is forgotten", "is not in the cut|unknown to tracking"),
    ],
)
def test_planted_mistake_is_found(folder: Path, library: Path, seed: int, mistake: str, found: str) -> None:
    """Without this the tests above would prove nothing."""
    scene = make_scene(folder, "raw", mistake=mistake)
    workload = make_workload(scene, seed)
    kept, notes = run_recorded(scene, library, workload, 400)
    judge = Judge(scene, [workload])
    worlds = (world for _, world in crash_states(kept.trace(notes), seed=seed, limit=400))
    with pytest.raises((AssertionError, HvReplicaError, OSError), match=found):
        judge.hold_all(worlds)
