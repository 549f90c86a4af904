"""What can be mended in a VHDX, planned from what its check learned.

    anything corrupt   only copies are mended: of headers and, with an empty log, of region tables
    otherwise          replay of the log, BAT entries whose bits mean nothing, the end of the file

Headers come first in every plan: "the headers MUST be updated before any other part of the file is
modified", with a new FileWriteGuid; the update replaces the copy that is not current, so a bad one is mended
by the way. DataWriteGuid stays, because no guest sees a change, and children keep their parent.
Spec: [MS-VHDX] 2.2.2.1, 2.3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.disk.check.plan import NO_RANGES, RepairPlan, Step
from hvreplica.disk.check.vhdx_bat import bat_windows
from hvreplica.disk.check.vhdx_file import Entries
from hvreplica.disk.extents import merge
from hvreplica.disk.vhdx.headers import Headers
from hvreplica.errors import FormatError
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhdx_bat import BAT_ENTRY_BYTES, RESERVED_MASK, STATE_MASK, PayloadState, states_of
from hvreplica.formats.vhdx_header import (
    FILE_SIGNATURE,
    HEADER_BYTES,
    HEADER_OFFSETS,
    SEQUENCE_NUMBER_MAX,
)
from hvreplica.formats.vhdx_log import LOG_SECTOR_BYTES
from hvreplica.formats.vhdx_region import REGION_TABLE_BYTES, REGION_TABLE_OFFSETS
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hvreplica.clock import Clock
    from hvreplica.disk.check.findings import CheckReport
    from hvreplica.disk.check.vhdx_file import VhdxFile
    from hvreplica.files import BlockFile

_EMPTY_STATES = (PayloadState.PAYLOAD_BLOCK_NOT_PRESENT, PayloadState.PAYLOAD_BLOCK_ZERO)
_LOOSE_STATES = (
    PayloadState.PAYLOAD_BLOCK_UNDEFINED,
    PayloadState.PAYLOAD_BLOCK_UNMAPPED,
    PayloadState.PAYLOAD_BLOCK_UNMAPPED_V095,
)
_HEADER_UPDATES_MAX = 4  # of one repair


def plan_vhdx(subject: VhdxFile, report: CheckReport, clock: Clock) -> RepairPlan:
    """Return the steps that mend what `report` calls mendable; reads, and changes nothing."""
    header = subject.header
    if header is None or any(header.errors_within(subject.file.size())):
        return RepairPlan((), NIL, NIL)
    if header.sequence_number > SEQUENCE_NUMBER_MAX - _HEADER_UPDATES_MAX:
        return RepairPlan((), NIL, NIL)
    actions = {finding.repair for finding in report.findings if finding.repair is not None}
    steps = list(_steps(subject, actions, is_sound=report.status < 2))
    if not steps and "headers" not in actions:
        return RepairPlan((), NIL, NIL)
    after = clock.guid()
    return RepairPlan((_headers_step(subject, after), *steps), header.file_write_guid, after)


def vhdx_identity(file: BlockFile) -> uuid.UUID | None:
    """Return the FileWriteGuid of the current header, None where there is none."""
    try:
        return Headers(file).current.file_write_guid
    except FormatError:
        return None


def _headers_step(subject: VhdxFile, after: uuid.UUID) -> Step:
    header = subject.header
    order = [at for at in HEADER_OFFSETS if header is None or at != header.at]
    order += [at for at in HEADER_OFFSETS if at not in order]
    if all(subject.valid_headers):
        message = "give the file a new identity before it is changed"
    else:
        message = "write the bad header copy anew from the good one"

    def apply(file: BlockFile) -> None:
        Headers(file).update(file_write_guid=after)

    writes = np.array([(at, HEADER_BYTES) for at in order], np.int64)
    return Step("headers", message, apply, writes=writes)


def _steps(subject: VhdxFile, actions: set[Any], *, is_sound: bool) -> Iterator[Step]:
    if is_sound and subject.plan is not None:
        yield _log_step(subject)
    is_replayed = is_sound or (subject.header is not None and subject.header.log_guid == NIL)
    if "region-tables" in actions and is_replayed:
        yield _region_step(subject)
    if not is_sound:
        return
    if "identifier" in actions:
        yield _identifier_step()
    if "bat-entries" in actions:
        yield from _bat_steps(subject)
    if "file-end" in actions:
        yield from _end_steps(subject)


def _log_step(subject: VhdxFile) -> Step:
    plan = subject.plan
    if plan is None:
        raise TypeError("there is nothing to replay")

    def apply(file: BlockFile) -> None:
        plan.apply_to(file)
        Headers(file).update(log_guid=NIL)

    offsets = plan.data_offsets
    lengths = np.full(len(offsets), LOG_SECTOR_BYTES, np.int64)
    return Step(
        "log",
        f"replay the log ({len(offsets)} sectors, {len(plan.zeros)} zeroed ranges) and empty it",
        apply,
        writes=merge(np.column_stack((offsets, lengths))),
        erases=plan.zeros,
    )


def _region_step(subject: VhdxFile) -> Step:
    good = subject.valid_tables.index(True)
    target = REGION_TABLE_OFFSETS[1 - good]
    table = subject.view.read(REGION_TABLE_OFFSETS[good], REGION_TABLE_BYTES)

    def apply(file: BlockFile) -> None:
        file.write(table, target)
        file.sync()

    return Step(
        "region-tables",
        f"write region table {2 - good} anew from the other copy",
        apply,
        writes=np.array([(target, REGION_TABLE_BYTES)], np.int64),
    )


def _identifier_step() -> Step:
    def apply(file: BlockFile) -> None:
        file.write(FILE_SIGNATURE, 0)
        file.sync()

    return Step(
        "identifier",
        "write the signature at the start of the file",
        apply,
        writes=np.array([(0, len(FILE_SIGNATURE))], np.int64),
    )


def _bat_steps(subject: VhdxFile) -> Iterator[Step]:
    entries, bat, parameters = Entries.of(subject), subject.bat, subject.parameters
    if entries is None or bat is None or parameters is None:
        return
    base, has_parent = bat.file_offset, parameters.has_parent
    parts, count = [NO_RANGES], 0
    for first, window in bat_windows(subject, entries):
        changed = np.flatnonzero(mended(window, first, entries, has_parent=has_parent) != window)
        count += len(changed)
        sectors = np.unique((base + (first + changed) * BAT_ENTRY_BYTES) // LOG_SECTOR_BYTES)
        parts.append(np.column_stack((sectors, np.ones_like(sectors))) * LOG_SECTOR_BYTES)
    ranges = merge(np.concatenate(parts))

    def apply(file: BlockFile) -> None:
        for file_offset, length in ranges.tolist():
            for at in range(file_offset, file_offset + length, MIB):
                _mend_range(file, at, min(MIB, file_offset + length - at))
        file.sync()

    def _mend_range(file: BlockFile, at: int, length: int) -> None:
        first = (at - base) // BAT_ENTRY_BYTES
        row = np.frombuffer(bytearray(file.read(at, length)), np.uint64)
        kept = min(len(row), entries.present_count - first)  # what lies behind belongs to nobody
        row[:kept] = mended(row[:kept], first, entries, has_parent=has_parent)
        file.write(row.view(np.uint8).data, at)

    if len(ranges):
        yield Step(
            "bat-entries", f"clear bits without a meaning in {count} BAT entries", apply, writes=ranges
        )


def mended(
    window: NDArray[np.uint64], first: int, entries: Entries, *, has_parent: bool
) -> NDArray[np.uint64]:
    """Return entries, those from `first` of the table on, without bits that mean nothing. Pure.

    No state changes but to 0 in entries that no block has, and no place of a block or of a soft anchor.
    """
    indices = first + np.arange(len(window), dtype=np.int64)
    states = states_of(window)
    chunks, places = np.divmod(indices, entries.chunk_ratio + 1)
    is_bitmap = places == entries.chunk_ratio
    blocks = chunks * entries.chunk_ratio + places
    unused = np.where(is_bitmap, not has_parent, blocks >= entries.block_count)
    cleared = window.copy()
    empty = np.isin(states, _EMPTY_STATES) & ~(is_bitmap & (states != 0))
    cleared[empty] &= np.uint64(STATE_MASK)
    loose = np.isin(states, _LOOSE_STATES) & ~is_bitmap
    cleared[loose] &= np.uint64(~RESERVED_MASK & 0xFFFF_FFFF_FFFF_FFFF)
    cleared[unused] = 0
    return cleared


def _end_steps(subject: VhdxFile) -> Iterator[Step]:
    if subject.used_units is None:
        return
    old, new = subject.view.size(), subject.used_units * MIB
    if new > old:  # a fixed disk that never had all of its blocks: only its odd end is completed
        new = -(-old // MIB) * MIB

    def apply(file: BlockFile) -> None:
        file.resize(new)
        file.sync()

    if new != old:
        erases = np.array([(new, old - new)], np.int64) if new < old else NO_RANGES
        yield Step("file-end", f"set the length of the file to {new} bytes", apply, erases=erases)
