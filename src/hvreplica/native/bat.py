"""A walk over the BAT of a VHDX that judges every entry and notes who claims which MiB of the file.

Spec: [MS-VHDX] 2.5.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hvreplica.native.library import ffi, lib, u64s, writable_octets

if TYPE_CHECKING:
    from hvreplica.native.tables import Array

NO_INDEX = (1 << 64) - 1
BAT_STATE_COUNT = 8
BAT_FINDING = np.dtype([("index", "<u8"), ("entry", "<u8"), ("fault", "<u8")])


class BatFault(IntEnum):
    """What may be wrong with an entry; native/hvr.h says when."""

    STATE = 0
    RESERVED = 1
    OUTSIDE = 2
    SHARED = 3
    NO_BITMAP = 4
    STALE = 5
    ANCHOR_OUTSIDE = 6
    UNUSED = 7


class BatRules(NamedTuple):
    """What the entries are judged by.

    chunk_ratio: payload entries before each sector-bitmap entry. block_count: payload blocks of the disk.
    block_units: MiB of a payload block. file_units: whole MiB in the file. list_max: findings to list for
    each fault; all are counted.
    """

    chunk_ratio: int
    block_count: int
    block_units: int
    file_units: int
    has_parent: bool
    list_max: int


class BatWalk:
    """One walk, window by window, in order. Not thread-safe.

    claims: uint8, bit i % 8 of byte i // 8 set where a block has MiB i of the file; the owner sets those of
    structures before the first window. anchors: the same of entries that keep a place without having data.
    states: uint64 (8,), payload entries seen by state. faults: uint64 (8,), found by fault.
    """

    def __init__(self, rules: BatRules) -> None:
        if rules.chunk_ratio <= 0 or rules.block_units <= 0 or min(rules) < 0:
            message = f"a walk needs rules above 0, not {rules}"
            raise ValueError(message)
        self.rules = rules
        self.claims = np.zeros(-(-rules.file_units // 8), np.uint8)
        self.anchors = np.zeros(-(-rules.file_units // 8), np.uint8)
        self.states = np.zeros(BAT_STATE_COUNT, np.uint64)
        self.faults = np.zeros(len(BatFault), np.uint64)
        self._rows = np.zeros(len(BatFault) * rules.list_max, BAT_FINDING)
        self._findings = 0
        self._bitmap_blocks = 0
        self._partial_index = NO_INDEX

    @property
    def bitmap_blocks(self) -> int:
        """Sector-bitmap blocks that are present."""
        return self._bitmap_blocks

    @property
    def findings(self) -> Array:
        """The listed findings as rows of BAT_FINDING, in the order of the table."""
        return self._rows[: self._findings]

    def check(self, entries: Array, first: int) -> None:
        """Judge `entries`, native uint64, which stand in the table from entry `first` on.

        Windows come in order; entries between two of them count as 0.
        """
        rules = ffi.new("struct hvr_bat_rules *")
        rules.chunk_ratio, rules.block_count = self.rules.chunk_ratio, self.rules.block_count
        rules.block_units, rules.file_units = self.rules.block_units, self.rules.file_units
        rules.list_max, rules.has_parent = self.rules.list_max, self.rules.has_parent
        walk = ffi.new("struct hvr_bat_walk *")
        walk.claims = claims = writable_octets(self.claims)
        walk.anchors = anchors = writable_octets(self.anchors)
        walk.bitmap_bytes = len(claims)
        rows = ffi.from_buffer("struct hvr_bat_finding[]", self._rows, require_writable=True)
        walk.findings = rows
        walk.capacity, walk.finding_count = len(self._rows), self._findings
        walk.states, walk.faults = self.states.tolist(), self.faults.tolist()
        walk.bitmap_blocks, walk.partial_index = self._bitmap_blocks, self._partial_index
        status = lib.hvr_bat_check(u64s(entries), len(entries), first, rules, walk)
        if status != lib.HVR_OK or len(anchors) != len(claims):
            message = "the bitmaps of a walk must not change their length"
            raise ValueError(message)
        self._findings = walk.finding_count
        self.states[:] = list(walk.states)
        self.faults[:] = list(walk.faults)
        self._bitmap_blocks, self._partial_index = walk.bitmap_blocks, walk.partial_index

    def finish(self, entry_count: int) -> None:
        """End the walk behind the table's `entry_count` entries: the last chunk may still miss its bitmap."""
        chunk_entries = self.rules.chunk_ratio + 1
        behind = -(-entry_count // chunk_entries) * chunk_entries
        self.check(np.empty(0, np.uint64), behind)
