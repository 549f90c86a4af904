"""Two disks under capture whose content is known by the request that wrote each sector."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.hrl import apply_log
from hvreplica.units import KIB, MIB
from tests.support.capture_host import Settings, open_machine, read_cuts
from tests.support.nbd_client import SECTOR, content, numbers_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.capture.machine import Machine
    from hvreplica.disk.open import Format
    from hvreplica.files import BlockFile
    from tests.support.memfiles import FaultFiles
    from tests.support.sparse import SparseBytes

GRAIN_SECTORS = 64 * KIB // SECTOR
SIZES = (40 * MIB + 3 * SECTOR * 8, 24 * MIB)
HOT = ((0, 2048), (9000, 12000), (40_000, 43_000), (81_000, 81_944))  # in sectors: where most requests go
_CONTENTS_MAX = 32  # of each disk that are remembered
FIRST_NUMBER = 1000  # of a workload; what stood there before has smaller ones


@contextlib.contextmanager
def fast_folder(otherwise: Path) -> Iterator[Path]:
    """Give a folder in memory where the system has one, for there a sync costs nothing; else `otherwise`."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield otherwise
        return
    name = Path(tempfile.mkdtemp(prefix="hvreplica-", dir=memory))
    try:
        yield name
    finally:
        shutil.rmtree(name)


@dataclass
class Scene:
    """Two disks whose state is settled, on a file system that is fast to sync where there is one.

    base: for each disk, the request number of each sector at the last cut before the recording. logs, disks:
    what was read of contents that may come again.
    """

    folder: Path
    kind: Format
    settings: Settings
    base: list[NDArray[np.int64]] = field(default_factory=list)
    logs: dict[str, tuple[SparseBytes, list[tuple[int, NDArray[np.int64]]]]] = field(default_factory=dict)
    disks: dict[Path, list[tuple[SparseBytes, NDArray[np.int64]]]] = field(default_factory=dict)

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


def make_scene(folder: Path, kind: Format, **settings: Any) -> Scene:
    """Make disks that are partly filled, captured once, cut and stopped."""
    (folder / "root").mkdir()
    paths = [folder / "root" / f"{index}.{kind}" for index in range(len(SIZES))]
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


def world_numbers(scene: Scene, world: FaultFiles, path: Path) -> NDArray[np.int64]:
    """Return disk_numbers() of a disk that is laid out as in `world`.

    Most worlds have one of few contents of a disk, and that one need not be read again.
    """
    tree = world.trace().start
    content = tree.contents[tree.names[path]]
    known = scene.disks.setdefault(path, [])
    for place, (held, numbers) in enumerate(known):
        if content.equals(held):
            known.insert(0, known.pop(place))
            return numbers
    known.insert(0, (content, disk_numbers(path)))
    del known[_CONTENTS_MAX:]
    return known[0][1]


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
    different = np.pad(one != other, (0, padding)).reshape(-1, GRAIN_SECTORS)
    return np.asarray(different.any(axis=1), np.bool_)
