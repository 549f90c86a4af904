"""The digests of disks that arrive: added up window by window, while the bytes are at hand.

Known at the end only where one session has seen every window from the first to the last; a first copy that
was cut and continued has no digest until a scan has read it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hvreplica.native import PAGE_BYTES
from hvreplica.store.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer


class ArrivingDigests:
    """Thread-safe. Of the targets of one transfer."""

    def __init__(self, targets: Iterable[int]) -> None:
        self._lock = threading.Lock()
        self._totals: dict[int, Digest] = dict.fromkeys(targets, Digest())

    def add(self, target: int, table: NDArray[np.int64], data: Buffer) -> None:
        """Count a window that was written; the rest of it is zeros. Each byte of a target comes once."""
        if target not in self._totals:
            return
        # Pages that come in pieces cannot be counted; every sender of ours sends whole ones.
        is_whole = not (table[:, 0] % PAGE_BYTES).any() and not (table[:-1, 1] % PAGE_BYTES).any()
        digest = Digest.of_extents(data, table) if is_whole else None
        with self._lock:
            if digest is None:
                self._totals.pop(target, None)
            elif target in self._totals:
                self._totals[target] += digest

    def result(self) -> dict[int, Digest]:
        """Return the digests of the targets that are known."""
        with self._lock:
            return dict(self._totals)
