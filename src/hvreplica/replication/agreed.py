"""What all replicas of a VM hold alike: what a cut that is for all of them may leave out.

A block counts as known where every replica's table says the same of it, and no replica is still to get, or
has missed, something there: what its table says then is not what it will hold before the cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.extents import NO_EXTENTS, union, widened
from hvreplica.formats.fingerprint import UNKNOWN
from hvreplica.tracking.compare import rows_as_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from hvreplica.tracking.fingerprints import FingerprintTable

_UNKNOWN_ROW = np.frombuffer(UNKNOWN, np.uint8)


class AgreedTable:
    """The tables of one disk at all replicas as one, to be read.

    tables: with blocks of one size. uncertain: int64 (n, 2), sorted, disjoint: where nothing is known.
    """

    def __init__(
        self, tables: Sequence[FingerprintTable], uncertain: npt.NDArray[np.int64], *, disk_bytes: int
    ) -> None:
        self._tables = tables
        self._uncertain = rows_as_source(widened(uncertain, start=0, end=disk_bytes))
        self.block_bytes = tables[0].block_bytes

    def read(self, first_block: int, block_count: int) -> npt.NDArray[np.uint8]:
        """Return fingerprints, shape (block_count, 16): "not known" where the replicas differ."""
        rows = np.array(self._tables[0].read(first_block, block_count))
        differs = np.zeros(len(rows), np.bool_)
        for table in self._tables[1:]:
            differs |= (table.read(first_block, block_count) != rows).any(axis=1)
        start = first_block * self.block_bytes
        for offset, length in self._uncertain(start, start + block_count * self.block_bytes).tolist():
            low = (offset - start) // self.block_bytes
            differs[low : -(-(offset + length - start) // self.block_bytes)] = True
        rows[differs] = _UNKNOWN_ROW
        return rows

    def extents(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Return the guest ranges within [start, end) that are not known to be all zero everywhere."""
        found = NO_EXTENTS
        for source in (*(table.extents for table in self._tables), self._uncertain):
            found = union(found, source(start, end))
        return found
