"""A chain of disks under random use against arrays: create, write, zero, copy, flush, snapshot, revert, power cut, kill."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hvreplica.disk import compact_disk, create_disk, map_disk, merge_disk, open_disk, resize_disk
from hvreplica.errors import HvReplicaError, InvalidTransition
from hvreplica.units import KIB, MIB
from tests.support.crash import worlds_after
from tests.support.disks import KINDS, create_kind
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles

PATH = Path("/vm/disk.vhdx")
SECTOR = 512
GRAIN = 8  # sectors: whole ones of every kind of disk
SIZE = 5 * MIB + 3 * SECTOR * GRAIN
SECTORS = SIZE // SECTOR
CHAIN_LENGTH_MAX = 5
DEEP = settings.default.max_examples > 1000

# Places are drawn beyond the end of the shortest disk and taken modulo its size.
places = st.one_of(st.integers(0, 2 * SECTORS), st.integers(0, 12).map(lambda block: block * 1024))
counts = st.sampled_from([1, 2, 8, 100, 1024, 2048, 5000])


class DiskMachine(RuleBasedStateMachine):
    """`state` holds the number that each sector was last filled with; `olds` what it may fall back to.

    below: path and content of each parent of the open disk, the last one last. published: which of `olds` a kill keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files = FaultFiles("/vm")
        self.clock = FakeClock()
        self.path = PATH
        self.state = np.zeros(SECTORS, np.uint8)
        self.olds = [self.state.copy()]
        self.below: list[tuple[Path, np.ndarray]] = []
        self.number = 0
        self.published = self.state
        self.snapshots = 0
        self.disk = None

    @initialize(kind=st.sampled_from([kind for kind in KINDS if kind != "raw"]))
    def create(self, kind: str) -> None:
        self.format, self.type, self.sector_bytes, _ = KINDS[kind]
        self.state = create_kind(self.files, PATH, kind, virtual_bytes=SIZE, clock=self.clock)
        self.olds = [self.state.copy()]
        self.files.settle()
        self.open()

    def open(self) -> None:
        self.disk = open_disk(self.files, self.path, writable=True, clock=self.clock)
        assert self.disk.virtual_bytes == len(self.state) * SECTOR

    def close(self) -> None:
        self.disk.close()
        self.olds = [self.state.copy()]

    def fill(self, first: int, count: int, number: int) -> tuple[int, int]:
        first %= len(self.state)
        count = min(count, len(self.state) - first)
        self.state[first : first + count] = number
        self.olds.append(self.state.copy())
        return first, count

    def next_number(self) -> int:
        self.number = self.number % 255 + 1
        return self.number

    @rule(first=places, count=counts)
    def write(self, first: int, count: int) -> None:
        number = self.next_number()
        first, count = self.fill(first, count, number)
        self.disk.write(bytes([number]) * (count * SECTOR), first * SECTOR)

    @rule(first=places, count=counts)
    def write_zeros_as_data(self, first: int, count: int) -> None:
        first, count = self.fill(first, count, 0)
        self.disk.write(bytes(count * SECTOR), first * SECTOR)

    @rule(first=places, count=counts)
    def write_zeroes(self, first: int, count: int) -> None:
        first, count = self.fill(first, count, 0)
        self.disk.write_zeroes(first * SECTOR, count * SECTOR)

    @rule(block=st.integers(0, 5), blocks=st.integers(1, 6))
    def zero_blocks(self, block: int, blocks: int) -> None:
        first, count = self.fill(block * 2048, blocks * 2048, 0)
        self.disk.write_zeroes(first * SECTOR, count * SECTOR)

    @rule(
        starts=st.lists(places, min_size=1, max_size=6),
        length=st.sampled_from([1, 8, 16]),
        zero=st.booleans(),
    )
    def write_many(self, starts: list[int], length: int, *, zero: bool) -> None:
        number = 0 if zero else self.next_number()
        slots = {start % len(self.state) // length for start in starts}
        firsts = [slot * length for slot in slots if slot * length + length <= len(self.state)]
        for first in firsts:
            self.state[first : first + length] = number
        self.olds.append(self.state.copy())
        extents = np.array([[first, length] for first in firsts], np.int64).reshape(-1, 2) * SECTOR
        self.disk.write_extents(extents, bytes([number]) * (len(firsts) * length * SECTOR))

    @rule(first=places, count=counts, source=places)
    def copy(self, first: int, count: int, source: int) -> None:
        number = self.next_number()
        first, count = self.fill(first, count, number)
        with self.files.open(Path("/vm/log"), create=True) as log:
            log.write(bytes([number]) * ((2 * SECTORS + count) * SECTOR), 0)
            extents = np.array([[first * SECTOR, count * SECTOR]])
            self.disk.copy_extents(log, np.array([source * SECTOR]), extents)
        self.files.unlink(Path("/vm/log"))

    @rule()
    def flush(self) -> None:
        self.disk.flush()
        self.olds = [self.state.copy()]

    @rule()
    def close_and_open(self) -> None:
        self.close()
        self.open()
        assert self.disk.info().log in {"clean", "none"}  # a VHD has none

    @precondition(lambda self: len(self.below) < CHAIN_LENGTH_MAX)
    @rule(
        block_bytes=st.sampled_from([MIB, 2 * MIB, 4 * MIB]),
        grains=st.sampled_from([0, 0, 0, 3, 700, -1, -300]),
    )
    def snapshot(self, block_bytes: int, grains: int) -> None:
        """Put a new disk on top of this one, which from now on must stay as it is; it may be longer or shorter."""
        self.close()
        self.snapshots += 1
        child = PATH.with_name(f"{self.snapshots}{PATH.suffix}")
        sectors = len(self.state) + (grains * GRAIN if self.format == "vhdx" else 0)
        create_disk(
            self.files,
            child,
            virtual_bytes=sectors * SECTOR,
            format=self.format,
            type="differencing",
            block_bytes=block_bytes if self.format == "vhdx" else 2 * MIB if block_bytes > MIB else 512 * KIB,
            parent=self.path,
            clock=self.clock,
        )
        self.below.append((self.path, self.state.copy()))
        self.path = child
        state = np.zeros(sectors, np.uint8)
        shared = min(sectors, len(self.state))
        state[:shared] = self.state[:shared]
        self.state = state
        self.olds = [self.state.copy()]
        self.open()

    @precondition(lambda self: bool(self.below))
    @rule()
    def revert(self) -> None:
        """Throw the disk away and go on with its parent."""
        self.close()
        self.files.unlink(self.path)
        self.files.sync_directory(self.path.parent)
        self.path, self.state = self.below.pop()
        self.olds = [self.state.copy()]
        self.open()

    @precondition(lambda self: bool(self.below) and len(self.state) <= len(self.below[-1][1]))
    @rule()
    def merge(self) -> None:
        """Merge the disk into its parent and go on with that; what was behind the end of a shorter disk is zeros."""
        self.close()
        merge_disk(self.files, self.path, clock=self.clock)
        assert not self.files.exists(self.path)
        self.path, old = self.below.pop()
        state = np.zeros(len(old), np.uint8)
        state[: len(self.state)] = self.state
        self.state, self.olds = state, [state.copy()]
        self.open()

    @precondition(lambda self: len(self.state) < 2 * SIZE // SECTOR)
    @rule(grains=st.sampled_from([1, 300, 1500]))
    def grow(self, grains: int) -> None:
        self.close()
        sectors = len(self.state) + grains * GRAIN
        resize_disk(self.files, self.path, sectors * SECTOR, clock=self.clock)
        state = np.zeros(sectors, np.uint8)
        state[: len(self.state)] = self.state
        self.state, self.olds = state, [state.copy()]
        self.open()

    @rule()
    def compact(self) -> None:
        self.close()
        with suppress(InvalidTransition):  # a fixed disk
            compact_disk(self.files, self.path, clock=self.clock)
        self.olds = [self.state.copy()]
        self.open()

    @precondition(lambda self: bool(self.below))
    @rule(which=st.integers(0, CHAIN_LENGTH_MAX))
    def parents_stay_as_they_were(self, which: int) -> None:
        path, state = self.below[which % len(self.below)]
        with open_disk(self.files, path, clock=self.clock) as disk:
            assert (read_numbers(disk) == state).all()

    @rule(seed=st.integers(0, 99), which=st.integers(0, 4))
    def power_cut(self, seed: int, which: int) -> None:
        self.disk.abandon()
        worlds = worlds_after(self.files.trace(), seed=seed)
        self.files = worlds[which % len(worlds)]
        self.adopt()

    @rule()
    def publish(self) -> None:
        self.disk.publish()
        self.published = self.olds[-1]

    @rule()
    def kill(self) -> None:
        since = [index for index, old in enumerate(self.olds) if old is self.published]
        self.olds = self.olds[since[0] if since else 0 :]
        self.files = self.files.after_kill()
        self.adopt()

    def adopt(self) -> None:
        self.files.settle()
        with open_disk(self.files, self.path, clock=self.clock) as disk:
            shown = read_numbers(disk)
        self.open()
        actual = read_numbers(self.disk)
        assert (shown == actual).all(), f"a reader saw another disk: {self.files.story}"
        fits = np.zeros(len(actual), bool)
        for old in self.olds:
            fits |= actual == old
        assert fits.all(), f"sector {int(np.argmin(fits))}: {self.files.story}"
        self.state = actual.copy()
        self.disk.flush()
        self.olds = [self.state.copy()]

    @invariant()
    def shows_what_was_written(self) -> None:
        if self.disk is not None:
            assert (read_numbers(self.disk) == self.state).all()

    @invariant()
    def extents_cover_what_is_not_zero(self) -> None:
        if self.disk is not None:
            outside = np.ones(len(self.state), bool)
            for offset, length in self.disk.extents(0, self.disk.virtual_bytes).tolist():
                outside[offset // SECTOR : -(-(offset + length) // SECTOR)] = False
            assert not self.state[outside].any()

    @invariant()
    def map_tells_zeros_and_where_the_rest_is(self) -> None:
        if self.disk is None:
            return
        position = 0
        for entry in map_disk(self.disk):
            assert entry.start == position
            position += entry.length
            if entry.zero:
                assert not self.state[entry.start // SECTOR : position // SECTOR].any()
            elif entry.filename is not None and entry.offset is not None:
                with self.files.open(Path(entry.filename)) as file:
                    assert file.read(entry.offset, 1)[0] == self.state[entry.start // SECTOR]
        assert position == self.disk.virtual_bytes


def read_numbers(disk: object) -> np.ndarray:
    buffer = bytearray(disk.virtual_bytes)
    disk.read_into(buffer, 0)
    rows = np.frombuffer(buffer, np.uint8).reshape(-1, SECTOR)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0]


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(
    max_examples=600 if DEEP else 30, stateful_step_count=50 if DEEP else 25, deadline=None
)


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
