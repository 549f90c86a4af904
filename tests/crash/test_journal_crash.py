"""Power is lost at any instant: the journal names every region whose arm() returned and that was not removed since.

Histories are drawn by hypothesis; every prefix of the writes and syncs of each, with subsets of the sectors
that were not synced, is opened again, cut again, and opened once more.
"""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.errors import FormatError
from hvreplica.formats.journal import BITMAP_OFFSET, SECTOR_REGIONS, DiskIdentity
from hvreplica.tracking.journal import IntentJournal, read_regions
from hvreplica.units import MIB
from tests.support.crash import worlds_after
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import SECTOR_BYTES, FaultFiles, crash_states

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

PATH = Path("/journal/0.ij")
REGION = IntentJournal.REGION_BYTES
# Few regions, so that they meet; on both sides of the border of two sectors, and at the end of the disk.
PLACES = [0, 1, 7, 8, SECTOR_REGIONS - 1, SECTOR_REGIONS, SECTOR_REGIONS + 3, 2 * SECTOR_REGIONS + 1]
BITMAP_BYTES = 3 * SECTOR_REGIONS // 8  # more than the largest of the disks below needs
SIZES = [9 * REGION, (SECTOR_REGIONS + 1) * REGION, (2 * SECTOR_REGIONS + 2) * REGION]

places = st.sampled_from(PLACES)
steps = st.one_of(
    st.tuples(st.just("arm"), st.lists(places, min_size=1, max_size=3)),
    st.tuples(st.just("cut"), st.frozensets(places)),
    st.tuples(st.just("settle"), st.none()),
    st.tuples(st.just("record"), st.booleans()),
    st.tuples(st.just("resize"), st.sampled_from(SIZES)),
    st.tuples(st.just("fail"), st.sampled_from(["write", "sync"])),
    st.tuples(st.just("reopen"), st.none()),
)


def rows(regions: Iterable[int]) -> NDArray[np.int64]:
    return np.array([(region * REGION, 1) for region in regions], np.int64).reshape(-1, 2)


def bits(bitmap: NDArray[np.uint8]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bitmap[:BITMAP_BYTES], bitorder="little")).tolist())


