"""What the guest's I/O needs of a format to change a disk: places for blocks, and durability."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Session(Protocol):
    """What is needed to change a disk of one format.

    Any thread may call; clear() comes last.
    """

    @property
    def has_zero_state(self) -> bool:
        """Whether discard() can make a block read as zeros that covers a parent's bytes."""
        ...

    def begin(self) -> None:
        """Make the file ready for its first change. Raises: the error that ended the session."""
        ...

    def changed(self) -> None:
        """Say that payload was written; called after the write and before it returns to its caller."""
        ...

    def allocate(self, blocks: NDArray[np.int64]) -> None:
        """Give each of `blocks`, unique, that has none a place that reads as zeros and counts."""
        ...

    def allocate_partial(self, blocks: NDArray[np.int64]) -> None:
        """Give each of `blocks`, unique, that has none a place none of whose sectors counts."""
        ...

    def promote(self, blocks: NDArray[np.int64]) -> None:
        """Say that all sectors of `blocks`, which have places, count."""
        ...

    def discard(self, blocks: NDArray[np.int64]) -> None:
        """Make `blocks`, unique, read as zeros without a place of their own."""
        ...

    def settle(self, blocks: NDArray[np.int64]) -> None:
        """Make those of `blocks` read as zeros everywhere that are in a state which only allows zeros."""
        ...

    def flush(self) -> None:
        """Make all that was written before durable."""
        ...

    def publish(self) -> None:
        """Put into the file what is known in memory alone: places of blocks, and which sectors count."""
        ...

    def clear(self) -> None:
        """Flush, and leave the file so that any program opens it."""
        ...
