"""Disks whose sectors each hold the number of the step that wrote them, and what a power cut may make of
them.

The state of a disk after a step is one byte per sector, and a torn, stale or foreign sector shows at once.
Zeros are the number 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import random

    from hvreplica.disk import Disk
    from tests.support.faultfile import FaultFiles

SECTOR_BYTES = 512


@dataclass
class History:
    """The disk after each step, one number per sector."""

    states: list[np.ndarray]

    def step(self, first: int, count: int, value: int) -> None:
        """Add the state after `count` sectors from `first` on got the number `value`."""
        state = self.states[-1].copy()
        state[first : first + count] = value
        self.states.append(state)


def read_numbers(disk: Disk) -> np.ndarray:
    """Return the number in each sector; fails if a sector is not uniform, which no step wrote."""
    buffer = bytearray(disk.virtual_bytes)
    disk.read_into(buffer, 0)
    sectors = np.frombuffer(buffer, np.uint8).reshape(-1, SECTOR_BYTES)
    torn = np.flatnonzero((sectors != sectors[:, :1]).any(axis=1))
    assert not len(torn), f"sector {torn[0]} is torn"
    return sectors[:, 0]


def perform(
    disk: Disk, files: FaultFiles, history: History, rng: random.Random, *, steps: int, unit_bytes: int
) -> None:
    """Write, zero, publish and flush at random; every step is noted when it returned.

    unit_bytes: some steps zero whole multiples of it.
    """
    count_max = disk.virtual_bytes // SECTOR_BYTES
    for _ in range(steps):
        number = len(history.states)
        kind = rng.choices(["write", "many", "zero", "units", "publish", "flush"], [6, 4, 2, 2, 6, 4])[0]
        first = rng.randrange(count_max - 1)
        count = min(rng.choice([1, 3, 8, 200]), count_max - first)
        if kind == "write":
            history.step(first, count, number)
            disk.write(bytes([number]) * (count * SECTOR_BYTES), first * SECTOR_BYTES)
        elif kind == "many":
            _write_many(disk, history, sorted(rng.sample(range(0, count_max - 4, 4), 5)))
        elif kind == "zero":
            history.step(first, count, 0)
            disk.write_zeroes(first * SECTOR_BYTES, count * SECTOR_BYTES)
        elif kind == "units":
            start = rng.randrange(-(-disk.virtual_bytes // unit_bytes)) * unit_bytes
            end = min(start + rng.randint(1, 2) * unit_bytes, disk.virtual_bytes)
            history.step(start // SECTOR_BYTES, (end - start) // SECTOR_BYTES, 0)
            disk.write_zeroes(start, end - start)
        elif kind == "publish":
            disk.publish()
            files.note("published", len(history.states) - 1)
        else:
            disk.flush()
            files.acknowledge(len(history.states) - 1)
        files.note("step", len(history.states) - 1)


def _write_many(disk: Disk, history: History, starts: list[int]) -> None:
    number = len(history.states)
    state = history.states[-1].copy()
    for start in starts:
        state[start : start + 4] = number
    history.states.append(state)
    extents = np.array([[start, 4] for start in starts], np.int64) * SECTOR_BYTES
    disk.write_extents(extents, bytes([number]) * (len(starts) * 4 * SECTOR_BYTES))


def check_numbers(actual: np.ndarray, world: FaultFiles, history: History, *, killed: bool = False) -> None:
    """Fail unless each sector holds a number that it had since the last flush that was acknowledged.

    killed: the process died, but not the machine; so what it had published counts like what it had flushed.
    """
    flushed = world.acknowledged[-1] if world.acknowledged else 0
    if killed:
        flushed = max(flushed, world.last_note("published", 0))
    # The step after the last noted one may have been under way.
    possible = history.states[flushed : world.last_note("step", 0) + 2]
    fits = np.zeros(len(actual), bool)
    for state in possible:
        fits |= actual == state
    wrong = np.flatnonzero(~fits)
    assert not len(wrong), (
        f"{world.story}: sector {wrong[0]} holds {actual[wrong[0]]}, possible "
        f"{sorted({int(state[wrong[0]]) for state in possible})}"
    )
