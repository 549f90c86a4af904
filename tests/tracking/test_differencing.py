"""The log of a differencing disk makes its base read as the child, for any history, chain, size and format."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.disk import create_disk, open_disk, resize_disk
from hvreplica.disk.chain import layers
from hvreplica.disk.disk import Stretch
from hvreplica.files import OS_FILES
from hvreplica.hrl import LogWriter, apply_log, dump_entries, verify_log
from hvreplica.tracking.differencing import DifferencingDisk, _own_ranges
from hvreplica.units import KIB, MIB
from tests.disk.test_merge import SIZE, chain, make, read
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles
from tests.support.numbered import SECTOR_BYTES, read_numbers
from tests.support.tools import run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem

Format = Literal["vhd", "vhdx"]
FOLDER = Path("/vm")
LOG = FOLDER / "a.hrl"
GRAIN_SECTORS = 8
BASE_SECTORS = 3 * MIB // SECTOR_BYTES + 5 * GRAIN_SECTORS

places = st.integers(0, 2 * BASE_SECTORS)
counts = st.sampled_from([1, 7, 8, 128, 1024, 2048, 3000])
steps = st.lists(st.tuples(st.sampled_from(["write", "again", "zeros", "zero"]), places, counts), max_size=6)
growths = st.sampled_from([0, 0, 0, 1, 500, -1, -200])


def log_of(files: FileSystem, disk: Disk, base: Disk, path: Path = LOG, **options: Any) -> int:
    """Write the log and return the changed bytes; what was read is told from one thread."""
    read_bytes: list[int] = []
    with LogWriter.create(
        files,
        path,
        log_id=FakeClock(seed=5).guid(),
        previous_log_id=None,
        data_write_guid=disk.data_write_guid,
        clock=FakeClock(),
    ) as writer:
        changed = DifferencingDisk(disk, base, **options).changes_into(writer, on_read=read_bytes.append)
        assert writer.data_bytes == changed
    assert min(read_bytes, default=1) > 0
    return changed


class Layers:
    """A chain in memory and the number that each sector of each layer shows."""

    def __init__(self, format_: Format, sector_bytes: int) -> None:
        self.files = FaultFiles(FOLDER)
        self.clock = FakeClock()
        self.format = format_
        self.sector_bytes = sector_bytes
        self.paths: list[Path] = []
        self.states: list[np.ndarray] = []
        self.number = 0

    def add(self, growth: int, *, large_blocks: bool) -> None:
        below = self.states[-1] if self.states else np.zeros(BASE_SECTORS, np.uint8)
        sectors = len(below) + (growth * GRAIN_SECTORS if self.format == "vhdx" else 0)
        small = MIB if self.format == "vhdx" else 512 * KIB
        create_disk(
            self.files,
            FOLDER / f"{len(self.paths)}.{self.format}",
            virtual_bytes=sectors * SECTOR_BYTES,
            format=self.format,
            type="differencing" if self.paths else "dynamic",
            block_bytes=2 * MIB if large_blocks else small,
            logical_sector_bytes=self.sector_bytes,
            parent=self.paths[-1] if self.paths else None,
            clock=self.clock,
        )
        self.paths.append(FOLDER / f"{len(self.paths)}.{self.format}")
        state = np.zeros(sectors, np.uint8)
        shared = min(sectors, len(below))
        state[:shared] = below[:shared]
        self.states.append(state)

    def perform(self, history: list[tuple[str, int, int]]) -> None:
        state = self.states[-1]
        with open_disk(self.files, self.paths[-1], writable=True, clock=self.clock) as disk:
            for kind, first, count in history:
                unit = self.sector_bytes // SECTOR_BYTES
                first = first % len(state) // unit * unit
                count = min(-(-count // unit) * unit, len(state) - first)
                self.number = self.number % 255 + 1
                if kind != "again":
                    state[first : first + count] = self.number if kind == "write" else 0
                if kind == "zero":
                    disk.write_zeroes(first * SECTOR_BYTES, count * SECTOR_BYTES)
                else:
                    octets = np.repeat(state[first : first + count], SECTOR_BYTES)
                    disk.write(octets.data, first * SECTOR_BYTES)

    def apply_to_base(self, depth: int) -> np.ndarray:
        """Grow the layer `depth` below the top to the top's size, apply the log, return the numbers it shows."""
        path = self.paths[-1 - depth]
        if len(self.states[-1 - depth]) < len(self.states[-1]):
            resize_disk(self.files, path, len(self.states[-1]) * SECTOR_BYTES, clock=self.clock, force=True)
        with open_disk(self.files, path, writable=True, clock=self.clock) as disk:
            apply_log(self.files, LOG, disk)
            disk.flush()
            return read_numbers(disk)


