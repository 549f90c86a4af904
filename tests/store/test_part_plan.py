"""Which parts are written anew: what is dead goes, files stay few, and no byte is written often."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvreplica.store.part_plan import DEAD_SHARE, GROWTH, MERGE_MIN, Rewrite, choose_merge, plan_rewrites

MIB = 1 << 20
SIZES = st.lists(st.sampled_from([4096, 8192, MIB, 3 * MIB, 100 * MIB]), max_size=30)


@pytest.mark.parametrize(
    ("sizes", "run"),
    [
        ([], None),
        ([1] * (MERGE_MIN - 1), None),
        ([1] * MERGE_MIN, (0, MERGE_MIN)),
        ([1] * (MERGE_MIN + 3), (0, MERGE_MIN)),
        ([100] + [1] * (MERGE_MIN - 1), None),
        ([100] + [1] * MERGE_MIN, (1, MERGE_MIN + 1)),
        ([100, 1, 100, 100, 1, 1, 1, 100], (0, MERGE_MIN)),
        ([100, 1, 100, 100, 1, 1, 1, 1], None),
        ([9, *[2] * MERGE_MIN, 9], (1, MERGE_MIN + 1)),
        ([3, 1, 1, 9, 9, 1, 9, 1, 1, 9], (2, MERGE_MIN + 2)),
    ],
)
def test_a_run_of_like_parts_is_merged(sizes: list[int], run: tuple[int, int] | None) -> None:
    assert choose_merge(sizes) == run


def test_parts_without_a_live_byte_are_gone_and_wasteful_ones_trimmed() -> None:
    assert plan_rewrites([100, 100, 100, 100], [100, 0, 66, 67]) == [Rewrite(1, 2, 0), Rewrite(2, 3, 66)]


def test_a_merge_takes_the_dead_parts_between_along() -> None:
    covered = [10] * (MERGE_MIN + 1)
    live = [10, 10, 0, *[10] * (MERGE_MIN - 2)]
    assert plan_rewrites(covered, live) == [Rewrite(0, MERGE_MIN + 1, 10 * MERGE_MIN)]


def test_merges_that_follow_from_merges_are_done_at_once() -> None:
    sizes = [8] * (MERGE_MIN - 1) + [1] * MERGE_MIN
    assert plan_rewrites(sizes, sizes) == [Rewrite(0, len(sizes), sum(sizes))]


def test_with_a_bound_nothing_is_merged_and_no_more_is_written() -> None:
    many = [10] * (MERGE_MIN + 1)
    assert plan_rewrites(many, many, bytes_max=1000) == []
    assert plan_rewrites([100] * 4, [0, 50, 0, 60], bytes_max=100) == [
        Rewrite(0, 1, 0),
        Rewrite(1, 2, 50),
        Rewrite(2, 3, 0),
    ]
    assert plan_rewrites([100] * 4, [0, 50, 0, 50], bytes_max=100)[3:] == [Rewrite(3, 4, 50)]


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 1000)), max_size=25))
def test_after_the_plan_nothing_is_left_to_do(parts: list[tuple[int, int]]) -> None:
    covered = [size for size, _ in parts]
    live = [min(pair) for pair in parts]
    steps = plan_rewrites(covered, live)
    places = [place for step in steps for place in range(step.first, step.last)]
    assert places == sorted(set(places)), "no part twice"
    left = []
    for place, size in enumerate(live):
        step = next((step for step in steps if step.first <= place < step.last), None)
        if step is None:
            assert size, "a dead part stays"
            assert covered[place] - size <= DEAD_SHARE * covered[place]
            left.append((covered[place], size))
        elif place == step.first:
            assert step.live_bytes == sum(live[step.first : step.last])
            if step.live_bytes:
                left.append((step.live_bytes, step.live_bytes))
    assert plan_rewrites([pair[0] for pair in left], [pair[1] for pair in left]) == []


@given(SIZES)
def test_where_nothing_is_left_to_merge_parts_are_few(sizes: list[int]) -> None:
    steps = plan_rewrites(sizes, sizes)
    count = len(sizes) - sum(step.last - step.first - 1 for step in steps)
    assert count <= MERGE_MIN * (1 + math.log(max(sum(sizes), 4096) / 4096, GROWTH))


@pytest.mark.parametrize("kind", ["equal", "random", "large first"])
def test_bytes_that_arrive_in_pieces_are_written_a_logarithmic_number_of_times(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    parts: list[int] = []
    arrived = written = most = 0
    for number in range(2000):
        size = {"equal": 1, "random": rng.choice([1, 1, 2, 5, 40]), "large first": 1 if number else 5000}[
            kind
        ]
        parts.append(size)
        arrived += size
        for step in reversed(plan_rewrites(parts, parts)):
            written += step.live_bytes
            parts[step.first : step.last] = [step.live_bytes]
        most = max(most, len(parts))
    assert sum(parts) == arrived
    assert written <= arrived * math.log(arrived, GROWTH)
    assert most <= 6 * MERGE_MIN
    if kind == "large first":
        assert 5000 in parts, "what is large already is left alone while little comes"
