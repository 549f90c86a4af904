"""Which instants between points can be had: for each cycle whose logs are kept, and how fine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hvreplica.errors import HvReplicaError, kept
from hvreplica.store.instant_plan import kept_cycles, plan_instant
from hvreplica.store.kept_times import times_of
from hvreplica.store.moment import SECOND_US, common_flushes, micros, slot_of

if TYPE_CHECKING:
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import KeptLogRow, PointRow


class InstantSpan(msgspec.Struct, frozen=True):
    """A cycle whose logs are kept: instants from one point to the next; Unix seconds.

    step_s: how far the states are apart at most that can be had, where the guest writes all the time; 1 where
    only seconds are known; None where no instant can be had, for which `reason` is a sentence. flushes: how
    many flushes of the guest are known in it. point: the one that it leads to.
    """

    from_s: float
    to_s: float
    point: str
    step_s: float | None
    flushes: int
    reason: str | None = None


def instant_spans(home: VmHome) -> list[InstantSpan]:
    """Return the cycles whose logs are kept, oldest first."""
    with home.catalog.snapshot():
        cycles = kept_cycles(home)
    return [_span(home, *cycle) for cycle in cycles]


def _span(home: VmHome, start_s: float, end: PointRow, rows: list[KeptLogRow]) -> InstantSpan:
    ends = (start_s, end.instant_s, str(end.id))
    try:
        # Any instant of a cycle is reached as every other one; the middle lies in no other cycle. An odd
        # microsecond is never a whole second, which may end in the next one.
        plan_instant(home, ((micros(start_s) + micros(end.instant_s)) // 2 | 1) / SECOND_US)
    except HvReplicaError as error:
        return InstantSpan(*ends, None, 0, kept(error).message)
    times = times_of(home, rows)
    if times is None:
        return InstantSpan(*ends, 1.0, 0)
    return InstantSpan(*ends, slot_of(times) / SECOND_US, len(common_flushes(times)))
