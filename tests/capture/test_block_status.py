"""What block status tells: never a hole where data may be, and at the price of one walk over the disk."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hvreplica.capture.block_status import HOLE_BYTES_MIN, block_states
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from hvreplica.formats.nbd import BlockState
from hvreplica.units import GIB, KIB, MIB
from tests.support.capture_host import Host, Settings
from tests.support.tools import run_tool

if TYPE_CHECKING:
    import random
    from pathlib import Path

    import numpy.typing as npt

_HOLE = int(BlockState.HOLE | BlockState.ZERO)


class MappedDisk:
    """A disk that knows nothing but where its data is, and how often it was asked for what."""

    def __init__(self, ranges: list[tuple[int, int]], virtual_bytes: int) -> None:
        self.rows = np.array(ranges, np.int64).reshape(-1, 2)
        self.virtual_bytes = virtual_bytes
        self.asked = 0
        self.told = 0

    def extents(self, start: int, end: int) -> npt.NDArray[np.int64]:
        low = np.maximum(self.rows[:, 0], start)
        high = np.minimum(self.rows.sum(axis=1), min(end, self.virtual_bytes))
        found = np.column_stack((low, high - low))[high > low]
        self.asked += 1
        self.told += len(found)
        return found


def walked(disk: MappedDisk, *, only_one: bool, question_bytes: int = 2 * GIB) -> npt.NDArray[np.int64]:
    """Return all states of a disk as a client comes to know them: (length, state)."""
    offset, parts = 0, []
    while offset < disk.virtual_bytes:
        length = min(question_bytes, disk.virtual_bytes - offset)
        rows = block_states(disk, offset, length, only_one=only_one)
        assert len(rows) == 1 or not only_one
        assert (rows[:, 0] > 0).all()
        assert rows[:, 0].sum() <= length
        parts.append(rows)
        offset += int(rows[:, 0].sum())
    return np.concatenate(parts)


def in_sectors(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the state of each 512 bytes."""
    states: npt.NDArray[np.int64] = np.repeat(rows[:, 1], rows[:, 0] // 512)
    return states


@pytest.mark.parametrize("only_one", [True, False])
@pytest.mark.parametrize("question_bytes", [2 * GIB, 96 * KIB])
def test_block_status_of_any_map_calls_no_data_a_hole(
    rng: random.Random, *, only_one: bool, question_bytes: int
) -> None:
    at, ranges = 0, []
    while at < 48 * MIB:
        at += rng.choice([512, 4096, HOLE_BYTES_MIN - 512, HOLE_BYTES_MIN, 3 * MIB]) * rng.randint(1, 2)
        length = rng.choice([512, 4096, MIB]) * rng.randint(1, 3)
        ranges.append((at, length))
        at += length + 512
    disk = MappedDisk(ranges, at + rng.choice([0, 512, MIB]))
    states = in_sectors(walked(disk, only_one=only_one, question_bytes=question_bytes))
    assert len(states) == disk.virtual_bytes // 512
    data = np.zeros(len(states), bool)
    for offset, length in ranges:
        data[offset // 512 : (offset + length) // 512] = True
    assert not states[data].any()
    if question_bytes == 2 * GIB:
        ends = [0, *(offset + length for offset, length in ranges), disk.virtual_bytes]
        starts = [*(offset for offset, _ in ranges), disk.virtual_bytes]
        for end, start in zip(ends, starts, strict=False):
            if start - end >= HOLE_BYTES_MIN:
                assert (states[end // 512 : start // 512] == _HOLE).all(), (end, start)


def test_block_status_of_fragments_looks_at_each_a_few_times() -> None:
    step = HOLE_BYTES_MIN + 4096
    disk = MappedDisk([(index * step, 4096) for index in range(5000)], 5000 * step)
    assert len(walked(disk, only_one=True)) == 10_000
    assert disk.told < 40 * 5000
    assert disk.asked < 2 * 10_000


def test_block_status_of_a_long_hole_asks_seldom() -> None:
    disk = MappedDisk([(1 << 40, 4096)], (1 << 40) + 4096)
    walked(disk, only_one=True)
    assert disk.asked < 8 * 512 + 8


def test_qemu_compares_a_fragmented_export_in_time(tmp_path: Path, rng: random.Random) -> None:
    path, socket = tmp_path / "disk.vhdx", tmp_path / "n.sock"
    create_disk(OS_FILES, path, virtual_bytes=64 * MIB, clock=SYSTEM)
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        for page in rng.sample(range(16_384), 5000):
            disk.write(rng.randbytes(4096), page * 4096)
    (tmp_path / "copy.vhdx").write_bytes(path.read_bytes())
    with Host(Settings(str(tmp_path / "state"), str(socket), [str(path)])):
        began_s = time.monotonic()
        uri = f"nbd+unix:///0?socket={socket}"
        run_tool("qemu-img", "compare", "-f", "vhdx", "-F", "raw", tmp_path / "copy.vhdx", uri)
        run_tool("qemu-img", "map", "-f", "raw", "--output=json", uri)
        # Each of the 5,000 extents cost a walk over the disk once, and all together minutes.
        assert time.monotonic() - began_s < 20