@given(data=st.data(), format_=st.sampled_from(["vhdx", "vhd"]), skip_equal=st.booleans())
def test_the_log_makes_the_base_read_as_the_child(
    data: st.DataObject, format_: Format, *, skip_equal: bool
) -> None:
    sector_bytes = data.draw(st.sampled_from([512, 4096])) if format_ == "vhdx" else 512
    chained = Layers(format_, sector_bytes)
    count = data.draw(st.integers(2, 4))
    for _ in range(count):
        growth = data.draw(growths) if chained.paths else 0
        chained.add(growth, large_blocks=data.draw(st.booleans()))
        chained.perform(data.draw(steps))
    depth = data.draw(st.integers(1, count - 1))
    child, base = chained.states[-1], chained.states[-1 - depth]
    with open_disk(chained.files, chained.paths[-1], clock=chained.clock) as disk:
        changed = log_of(chained.files, disk, list(layers(disk))[depth], skip_equal=skip_equal)
    report = verify_log(chained.files, LOG, disk_bytes=len(child) * SECTOR_BYTES)
    assert report.data_bytes == changed
    covered = entries_of(chained.files, len(child))
    both = min(len(child), len(base))
    grown = np.zeros(len(child), np.uint8)
    grown[:both] = base[:both]
    assert covered[child != grown].all()
    if skip_equal:  # 4 KiB are told of only if something in them differs
        assert covered.sum() <= GRAIN_SECTORS * (child != grown).sum()
    shown = chained.apply_to_base(depth)
    assert (shown[: len(child)] == child).all()
    assert (shown[len(child) :] == base[len(child) :]).all()


