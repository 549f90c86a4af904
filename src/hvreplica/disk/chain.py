"""Read a disk through its parents: each layer fills in what it holds, the rest goes down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from hvreplica.disk.extents import spans_of
from hvreplica.errors import ParentMissing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.disk.disk import Disk


class Layer(Protocol):
    """The part of disk.Disk that one file of a chain needs."""

    @property
    def path(self) -> Path:
        """The file's name."""
        ...

    @property
    def parent(self) -> Disk | None:
        """The disk below."""
        ...

    def read_spans(self, spans: NDArray[np.int64], out: Buffer) -> NDArray[np.int64]:
        """See disk.Disk."""
        ...


def read_layers(disk: Layer, rows: NDArray[np.int64], out: Buffer) -> None:
    """Fill `out` with the bytes of `rows`, one after the other, from the disk and its parents.

    rows: int64 (n, 2) within the disk. Raises: ParentMissing where a parent is needed that was not opened.
    """
    length = int(rows[:, 1].sum())
    if length != memoryview(out).nbytes:
        message = f"the extents add up to {length} bytes, the buffer has {memoryview(out).nbytes}"
        raise ValueError(message)
    spans = spans_of(rows)
    layer: Layer = disk
    while len(spans := layer.read_spans(spans, out)):
        layer = parent_of(layer)


def parent_of(disk: Layer) -> Disk:
    """Return the parent that `disk` needs. Raises: ParentMissing if it was opened without."""
    if disk.parent is None:
        raise ParentMissing(
            "this differencing disk was opened without its parent, which holds what is to be read",
            path=disk.path,
        )
    return disk.parent


def layers(disk: Disk) -> Iterator[Disk]:
    """Yield the disk, its parent, the parent's parent, and so on."""
    layer: Disk | None = disk
    while layer is not None:
        yield layer
        layer = layer.parent
