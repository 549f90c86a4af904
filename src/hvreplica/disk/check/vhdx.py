"""The check of a VHDX: its levels in order, each with what those before it learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.check.vhdx_bat import check_bat
from hvreplica.disk.check.vhdx_file import VhdxFile
from hvreplica.disk.check.vhdx_log import check_log
from hvreplica.disk.check.vhdx_parents import check_parents
from hvreplica.disk.check.vhdx_space import check_space
from hvreplica.disk.check.vhdx_structure import (
    check_headers,
    check_identifier,
    check_metadata,
    check_regions,
    check_size,
)
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhdx_bat import PayloadState

if TYPE_CHECKING:
    from hvreplica.disk.check.chain import Chain
    from hvreplica.disk.check.findings import Findings, Statistics
    from hvreplica.files import BlockFile


def check_vhdx(file: BlockFile, findings: Findings, statistics: Statistics, chain: Chain | None) -> VhdxFile:
    """Run the levels of `findings` on `file`, which is only read, and return what was learned.

    chain: where to look for parents; without one they are left out.

    Never raises for damage. Raises: OSError.
    """
    subject = VhdxFile(file, file)
    check_size(subject, findings)
    check_headers(subject, findings)
    check_log(subject, findings)
    check_regions(subject, findings)
    check_metadata(subject, findings)
    check_identifier(subject, findings)
    is_known = not findings.has("corrupt")  # else nobody can say what uses what
    if "bat" in findings.levels:
        check_bat(subject, findings)
    if "leaks" in findings.levels and is_known:
        check_space(subject, findings, statistics)
    if "parents" in findings.levels and chain is not None:
        check_parents(subject, findings, statistics, chain)
    _count(subject, statistics)
    return subject


def _count(subject: VhdxFile, statistics: Statistics) -> None:
    if subject.header is not None:
        statistics.log = "clean" if subject.header.log_guid == NIL else "dirty"
    if subject.parameters is not None:
        statistics.virtual_bytes = subject.parameters.virtual_bytes
        statistics.block_bytes = subject.parameters.block_bytes
    if subject.walk is not None:
        states = [int(count) for count in subject.walk.states]
        partial = states[PayloadState.PAYLOAD_BLOCK_PARTIALLY_PRESENT]
        statistics.blocks = subject.walk.rules.block_count
        statistics.allocated_blocks = states[PayloadState.PAYLOAD_BLOCK_FULLY_PRESENT] + partial
        statistics.partial_blocks = partial
        statistics.zero_blocks = states[PayloadState.PAYLOAD_BLOCK_ZERO]
        statistics.unmapped_blocks = (
            states[PayloadState.PAYLOAD_BLOCK_UNMAPPED] + states[PayloadState.PAYLOAD_BLOCK_UNMAPPED_V095]
        )
        statistics.bitmap_blocks = subject.walk.bitmap_blocks
