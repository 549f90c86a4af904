"""Level "bat" of a VHDX: every entry, read in windows and judged by a kernel.

Memory: one window, and two bits for each MiB of the file. Only what is wrong becomes an object.
Spec: [MS-VHDX] 2.4, 2.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hvreplica import native
from hvreplica.disk.check.findings import LIST_MAX
from hvreplica.disk.check.vhdx_file import Entries
from hvreplica.formats.vhdx_bat import BAT_ENTRY, BAT_ENTRY_BYTES, STATE_MASK, PayloadState
from hvreplica.native import BatFault, BatRules, BatWalk
from hvreplica.units import MIB, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.disk.check.findings import Findings
    from hvreplica.disk.check.vhdx_file import VhdxFile

_WINDOW_BYTES = 4 * MIB
_STATES_SPEC = "[MS-VHDX] 2.5.1.1"


class _Words(NamedTuple):
    code: str
    field: str
    what: str
    expected: int | None = None
    spec: str = _STATES_SPEC


_FAULTS = {
    BatFault.STATE: _Words("bat-state", "state", "has a state that it cannot have"),
    BatFault.RESERVED: _Words("bat-reserved-bits", "reserved", "has reserved bits set", 0, BAT_ENTRY.spec),
    BatFault.OUTSIDE: _Words(
        "bat-block-outside-file", "file_offset_mb", "ends beyond the file", spec=BAT_ENTRY.spec
    ),
    BatFault.NO_BITMAP: _Words("bat-bitmap-missing", "state", "needs a sector bitmap, and has none"),
    BatFault.STALE: _Words("bat-stale-bits", "entry", "has no place in the file, and bits beside its state"),
    BatFault.ANCHOR_OUTSIDE: _Words(
        "bat-anchor-outside-file", "file_offset_mb", "keeps a place that is not in the file"
    ),
    BatFault.UNUSED: _Words(
        "bat-unused-entry", "entry", "is not used by this disk, and is not 0", 0, "[MS-VHDX] 2.5"
    ),
}


def bat_windows(subject: VhdxFile, entries: Entries) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield (index of the first entry, entries) of what the table holds, in order; the rest is 0.

    A window is only good until the next one is asked for.
    """
    bat = subject.bat
    if bat is None:
        return
    start = bat.file_offset
    end = start + entries.present_count * BAT_ENTRY_BYTES
    buffer = np.empty(_WINDOW_BYTES // BAT_ENTRY_BYTES, np.uint64)
    done = start
    for file_offset, length in subject.view.data_extents(start, end):
        # The file system's grains need not be those of entries.
        stop = min(align_up(file_offset + length, BAT_ENTRY_BYTES), end)
        done = max(done, align_down(file_offset, BAT_ENTRY_BYTES))
        while done < stop:
            window = buffer[: min(stop - done, _WINDOW_BYTES) // BAT_ENTRY_BYTES]
            subject.view.read_into(window.view(np.uint8).data, done)
            yield (done - start) // BAT_ENTRY_BYTES, window
            done += window.nbytes


def check_bat(subject: VhdxFile, findings: Findings) -> None:
    """Check every entry; leaves the walk, with its claims and counts, in `subject`."""
    entries = Entries.of(subject)
    if entries is None or subject.parameters is None or subject.bat is None:
        return
    if entries.present_count < entries.needed_count:
        findings.add(
            "bat-too-short",
            "the BAT is too short for the size of the disk",
            offset=subject.bat.at,
            field="length",
            expected=f"at least {entries.needed_count * BAT_ENTRY_BYTES}",
            actual=min(subject.bat.length, entries.present_count * BAT_ENTRY_BYTES),
            spec="[MS-VHDX] 2.5",
        )
    walk = BatWalk(
        BatRules(
            chunk_ratio=entries.chunk_ratio,
            block_count=entries.block_count,
            block_units=subject.parameters.block_bytes // MIB,
            file_units=subject.file_units,
            has_parent=subject.parameters.has_parent,
            list_max=LIST_MAX,
        )
    )
    for file_offset, length, _ in subject.structures():
        first, last = file_offset // MIB, min(-(-(file_offset + length) // MIB), walk.rules.file_units)
        if first < last:
            native.bitmap_set(walk.claims, first, last - first)
    for index, window in bat_windows(subject, entries):
        walk.check(window, index)
    walk.finish(entries.present_count)
    subject.walk = walk
    _tell(subject, entries, walk, findings)


def _tell(subject: VhdxFile, entries: Entries, walk: BatWalk, findings: Findings) -> None:
    at = subject.bat.file_offset if subject.bat is not None else 0
    shared: list[tuple[int, int]] = []
    for index, entry, number in walk.findings.tolist():
        fault = BatFault(number)
        if fault == BatFault.SHARED:
            shared.append((index, entry))
            continue
        words = _FAULTS[fault]
        values = {"state": entry & STATE_MASK, "file_offset_mb": entry >> 20}
        if fault == BatFault.NO_BITMAP:
            values["state"] = PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT
        findings.add(
            words.code,
            f"the entry of {entries.name(index)} {words.what}",
            offset=at + index * BAT_ENTRY_BYTES,
            field=words.field,
            expected=words.expected,
            actual=values.get(words.field, f"0x{entry:016x}"),
            spec=words.spec,
        )
    listed = np.bincount(walk.findings["fault"].astype(np.intp), minlength=len(BatFault)).tolist()
    for fault, words in _FAULTS.items():
        findings.count_more(words.code, int(walk.faults[fault]) - listed[fault])
    findings.count_more("bat-block-overlap", int(walk.faults[BatFault.SHARED]) - len(shared))
    _tell_shared(subject, entries, shared, findings)
    _tell_states(subject, walk, findings)


def _tell_shared(
    subject: VhdxFile, entries: Entries, shared: list[tuple[int, int]], findings: Findings
) -> None:
    block_bytes = subject.parameters.block_bytes if subject.parameters is not None else 0
    at = subject.bat.file_offset if subject.bat is not None else 0
    holders = _holders(subject, entries, shared) if shared else {}
    for index, entry in shared:
        start = (entry >> 20) * MIB
        end = start + (MIB if entries.is_bitmap(index) else block_bytes)
        inside = next(
            (
                name
                for offset, length, name in subject.structures()
                if offset < end and start < offset + length
            ),
            None,
        )
        holder = holders.get(index)
        place: dict[str, Any] = {
            "offset": at + index * BAT_ENTRY_BYTES,
            "field": "file_offset_mb",
            "actual": entry >> 20,
            "spec": BAT_ENTRY.spec,
        }
        if inside is not None:
            findings.add("bat-block-in-structure", f"{entries.name(index)} lies in the {inside}", **place)
        else:
            other = entries.name(holder) if holder is not None else "another block"
            findings.add(
                "bat-block-overlap",
                f"{entries.name(index)} lies in the place of {other}",
                hint="of two blocks one overwrote the other; restore the disk from a copy",
                **place,
            )


def _holders(subject: VhdxFile, entries: Entries, shared: list[tuple[int, int]]) -> dict[int, int]:
    """Return for each of the entries another one that has some of its place: a second look at the table."""
    found: dict[int, int] = {}
    units = subject.parameters.block_bytes // MIB if subject.parameters is not None else 1
    for first, window in bat_windows(subject, entries):
        states = window & np.uint64(STATE_MASK)
        chosen = np.flatnonzero(states >= np.uint64(PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT))
        starts = (window[chosen] >> np.uint64(20)).astype(np.int64)
        indices = chosen + first
        is_bitmap = indices % (entries.chunk_ratio + 1) == entries.chunk_ratio
        lengths = np.where(is_bitmap, 1, units)
        for index, entry in shared:
            if index in found:
                continue
            start = entry >> 20
            end = start + (1 if entries.is_bitmap(index) else units)
            hits = np.flatnonzero((starts < end) & (start < starts + lengths) & (indices != index))
            if len(hits):
                found[index] = int(indices[hits[0]])
    return found


def _tell_states(subject: VhdxFile, walk: BatWalk, findings: Findings) -> None:
    old = int(walk.states[PayloadState.PAYLOAD_BLOCK_UNMAPPED_V095])
    if old:
        findings.add(
            "bat-state-reserved",
            f"{old} blocks have state 5, which meant UNMAPPED before the format was final",
            field="state",
            expected=int(PayloadState.PAYLOAD_BLOCK_UNMAPPED),
            actual=5,
            spec=_STATES_SPEC,
        )
    both = int(np.bitwise_count(walk.claims & walk.anchors).sum())
    if both:
        findings.add(
            "bat-anchor-overlap",
            f"UNDEFINED or UNMAPPED blocks keep {both} MiB that something else has",
            offset=subject.bat.file_offset if subject.bat is not None else None,
            field="file_offset_mb",
            spec=BAT_ENTRY.spec,
        )
