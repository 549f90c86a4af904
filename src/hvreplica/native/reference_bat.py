"""The same walk over a BAT as native/bat.py in plain Python: slow, short, and the oracle of its tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.native.bat import NO_INDEX, BatFault

if TYPE_CHECKING:
    from hvreplica.native.bat import BatRules

_RESERVED_MASK = 0xFFFF8


class ReferenceWalk:
    """As BatWalk, but with sets of MiB in the place of bitmaps, and lists."""

    def __init__(self, rules: BatRules, structures: set[int]) -> None:
        self.rules = rules
        self.claims = set(structures)
        self.anchors: set[int] = set()
        self.states = [0] * 8
        self.faults = [0] * len(BatFault)
        self.findings: list[tuple[int, int, int]] = []
        self.bitmap_blocks = 0
        self._partial_index = NO_INDEX

    def check(self, entries: list[int], first: int) -> None:
        """Judge the window."""
        rules = self.rules
        if self._partial_index // (rules.chunk_ratio + 1) < first // (rules.chunk_ratio + 1):
            self._end_chunk(0)
        for index, entry in enumerate(entries, start=first):
            chunk, place = divmod(index, rules.chunk_ratio + 1)
            if place == rules.chunk_ratio:
                self._check_bitmap(index, entry)
            elif chunk * rules.chunk_ratio + place < rules.block_count:
                self._check_payload(index, entry)
            elif entry:
                self._report(BatFault.UNUSED, index, entry)

    def _check_payload(self, index: int, entry: int) -> None:
        state, unit, units = entry & 7, entry >> 20, self.rules.block_units
        self.states[state] += 1
        if state == 4 or (state == 7 and not self.rules.has_parent):
            self._report(BatFault.STATE, index, entry)
        if state in {0, 2} and entry != state:
            self._report(BatFault.STALE, index, entry)
        if state in {1, 3, 5}:
            if entry & _RESERVED_MASK:
                self._report(BatFault.STALE, index, entry)
            if unit and unit + units > self.rules.file_units:
                self._report(BatFault.ANCHOR_OUTSIDE, index, entry)
            elif unit:
                self.anchors |= set(range(unit, unit + units))
        if state == 7 and self.rules.has_parent and self._partial_index == NO_INDEX:
            self._partial_index = index
        if state in {6, 7}:
            self._check_place(index, entry, units)

    def _check_bitmap(self, index: int, entry: int) -> None:
        if not self.rules.has_parent:
            if entry:
                self._report(BatFault.UNUSED, index, entry)
        elif entry & 7 in {6, 7}:
            self.bitmap_blocks += 1
            self._partial_index = NO_INDEX
            self._check_place(index, entry, 1)
        else:
            if entry & 7:
                self._report(BatFault.STATE, index, entry)
            elif entry:
                self._report(BatFault.STALE, index, entry)
            self._end_chunk(entry)

    def _check_place(self, index: int, entry: int, units: int) -> None:
        place = set(range(entry >> 20, (entry >> 20) + units))
        if entry & _RESERVED_MASK:
            self._report(BatFault.RESERVED, index, entry)
        if max(place) >= self.rules.file_units:
            self._report(BatFault.OUTSIDE, index, entry)
            return
        if place & self.claims:
            self._report(BatFault.SHARED, index, entry)
        self.claims |= place

    def _end_chunk(self, entry: int) -> None:
        if self._partial_index != NO_INDEX:
            self._report(BatFault.NO_BITMAP, self._partial_index, entry)
            self._partial_index = NO_INDEX

    def _report(self, fault: BatFault, index: int, entry: int) -> None:
        if self.faults[fault] < self.rules.list_max:
            self.findings.append((index, entry, int(fault)))
        self.faults[fault] += 1
