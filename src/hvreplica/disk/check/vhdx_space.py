"""Level "leaks" of a VHDX: which MiB of the file nothing uses.

Gaps between blocks are normal, the next blocks go there. Spec: [MS-VHDX] 2.6.2.1 for fixed disks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.formats.vhdx_bat import PayloadState
from hvreplica.units import MIB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvreplica.disk.check.findings import Findings, Statistics
    from hvreplica.disk.check.vhdx_file import VhdxFile

_SLICE_BYTES = 1 << 16


def check_space(subject: VhdxFile, findings: Findings, statistics: Statistics) -> None:
    """Find what the file holds and does not use; leaves used_units in `subject`."""
    walk, parameters = subject.walk, subject.parameters
    if walk is None or parameters is None:
        return
    used = walk.claims | walk.anchors
    used_units = native.bitmap_count(used)
    end_units = last_bit(used) + 1
    kept_units = end_units
    if parameters.is_fixed:
        # "the implementation MUST NOT reduce the size of the file to a value lower than would be required
        # to allocate every block", 2.6.2.1
        absent = walk.rules.block_count - int(walk.states[PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT])
        kept_units += absent * walk.rules.block_units
    size = subject.view.size()
    tail_bytes = max(size - kept_units * MIB, 0)
    gap_units = end_units - used_units
    subject.used_units = kept_units
    statistics.used_bytes = used_units * MIB
    statistics.leaked_bytes = gap_units * MIB + tail_bytes
    statistics.tail_bytes = tail_bytes
    if gap_units:
        findings.add(
            "space-unused",
            f"{gap_units} MiB inside of the file are in no use; new blocks go there first",
            offset=first_clear_bit(used) * MIB,
        )
    if size % MIB:
        findings.add(
            "file-end-unaligned",
            "the length of the file is no multiple of 1 MiB",
            offset=size,
            expected=f"a multiple of {MIB} bytes",
            actual=f"{size} bytes",
            spec="[MS-VHDX] 2.1",
        )
    if tail_bytes >= MIB:
        findings.add(
            "file-tail-unused",
            f"{tail_bytes} bytes behind the last use of the file",
            offset=kept_units * MIB,
            expected=f"{kept_units * MIB} bytes",
            actual=f"{size} bytes",
        )


def last_bit(bitmap: NDArray[np.uint8]) -> int:
    """Return the highest bit that is set, -1 where none is."""
    end = len(bitmap)
    while end > 0:
        start = max(end - _SLICE_BYTES, 0)
        held = np.flatnonzero(bitmap[start:end])
        if len(held):
            at = start + int(held[-1])
            return at * 8 + int(bitmap[at]).bit_length() - 1
        end = start
    return -1


def first_clear_bit(bitmap: NDArray[np.uint8]) -> int:
    """Return the lowest bit that is not set; one behind the bitmap where all are."""
    for start in range(0, len(bitmap), _SLICE_BYTES):
        open_bytes = np.flatnonzero(bitmap[start : start + _SLICE_BYTES] != 0xFF)
        if len(open_bytes):
            at = start + int(open_bytes[0])
            value = int(bitmap[at])
            return at * 8 + ((value + 1) & ~value).bit_length() - 1
    return len(bitmap) * 8