def covered(extents: NDArray[np.int64]) -> set[int]:
    return {
        region
        for offset, length in extents.tolist()
        for region in range(offset // REGION, -(-(offset + length) // REGION))
    }


class History:
    """A journal and its owner. `owed`: armed and not removed since; each change of it is noted in the trace."""

    def __init__(self) -> None:
        self.files = FaultFiles(PATH.parent)
        self.size = SIZES[-1]
        self.owed: set[int] = set()
        self.sequence = 0
        self.journal = IntentJournal.create(
            self.files, PATH, disk_index=0, virtual_bytes=self.size, clock=FakeClock()
        )
        self.note()

    def note(self) -> None:
        self.files.note("owed", frozenset(self.owed))

    def do(self, step: str, value: Any) -> None:
        with contextlib.suppress(OSError):
            getattr(self, f"do_{step}")(value)
        assert covered(self.journal.regions()) >= self.owed | bits(self.journal.armed)

    def do_arm(self, regions: list[int]) -> None:
        regions = [region for region in regions if region * REGION < self.size]
        self.journal.arm(rows(regions))
        assert bits(self.journal.armed) >= set(regions)
        self.owed |= set(regions)
        self.note()

    def do_cut(self, regions: frozenset[int]) -> None:
        armed = self.journal.armed[:BITMAP_BYTES]
        drop = np.zeros(BITMAP_BYTES, np.uint8)
        for region in regions:
            drop[region // 8] |= 1 << region % 8
        removed = armed & drop
        armed &= ~removed
        self.owed -= bits(removed)
        self.note()
        self.journal.cleared(removed)

    def do_settle(self, _: None) -> None:
        self.journal.settle()

    def do_record(self, clean: bool) -> None:  # noqa: FBT001  # a step's value
        self.sequence += 1
        identity = DiskIdentity(None, self.sequence, 0, 0, 0)
        self.journal.record(identity, clean=clean)
        self.files.note("identity", (identity, clean))

    def do_resize(self, size: int) -> None:
        self.owed = {region for region in self.owed if region * REGION < size}
        self.note()
        self.journal.resize(size)
        self.size = size

    def do_fail(self, operation: str) -> None:
        self.files.fail(operation, written_bytes=300)

    def do_reopen(self, _: None) -> None:
        """Open again what a killed process left, in the page cache alone or durably."""
        self.files.heal()
        self.size = read_regions(self.files, PATH)[0].virtual_bytes
        self.journal = IntentJournal.open(self.files, PATH, virtual_bytes=self.size)
        self.owed = bits(self.journal.armed)
        self.note()
        if self.journal.identity is not None:
            self.files.note("identity", (self.journal.identity, self.journal.is_clean))


def check(world: FaultFiles, *, again: bool) -> None:
    if not world.notes:
        return  # before create() returned
    owed = world.last_note("owed")
    header, extents = read_regions(world, PATH)
    owed = {region for region in owed if region < header.region_count}
    assert covered(extents) >= owed, world.story
    recorded = world.last_note("identity")
    if recorded is not None:
        assert header.identity is not None
        assert header.identity.file_bytes >= recorded[0].file_bytes, world.story
    if not again:
        return
    journal = IntentJournal.open(world, PATH, virtual_bytes=header.virtual_bytes)
    assert bits(journal.armed) >= owed
    journal.arm(rows([3]))
    world.note("owed", frozenset(owed | {3}))
    for later in worlds_after(world.trace(), seed=1, subsets=2):
        check(later, again=False)


@given(st.lists(steps, min_size=3, max_size=14), st.integers(0, 1 << 20))
def test_power_cut_leaves_a_superset_of_what_is_owed(history: list[tuple[str, Any]], seed: int) -> None:
    actual = History()
    for step, value in history:
        actual.do(step, value)
    for index, world in crash_states(
        actual.files.trace(), seed=seed, subsets_per_prefix=4, limit=60, distinct=True
    ):
        try:
            check(world, again=index % 4 == 0)
        except BaseException as error:
            error.add_note(f"state {index}: {world.story}\n{actual.files.trace()}")
            raise


def test_torn_sectors_of_every_kind_count_as_marked(seed: int) -> None:
    """Sectors are written whole by the fault model; a worse drive may tear them too."""
    rng = random.Random(seed)
    history = History()
    for region in PLACES:
        history.do("arm", [region])
    content = history.files.content_of(PATH)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(BITMAP_OFFSET, len(content))
            end = min((at // SECTOR_BYTES + 1) * SECTOR_BYTES, at + rng.randint(1, 300))
            damaged[at:end] = rng.randbytes(end - at)
        world = FaultFiles()
        world.load(PATH, bytes(damaged))
        assert covered(read_regions(world, PATH)[1]) >= set(PLACES)


def test_cut_while_a_journal_is_made_leaves_the_old_one_or_the_new_one() -> None:
    history = History()
    history.do("arm", [5])
    history.files.settle()
    IntentJournal.create(history.files, PATH, disk_index=1, virtual_bytes=512, clock=FakeClock(seed=1))
    found = set()
    for _, world in crash_states(history.files.trace(), subsets_per_prefix=9, distinct=True):
        header, extents = read_regions(world, PATH)
        assert covered(extents) == (set() if header.disk_index else {5})
        found.add(header.disk_index)
    assert found == {0, 1}


class Guest:
    """Threads that write and an owner that cuts, with native code's gate between them."""

    def __init__(self, files: FaultFiles, journal: IntentJournal) -> None:
        self.files, self.journal = files, journal
        self.gate = threading.Lock()
        self.done = threading.Event()
        self.errors: list[BaseException] = []

    def write(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            region = rng.choice(PLACES)
            while not self.try_write(region):
                self.journal.arm(rows([region]))

    def try_write(self, region: int) -> bool:
        with self.gate:
            if not self.journal.armed[region // 8] >> region % 8 & 1:
                return False
            self.files.note("wrote", region)
            return True

    def cut(self) -> None:
        count = 0
        while not self.done.is_set():
            with self.gate:
                removed = self.journal.armed[:BITMAP_BYTES].copy()
                self.journal.armed[:BITMAP_BYTES] &= ~removed
                self.files.note("cut")
            self.journal.cleared(removed)
            count += 1
            if count % 2:
                self.journal.settle()

    def run(self, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self.errors.append(error)


@pytest.mark.parametrize("round_number", range(3))
def test_no_write_between_racing_arms_and_cuts_is_ever_unmarked(seed: int, round_number: int) -> None:
    history = History()
    guest = Guest(history.files, history.journal)
    history.files.settle()
    writers = [
        threading.Thread(target=guest.run, args=(guest.write, seed * 100 + round_number * 10 + number))
        for number in range(4)
    ]
    cutter = threading.Thread(target=guest.run, args=(guest.cut,))
    for thread in (cutter, *writers):
        thread.start()
    for thread in writers:
        thread.join(60)
    guest.done.set()
    cutter.join(60)
    assert not guest.errors
    counts = {"wrote": 0}
    for _, world in crash_states(
        history.files.trace(), seed=seed, subsets_per_prefix=3, limit=600, distinct=True
    ):
        owed: set[int] = set()
        for label, value in world.notes:
            if label == "cut":
                owed = set()
            elif label == "wrote":
                owed.add(value)
        counts["wrote"] += len(owed)
        assert covered(read_regions(world, PATH)[1]) >= owed, world.story
    assert counts["wrote"] > 100


@pytest.mark.parametrize("operation", ["write", "sync", "open", "rename", "sync_directory"])
def test_failing_call_anywhere_never_loses_what_is_owed(operation: str) -> None:
    for at in range(1, 60):
        history = History()
        fault = history.files.fail(operation, at=at, written_bytes=300)
        for region in PLACES:
            history.do("arm", [region])
        history.do("cut", frozenset(PLACES[:3]))
        for _ in range(2):
            history.do("settle", None)
        history.do("record", True)
        with contextlib.suppress(OSError, FormatError):
            IntentJournal.open(history.files, PATH, virtual_bytes=MIB).close()
        for _, world in crash_states(
            history.files.trace(), seed=at, subsets_per_prefix=3, limit=40, distinct=True
        ):
            check(world, again=False)
        if not fault.hits:
            return
    pytest.fail("the fault struck every time: more operations than expected")