def entries_of(files: FileSystem, sectors: int) -> np.ndarray:
    """Return how often the log tells of each sector: once at most."""
    told = np.zeros(sectors, np.int32)
    for entry in dump_entries(files, LOG):
        told[entry.disk_offset // SECTOR_BYTES : (entry.disk_offset + entry.length) // SECTOR_BYTES] += 1
    assert told.max(initial=0) <= 1
    return told.astype(bool)


def test_where_a_layer_ended_before_the_base_there_are_zeros() -> None:
    chained = Layers("vhdx", 512)
    for growth, history in ((0, [("write", 0, BASE_SECTORS)]), (-200, []), (300, [("write", 8, 8)])):
        chained.add(growth, large_blocks=False)
        chained.perform(history)
    with open_disk(chained.files, chained.paths[-1], clock=chained.clock) as disk:
        log_of(chained.files, disk, list(layers(disk))[2])
    assert entries_of(chained.files, len(chained.states[-1])).sum() == 8 + 200 * GRAIN_SECTORS
    assert (chained.apply_to_base(2) == chained.states[-1]).all()


def test_ranges_that_end_within_a_sector_become_whole_sectors_once() -> None:
    class Layer:
        virtual_bytes = 8 * SECTOR_BYTES
        parent: Any = None

        def stretches(self, start: int, end: int) -> Iterator[Stretch]:
            assert (start, end) == (0, self.virtual_bytes)
            edges = [0, 600, 700, 1500, 2500, 2550, end]
            for kind, (first, last) in zip(
                ["hole", "data", "parent", "data", "zero", "data"], itertools.pairwise(edges), strict=True
            ):
                yield Stretch(first, last - first, kind, None)  # type: ignore[arg-type]

    child, base = Layer(), Layer()
    child.parent = base
    rows = [
        (first // SECTOR_BYTES, last // SECTOR_BYTES, data) for first, last, data in _own_ranges(child, base)
    ]  # type: ignore[arg-type]
    assert rows == [(0, 1, False), (1, 2, True), (2, 5, True), (5, 8, True)]


@pytest.mark.parametrize("ending", ["vhdx", "vhd"])
@pytest.mark.parametrize("skip_equal", [False, True])
def test_other_programs_see_the_same(tmp_path: Path, ending: str, seed: int, *, skip_equal: bool) -> None:
    paths = chain(tmp_path, ending, seed=seed)
    log, name = tmp_path / "a.hrl", {"vhdx": "vhdx", "vhd": "vpc"}[ending]
    expected = tmp_path / "expected.raw"
    for depth in (1, 2):
        with open_disk(OS_FILES, paths[depth], clock=FakeClock()) as disk:
            log_of(OS_FILES, disk, list(layers(disk))[1], log, skip_equal=skip_equal)
        expected.write_bytes(read(paths[depth]))
        flat = tmp_path / f"copy of {paths[depth - 1].stem}.raw"
        flat.write_bytes(read(paths[depth - 1]))
        with open_disk(OS_FILES, flat, writable=True, clock=FakeClock()) as disk:
            apply_log(OS_FILES, log, disk)
        run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", flat, expected)
        log.unlink()
    with open_disk(OS_FILES, paths[2], clock=FakeClock()) as disk:
        log_of(OS_FILES, disk, list(layers(disk))[2], log, skip_equal=skip_equal)
    with open_disk(OS_FILES, paths[0], writable=True, clock=FakeClock()) as disk:
        apply_log(OS_FILES, log, disk)
        disk.flush()
    run_tool("qemu-img", "compare", "-f", name, "-F", "raw", paths[0], expected)


def test_what_was_written_as_it_was_is_left_out_on_request(tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    with open_disk(OS_FILES, base, writable=True, clock=FakeClock()) as disk:
        disk.write(b"old!" * (SIZE // 4), 0)
    before = read(base)
    child = make(tmp_path / "child.avhdx", parent=base, seed=2)
    with open_disk(OS_FILES, child, clock=FakeClock()) as disk:
        assert log_of(OS_FILES, disk, list(layers(disk))[1], tmp_path / "empty.hrl") == 0
    with open_disk(OS_FILES, child, writable=True, clock=FakeClock()) as disk:
        disk.write(before[MIB : 2 * MIB], MIB)  # as it was
        disk.write(b"new!" * 1024, 5 * MIB + 4096)
    for skip_equal, expected in ((False, MIB + 4096), (True, 4096)):
        log = tmp_path / f"{skip_equal}.hrl"
        with open_disk(OS_FILES, child, clock=FakeClock()) as disk:
            parent = list(layers(disk))[1]
            assert log_of(OS_FILES, disk, parent, log, skip_equal=skip_equal) == expected


def test_zeros_of_a_vast_disk_cost_nothing(tmp_path: Path) -> None:
    size = 8 << 40
    base = make(tmp_path / "base.vhdx", size=size, block_bytes=32 * MIB)
    with open_disk(OS_FILES, base, writable=True, clock=FakeClock()) as disk:
        disk.write(b"x" * 4096, 5 << 40)
    child = make(tmp_path / "child.vhdx", size=None, parent=base, block_bytes=32 * MIB)
    with open_disk(OS_FILES, child, writable=True, clock=FakeClock()) as disk:
        disk.write_zeroes(4 << 40, 2 << 40)
    log = tmp_path / "a.hrl"
    with open_disk(OS_FILES, child, clock=FakeClock()) as disk:
        changed = log_of(OS_FILES, disk, list(layers(disk))[1], log, skip_equal=True)
    assert changed == 4096
    assert [(entry.disk_offset, entry.length) for entry in dump_entries(OS_FILES, log)] == [(5 << 40, 4096)]


def test_a_failing_sink_ends_the_walk(tmp_path: Path, seed: int) -> None:
    class Full:
        def append(self, *_: object) -> None:
            raise OSError(28, "no space")

        def append_zeroes(self, *_: object) -> None:
            raise OSError(28, "no space")

    child = chain(tmp_path, "vhdx", seed=seed)[1]
    with open_disk(OS_FILES, child, clock=FakeClock()) as disk, pytest.raises(OSError, match="no space"):
        DifferencingDisk(disk, list(layers(disk))[1]).changes_into(Full(), on_read=lambda _: None)
