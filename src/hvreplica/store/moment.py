"""Choose the moment in a cycle that a point shows: the last one that is known at or before the wanted one.

All moments are Unix microseconds. A moment stands for all entries that are stamped at or before it, on all
disks; of two moments the later one has all that the earlier one has. Pure.

    known moments   the last microsecond of each slot of the ticks, and each flush of a guest
    whole seconds   the last microsecond of each: by the stamps in the log itself
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import uuid
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from hvreplica.formats.times import Times

SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Moment:
    """What a point between two cycles shows.

    time_us: all entries stamped until then, of each log the first so many as `entries` says; None where only
    the stamps in the logs tell, which are whole seconds. is_flush: the guest asked for a flush then.
    """

    time_us: int
    entries: Mapping[uuid.UUID, int] | None
    is_flush: bool = False

    @property
    def entry_count(self) -> int | None:
        """The entries of all logs together; None where that is not known yet."""
        return None if self.entries is None else sum(self.entries.values())


def micros(instant_s: float) -> int:
    """Return the microseconds of Unix seconds."""
    return round(instant_s * SECOND_US)


def reach_us(instant_s: float, kind: str = "manual") -> int:
    """Return the last moment whose entries a point has; one made of a whole second has all of that second.

    A moment that is chosen here is never a whole second, so the time of a point tells.
    """
    time_us = micros(instant_s)
    is_second = kind == "manual" and time_us % SECOND_US == 0
    return time_us + SECOND_US - 1 if is_second else time_us


def second_of(wanted_us: int) -> Moment:
    """Return the end of the last second that was over at the wanted moment."""
    return Moment((wanted_us + 1) // SECOND_US * SECOND_US - 1, None)


def choose_moment(logs: Sequence[Times], wanted_us: int, *, flush: bool = False) -> Moment | None:
    """Return the last known moment at or before the wanted one, in a cycle with these logs, at least one.

    flush: only of those at which the guest asked for a flush; None where there is none.
    """
    flushes = common_flushes(logs)
    flushed_us = int(flushes[flushes <= wanted_us].max(initial=-1))
    slot_us = slot_of(logs)
    end_us = (wanted_us + 1) // slot_us * slot_us
    if flushed_us >= (0 if flush else end_us):
        return Moment(
            flushed_us, {log.log_id: log.entries_at_flush(flushed_us) for log in logs}, is_flush=True
        )
    if flush:
        return None
    return Moment(end_us - 1, {log.log_id: log.entries_before(end_us) for log in logs})


def slot_of(logs: Sequence[Times]) -> int:
    """Return how far moments are apart that are known of all these logs. Longer slots hold shorter ones."""
    return max(log.slot_us for log in logs)


def common_flushes(logs: Sequence[Times]) -> npt.NDArray[np.int64]:
    """Return the flushes that all logs of a cycle know of, ascending; a long log knows of fewer."""
    common: npt.NDArray[np.int64] = logs[0].flushes[:, 1]
    for log in logs[1:]:
        common = np.intersect1d(common, log.flushes[:, 1])
    apart: npt.NDArray[np.int64] = common[common % SECOND_US != 0]  # see reach_us()
    return apart
