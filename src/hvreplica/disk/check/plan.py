"""What a repair is going to do: steps in order, each with the ranges of the file that it changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from hvreplica.disk.check.codes import Repair
    from hvreplica.files import BlockFile

NO_RANGES = np.empty((0, 2), np.int64)


@dataclass(frozen=True, slots=True)
class Step:
    """One change. Carried out again after a crash in its middle, it ends in the same state.

    writes: int64 (n, 2) of (file_offset, length), what it overwrites, in the order in which it does. erases:
    what it zeroes or cuts off. apply: does it, and returns when it is durable.
    """

    action: Repair
    message: str
    apply: Callable[[BlockFile], None]
    writes: NDArray[np.int64] = field(default_factory=lambda: NO_RANGES)
    erases: NDArray[np.int64] = field(default_factory=lambda: NO_RANGES)


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """All steps of a repair; none where nothing can be mended.

    identity_before, identity_after: by which an undo knows the file.
    """

    steps: Sequence[Step]
    identity_before: uuid.UUID
    identity_after: uuid.UUID
