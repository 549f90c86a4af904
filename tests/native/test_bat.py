"""The walk over a BAT gives the reference's answer for any entries, in one window or many."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvreplica import native
from hvreplica.native.bat import BatFault, BatRules, BatWalk
from hvreplica.native.library import lib
from hvreplica.native.reference_bat import ReferenceWalk

entries = st.builds(
    lambda state, unit, reserved: state | unit << 20 | reserved << 3,
    st.sampled_from([0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 7]),
    st.one_of(st.just(0), st.integers(0, 40), st.just((1 << 44) - 1)),
    st.sampled_from([0, 0, 0, 1, (1 << 17) - 1]),
)
rules = st.builds(
    BatRules,
    chunk_ratio=st.integers(1, 5),
    block_count=st.integers(0, 30),
    block_units=st.sampled_from([1, 2, 7, 8, 16]),
    file_units=st.integers(0, 45),
    has_parent=st.booleans(),
    list_max=st.integers(0, 3),
)
SPARSE = BatRules(chunk_ratio=2, block_count=9, block_units=1, file_units=40, has_parent=True, list_max=9)


def units_of(bitmap: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bitmap, bitorder="little")).tolist())


def claimed(walk: BatWalk, units: set[int]) -> None:
    for unit in units:
        native.bitmap_set(walk.claims, unit, 1)


@given(rules=rules, table=st.lists(entries, max_size=40), cuts=st.sets(st.integers(0, 40), max_size=4))
@example(rules=SPARSE, table=[7 | 5 << 20, 0, 0, 0], cuts={1, 2, 3})
@example(rules=SPARSE, table=[7 | 5 << 20, 0, 6 | 6 << 20], cuts=set())
def test_any_entries_are_judged_as_by_the_reference(
    rules: BatRules, table: list[int], cuts: set[int]
) -> None:
    structures = {unit for unit in (0, 3) if unit < rules.file_units}
    walk, reference = BatWalk(rules), ReferenceWalk(rules, structures)
    claimed(walk, structures)
    ends = [0, *sorted(cut for cut in cuts if cut < len(table)), len(table)]
    for start, end in pairwise(ends):
        if any(table[start:end]):  # windows of nothing are left out, as a file's holes are
            walk.check(np.array(table[start:end], np.uint64), start)
    walk.finish(len(table))
    reference.check(table, 0)
    reference.check([], 1 << 40)
    assert [tuple(row) for row in walk.findings.tolist()] == reference.findings
    assert walk.faults.tolist() == reference.faults
    assert walk.states.tolist()[1:] == reference.states[1:]
    assert walk.bitmap_blocks == reference.bitmap_blocks
    assert units_of(walk.claims) == reference.claims
    assert units_of(walk.anchors) == reference.anchors


def test_faults_are_numbered_as_in_c() -> None:
    assert [getattr(lib, f"HVR_BAT_{fault.name}") for fault in BatFault] == list(BatFault)
    assert len(BatFault) == lib.HVR_BAT_FAULT_COUNT


def test_a_full_table_in_any_order_has_no_fault() -> None:
    rules = BatRules(
        chunk_ratio=4096, block_count=50_000, block_units=4, file_units=200_004, has_parent=False, list_max=5
    )
    indices = np.arange(50_000) + np.arange(50_000) // 4096
    table = np.zeros(int(indices[-1]) + 1, np.uint64)
    units = 4 + 4 * np.random.default_rng(42).permutation(50_000)
    table[indices] = (units.astype(np.uint64) << np.uint64(20)) | np.uint64(6)
    walk = BatWalk(rules)
    claimed(walk, {0, 1, 2, 3})
    for first in range(0, len(table), 1000):
        walk.check(table[first : first + 1000], first)
    walk.finish(len(table))
    assert not walk.faults.any()
    assert walk.states.tolist() == [0, 0, 0, 0, 0, 0, 50_000, 0]
    assert native.bitmap_count(walk.claims) == 200_004


def test_rules_that_cannot_be_are_refused() -> None:
    for wrong in (SPARSE._replace(chunk_ratio=0), SPARSE._replace(block_units=0)):
        with pytest.raises(ValueError, match="above 0"):
            BatWalk(wrong)
    walk = BatWalk(SPARSE)
    walk.claims = walk.claims[:2]
    with pytest.raises(ValueError, match="length"):
        walk.check(np.zeros(1, np.uint64), 0)
