"""A read-only file with a replay plan laid over it: a dirty VHDX can be read without being touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica.disk.extents import merge
from hvreplica.errors import Truncated
from hvreplica.formats.vhdx_log import LOG_SECTOR_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from typing_extensions import Buffer

    from hvreplica.disk.vhdx.replay import ReplayPlan
    from hvreplica.files import BlockFile


class OverlayFile:
    """See files.BlockFile. Reads show `base` after the plan; every change is refused. Owns `base`."""

    writable = False

    def __init__(self, base: BlockFile, plan: ReplayPlan) -> None:
        self._base = base
        self._plan = plan
        self._zero_ends = plan.zeros.sum(axis=1)

    def leaves_payload(self, structures: Sequence[tuple[int, int, str]]) -> bool:
        """Return whether the plan stays inside of `structures` and does not make the file longer."""
        ranges = [(file_offset, length) for file_offset, length, _ in structures]
        return self._plan.size_bytes <= self._base.size() and self._plan.touches_only(ranges)

    @property
    def path(self) -> Path:
        return self._base.path

    def fileno(self) -> int | None:
        """Return None: a descriptor would show the file without the plan."""
        return None

    def size(self) -> int:
        return max(self._base.size(), self._plan.size_bytes)

    def read(self, file_offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(buffer, file_offset)
        return bytes(buffer)

    def read_into(self, buffer: Buffer, file_offset: int) -> None:
        view = memoryview(buffer).cast("B")
        end = file_offset + len(view)
        size = self.size()
        if end > size:
            raise Truncated(
                "the file ends inside what was to be read",
                path=self.path,
                offset=file_offset,
                expected=f"{len(view)} bytes",
                actual=f"{max(size - file_offset, 0)} bytes",
            )
        in_base = min(max(self._base.size() - file_offset, 0), len(view))
        if in_base:
            self._base.read_into(view[:in_base], file_offset)
        view[in_base:] = bytes(len(view) - in_base)
        self._lay_over(view, file_offset, end)

    def _lay_over(self, view: memoryview, start: int, end: int) -> None:
        plan = self._plan
        first = int(np.searchsorted(self._zero_ends, start, "right"))
        last = int(np.searchsorted(plan.zeros[:, 0], end, "left"))
        for offset, length in plan.zeros[first:last].tolist():
            low, high = max(offset, start), min(offset + length, end)
            view[low - start : high - start] = bytes(high - low)
        first = int(np.searchsorted(plan.data_offsets, start - LOG_SECTOR_BYTES, "right"))
        last = int(np.searchsorted(plan.data_offsets, end, "left"))
        for index in range(first, last):
            offset = int(plan.data_offsets[index])
            low, high = max(offset, start), min(offset + LOG_SECTOR_BYTES, end)
            view[low - start : high - start] = plan.data[index, low - offset : high - offset].data

    def write(self, buffer: Buffer, file_offset: int) -> None:
        del buffer
        raise self._refuse(file_offset)

    def resize(self, size_bytes: int) -> None:
        raise self._refuse(size_bytes)

    def zero(self, file_offset: int, length: int) -> None:
        del length
        raise self._refuse(file_offset)

    def data_extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what holds data in the file or in the plan; zeroed ranges of the plan may be among it."""
        end = min(end, self.size())
        rows = [*self._base.data_extents(start, min(end, self._base.size()))]
        offsets = self._plan.data_offsets
        for offset in offsets[(offsets + LOG_SECTOR_BYTES > start) & (offsets < end)].tolist():
            low = max(offset, start)
            rows.append((low, min(offset + LOG_SECTOR_BYTES, end) - low))
        for offset, length in merge(np.array(rows, np.int64).reshape(-1, 2)).tolist():
            yield offset, length

    def sync(self) -> None:
        """Do nothing: nothing can be changed."""

    def close(self) -> None:
        self._base.close()

    def _refuse(self, file_offset: int) -> PermissionError:
        error = PermissionError(f"{self.path} is open for reading only")
        error.add_note(f"write at offset {file_offset}")
        return error
