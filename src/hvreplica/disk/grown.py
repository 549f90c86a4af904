"""Make the range that a disk grows into read as zeros, before the disk is longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.units import align_up

if TYPE_CHECKING:
    from hvreplica.disk.blocks import BlockDisk


def hide_what_grows(shown: BlockDisk, old_bytes: int) -> None:
    """Make all from `old_bytes` on read as zeros, durably. shown: the disk with its new size, and its parent.

    Two things may be there: the rest of the block in which the disk ended, where nobody said what it holds,
    and the bytes of a parent that is longer than its child was.
    """
    new_bytes, block_bytes = shown.virtual_bytes, shown.block_bytes
    parent_end = 0 if shown.parent is None else shown.parent.virtual_bytes
    block_end = min(new_bytes, align_up(old_bytes, block_bytes))
    if block_end > old_bytes and (parent_end > old_bytes or shown.has_place(old_bytes // block_bytes)):
        shown.write_zeroes(old_bytes, block_end - old_bytes)
    end = min(new_bytes, align_up(parent_end, block_bytes))
    if end > block_end:
        shown.write_zeroes(block_end, end - block_end)
    shown.flush()
