"""Where the disks of a cycle come from, where they are a recovery point of a store and no VM runs on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from hvreplica.formats import messages
    from hvreplica.replication.state import PrimaryState


@dataclass(frozen=True, slots=True)
class Origin:
    """A recovery point. What is cut of its disks shows its instant, and is as consistent as it is.

    changed_since: for another point and a disk's index, int64 (n, 2), sorted and disjoint: where alone the
    disk may differ from what it was then; None where nothing tells.
    """

    point_id: uuid.UUID
    instant_s: float
    consistency: messages.Consistency
    changed_since: Callable[[uuid.UUID, int], npt.NDArray[np.int64] | None]

    def within(self, state: PrimaryState) -> dict[int, npt.NDArray[np.int64]]:
        """Return where the disks may differ from what the replica's last point holds, by index.

        A disk that is not in it is to be compared as a whole: also one that joins, whose copy may be of
        several points.
        """
        shipped = state.source_point
        if shipped is None or state.phase != "ready":
            return {}
        found = {
            index: self.changed_since(shipped, index)
            for index, disk in enumerate(state.disks)
            if disk.stage == "protected"
        }
        return {index: rows for index, rows in found.items() if rows is not None}
