"""A disk under random use against a bytearray: create, write, zero, copy, flush, close, power cut, kill -9, reopen."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hvreplica.disk import create_disk, open_disk
from hvreplica.errors import HvReplicaError
from hvreplica.units import MIB
from tests.support.disks import KINDS, create_kind
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, crash_states

PATH = Path("/vm/disk.vhdx")
SECTOR = 512
SIZE = 5 * MIB + 3 * SECTOR * 8
SECTORS = SIZE // SECTOR

sectors = st.integers(0, SECTORS - 1)
counts = st.sampled_from([1, 2, 8, 100, 2048, 5000])


class DiskMachine(RuleBasedStateMachine):
    """`state` holds the number that each sector was last filled with; `olds` what it may fall back to."""

    def __init__(self) -> None:
        super().__init__()
        self.files = FaultFiles("/vm")
        self.clock = FakeClock()
        self.state = np.zeros(SECTORS, np.uint8)
        self.olds = [self.state.copy()]
        self.number = 0
        self.disk = None

    @initialize(kind=st.sampled_from([kind for kind in KINDS if kind != "raw"]))
    def create(self, kind: str) -> None:
        self.state = create_kind(self.files, PATH, kind, virtual_bytes=SIZE, clock=self.clock)
        self.olds = [self.state.copy()]
        self.files.settle()
        self.open()

    def open(self) -> None:
        self.disk = open_disk(self.files, PATH, writable=True, clock=self.clock)

    def fill(self, first: int, count: int, number: int) -> int:
        count = min(count, SECTORS - first)
        self.state[first : first + count] = number
        self.olds.append(self.state.copy())
        return count

    def next_number(self) -> int:
        self.number = self.number % 255 + 1
        return self.number

    @rule(first=sectors, count=counts)
    def write(self, first: int, count: int) -> None:
        number = self.next_number()
        count = self.fill(first, count, number)
        self.disk.write(bytes([number]) * (count * SECTOR), first * SECTOR)

    @rule(first=sectors, count=counts)
    def write_zeros_as_data(self, first: int, count: int) -> None:
        count = self.fill(first, count, 0)
        self.disk.write(bytes(count * SECTOR), first * SECTOR)

    @rule(first=sectors, count=counts)
    def write_zeroes(self, first: int, count: int) -> None:
        count = self.fill(first, count, 0)
        self.disk.write_zeroes(first * SECTOR, count * SECTOR)

    @rule(block=st.integers(0, 5), blocks=st.integers(1, 3))
    def zero_blocks(self, block: int, blocks: int) -> None:
        count = self.fill(block * 2048, blocks * 2048, 0)
        self.disk.write_zeroes(block * MIB, count * SECTOR)

    @rule(
        starts=st.lists(st.integers(0, SECTORS // 8 - 1), min_size=1, max_size=6, unique=True),
        zero=st.booleans(),
    )
    def write_many(self, starts: list[int], *, zero: bool) -> None:
        number = 0 if zero else self.next_number()
        for start in starts:
            self.state[start * 8 : start * 8 + 8] = number
        self.olds.append(self.state.copy())
        extents = np.array([[start * 8 * SECTOR, 8 * SECTOR] for start in starts], np.int64)
        self.disk.write_extents(extents, bytes([number]) * (len(starts) * 8 * SECTOR))

    @rule(first=sectors, count=counts, source=sectors)
    def copy(self, first: int, count: int, source: int) -> None:
        number = self.next_number()
        log = self.files.open(Path("/vm/log"), create=True)
        log.write(bytes([number]) * (SIZE + SECTOR), 0)
        count = self.fill(first, count, number)
        extents = np.array([[first * SECTOR, count * SECTOR]])
        source = min(source, SECTORS - count)
        self.disk.copy_extents(log, np.array([source * SECTOR]), extents)
        log.close()

    @rule()
    def flush(self) -> None:
        self.disk.flush()
        self.olds = [self.state.copy()]

    @rule()
    def close_and_open(self) -> None:
        self.disk.close()
        self.olds = [self.state.copy()]
        self.open()
        assert self.disk.info().log in {"clean", "none"}  # a VHD has none

    @precondition(lambda self: len(self.files.trace()) < 400)
    @rule(seed=st.integers(0, 99), which=st.integers(0, 4))
    def power_cut(self, seed: int, which: int) -> None:
        self.disk.abandon()
        trace = self.files.trace()
        worlds = [world for index, world in crash_states(trace, seed=seed, limit=None) if index == len(trace)]
        self.files = worlds[which % len(worlds)]
        self.adopt()

    @rule()
    def kill(self) -> None:
        self.files = self.files.after_kill()
        self.adopt()

    def adopt(self) -> None:
        self.files.settle()
        self.open()
        actual = self.read()
        fits = np.zeros(SECTORS, bool)
        for old in self.olds:
            fits |= actual == old
        assert fits.all(), f"sector {int(np.argmin(fits))}: {self.files.story}"
        self.state = actual.copy()
        self.disk.flush()
        self.olds = [self.state.copy()]

    def read(self) -> np.ndarray:
        buffer = bytearray(SIZE)
        self.disk.read_into(buffer, 0)
        rows = np.frombuffer(buffer, np.uint8).reshape(-1, SECTOR)
        assert (rows == rows[:, :1]).all()
        return rows[:, 0]

    @invariant()
    def shows_what_was_written(self) -> None:
        if self.disk is not None:
            assert (self.read() == self.state).all()

    @invariant()
    def extents_cover_what_is_not_zero(self) -> None:
        if self.disk is not None:
            outside = np.ones(SECTORS, bool)
            for offset, length in self.disk.extents(0, SIZE).tolist():
                outside[offset // SECTOR : -(-(offset + length) // SECTOR)] = False
            assert not self.state[outside].any()


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_mutated_structures_give_a_value_or_a_refusal(seed: int) -> None:
    """Random damage to headers, tables, log, metadata and BAT of a dirty file: opened, read and written, or refused."""
    files = FaultFiles("/vm")
    clock = FakeClock()
    create_disk(files, PATH, virtual_bytes=SIZE, block_bytes=MIB, clock=clock)
    disk = open_disk(files, PATH, writable=True, clock=clock)
    disk.write(b"\1" * (2 * MIB), 0)
    disk.flush()
    disk.abandon()
    good = files.content_of(PATH)
    rng = random.Random(seed)
    areas = ((0, 520), (65536, 80), (131072, 80), (196608, 80), (262144, 80), (MIB, 200), (2 * MIB, 200))
    areas += ((2 * MIB + 65536, 40), (3 * MIB, 64), (MIB + 4096, 64))
    refused = 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            start, length = rng.choice(areas)
            at = start + rng.randrange(length)
            content[at] = rng.choice([0, 0xFF, content[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        world = FaultFiles("/vm")
        world.load(PATH, bytes(content))
        for writable in (False, True):
            try:
                with open_disk(world, PATH, writable=writable, format="vhdx", clock=clock) as disk:
                    buffer = bytearray(min(disk.virtual_bytes, MIB))
                    disk.read_into(buffer, 0)
                    disk.extents(0, min(disk.virtual_bytes, 1 << 30))
                    if writable:
                        disk.write(b"\2" * 512, 0)
                        disk.write_zeroes(0, disk.virtual_bytes)
            except HvReplicaError as error:
                refused += 1
                assert error.path == PATH
                assert str(error)
    assert refused > 50
