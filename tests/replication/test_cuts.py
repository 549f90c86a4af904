"""The primary loses power, or is killed, at any of its file operations: the next call continues and both are equal.

The server lives on meanwhile. Each round cuts a cycle at another event and gives the primary back one of the worlds
that a power cut may leave.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.replication.sites import Guest, Served
from tests.support.crash import worlds_after
from tests.support.faultfile import Killed

if TYPE_CHECKING:
    from hvreplica.replication.results import ReplicateResult
    from tests.support.faultfile import FaultFiles


def run_until_killed(guest: Guest, served: Served, event_count: int) -> ReplicateResult | None:
    """Replicate, killed after `event_count` file events; None if it was killed."""
    guest.files.kill_at(event_count)
    try:
        return guest.replicate(served)
    except Killed:
        return None
    finally:
        guest.files.heal()


def world_after(guest: Guest, rng: random.Random) -> FaultFiles:
    """Return what the primary finds after a power cut now."""
    return rng.choice(worlds_after(guest.files.trace(), seed=rng.randrange(1 << 30), subsets=4))


def test_replicate_cut_anywhere_in_the_initial_transfer_continues(served: Served, seed: int) -> None:
    rng = random.Random(seed)
    for round_index, event_count in enumerate((1, 3, 6, 9, 12, 15, 18, 21, 24, 28, 32, 36, 40)):
        guest = Guest(seed + round_index, vm=f"web{round_index}")
        done = run_until_killed(guest, served, event_count)
        if done is None:
            guest.files = world_after(guest, rng)
            guest.write(4 * 4096)
            story = guest.files.story
            guest.replicate(served)
        else:
            story = "not cut"
        assert served.content(guest.vm) == guest.model, f"seed {seed}, {event_count} events: {story}"


@pytest.mark.parametrize("power", [True, False], ids=["power-cut", "killed"])
def test_replicate_cut_anywhere_in_a_cycle_continues(served: Served, seed: int, *, power: bool) -> None:
    rng = random.Random(seed)
    guest = Guest(seed)
    guest.replicate(served)
    event_count, cuts = 1, 0
    while True:
        guest.write(rng.randrange(1, 30) * 4096)
        done = run_until_killed(guest, served, event_count)
        if done is not None:
            break
        cuts += 1
        guest.files = world_after(guest, rng) if power else guest.files.after_kill()
        if rng.random() < 0.5:
            guest.write(3 * 4096)
        result = guest.replicate(served)
        where = f"seed {seed}, cut after {event_count} events: {guest.files.story}"
        assert result.kind in ("delta", "none"), where
        assert served.content() == guest.model, where
        assert guest.replicate(served).kind == "none", where
        event_count += 1 if settings().max_examples > 1000 else rng.randrange(1, 5)
    assert cuts > 10, "a cycle has more file events than that"
