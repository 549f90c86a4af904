"""Level "log" of a VHDX: whether its own log is empty, and what a replay of it would leave.

A plan that can be carried out is laid over the file for all later levels. Spec: [MS-VHDX] 2.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.vhdx.overlay import OverlayFile
from hvreplica.disk.vhdx.replay import plan_replay, scan_log
from hvreplica.errors import FormatError
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhdx_log import LOG_ENTRY_HEADER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hvreplica.disk.check.findings import Findings
    from hvreplica.disk.check.vhdx_file import VhdxFile

_PLAN: Mapping[str, str] = {
    "FormatError": "log-no-sequence",
    "Truncated": "log-file-too-short",
    "UnsupportedVersion": "log-too-large",
    "FieldOutOfRange": "log-target",
}


def check_log(subject: VhdxFile, findings: Findings) -> None:
    """Check the log of the current header; leaves plan and view in `subject`."""
    header = subject.header
    if header is None or header.log_guid == NIL:
        return
    if any(header.errors_within(subject.file.size())):
        return  # told already: there is no log to look into
    for log_offset in scan_log(subject.file, header).torn:
        findings.add(
            "log-entry-torn",
            "a log entry is not whole; it is not part of the replay",
            offset=header.log_offset + log_offset,
            spec=LOG_ENTRY_HEADER.spec,
        )
    try:
        plan = plan_replay(subject.file, header)
    except FormatError as error:
        findings.add_errors([error], _PLAN)
        return
    subject.plan = plan
    subject.view = OverlayFile(subject.file, plan)
    findings.add(
        "log-dirty",
        "the file was not closed cleanly: its log must be replayed"
        f" ({len(plan.data_offsets)} sectors, {len(plan.zeros)} zeroed ranges)",
        offset=header.log_offset,
        field="log_guid",
        expected=NIL,
        actual=header.log_guid,
        spec="[MS-VHDX] 2.3.3",
        hint="`hvreplica disk repair` replays it, and so does any program that opens the disk for writing",
    )
