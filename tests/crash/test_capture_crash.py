"""A power cut anywhere in the life of a captured VM: no flushed write is lost, and no change is unknown to tracking.

A real process serves two disks to clients while everything that it does to files is recorded. Each world that a cut
may leave is laid out as real files, recovered, and compared with what the clients had been answered before the cut.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk.check import check_disk
from hvreplica.errors import HvReplicaError
from hvreplica.files import OS_FILES
from hvreplica.tracking.journal import read_regions
from hvreplica.units import KIB, MIB
from tests.support.capture_host import Host, abandon_machine, open_machine, read_cuts, record_cut
from tests.support.capture_scene import (
    FIRST_NUMBER,
    GRAIN_SECTORS,
    HOT,
    SIZES,
    Scene,
    changed_grains,
    cut_numbers,
    disk_numbers,
    fast_folder,
    log_numbers,
    make_scene,
    named_grains,
    world_numbers,
)
from tests.support.crash import crash_states
from tests.support.nbd_client import SECTOR, Replies, Taste, Workload, lost
from tests.support.recorder import build, recording
from tests.support.replay import Note, Recording, lay_out, photograph, read_recording

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from hvreplica.capture.machine import Machine
    from tests.support.memfiles import FaultFiles

DEEP = os.environ.get("HVREPLICA_PROFILE") == "deep"
ROUNDS = range(20 if DEEP else 1)
CYCLE_EVERY = 10 if DEEP else 20  # a cycle takes longer than all else that is looked at


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with fast_folder(tmp_path) as place:
        yield place


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("recorder"))


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
        before = [world_numbers(scene, world, path) for path in scene.paths]
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
    "vhdx": ("vhdx", {}, 420, 1800),
    "raw": ("raw", {}, 440, 1000),
    "vhd": ("vhd", {}, 400, 1000),
    "without a log": ("vhdx", {"log_budget_bytes": 0}, 290, 800),
    "guest that never flushes": ("vhdx", {}, 290, 800),
    "log that is soon full": ("raw", {"log_budget_bytes": MIB, "write_bytes_max": 16 * KIB}, 290, 800),
}


@pytest.mark.parametrize("round_number", ROUNDS)
@pytest.mark.parametrize("case", CASES)
def test_power_cut_anywhere_keeps_every_promise(
    folder: Path, library: Path, seed: int, case: str, round_number: int
) -> None:
    kind, settings, few, many = CASES[case]
    scene = make_scene(folder, kind, **settings)
    workload = make_workload(scene, seed + round_number)
    if case == "guest that never flushes":
        workload.taste = Taste(flush=0, fua=0)
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
        ("journal is not synced", "unknown to tracking|is not in the journal"),
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
