"""What can be mended in a VHD, planned from what its check learned.

    anything corrupt   only the copy of the footer at offset 0, from the one at the end
    otherwise          a footer at the end that a crash left out; the unused tail before the footer

One valid footer stands in the file at any instant. A VHD has no number that each writer changes, so an undo
knows its file by its unique_id and its BAT, which no repair changes: a file that got blocks since is refused.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import numpy as np

from hvreplica import native
from hvreplica.disk.check.plan import NO_RANGES, RepairPlan, Step
from hvreplica.disk.vhd.image import read_footer, read_image
from hvreplica.errors import FormatError
from hvreplica.formats.guid import NIL
from hvreplica.formats.vhd_footer import FOOTER_BYTES
from hvreplica.formats.vhd_header import BAT_ENTRY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.clock import Clock
    from hvreplica.disk.check.findings import CheckReport
    from hvreplica.disk.check.vhd import VhdFile
    from hvreplica.files import BlockFile


def plan_vhd(subject: VhdFile, report: CheckReport, clock: Clock) -> RepairPlan:
    """Return the steps that mend what `report` calls mendable; reads, and changes nothing."""
    del clock
    codes = {finding.code for finding in report.findings if finding.repair is not None}
    steps = list(_steps(subject, codes, is_sound=report.status < 2))
    identity = vhd_identity(subject.file) if steps else None
    if identity is None:
        return RepairPlan((), NIL, NIL)
    return RepairPlan(steps, identity, identity)


def vhd_identity(file: BlockFile) -> uuid.UUID | None:
    """Return a digest of unique_id and BAT, None where there is none."""
    try:
        footer = read_footer(file)
        if footer.is_fixed:
            return footer.unique_id
        image = read_image(file, footer)
        table = file.read(image.header.table_offset, image.geometry.block_count * BAT_ENTRY_BYTES)
    except FormatError:
        return None
    identified = footer.unique_id.bytes + table
    return uuid.UUID(bytes=native.fingerprints(identified, len(identified)).tobytes())


def _steps(subject: VhdFile, codes: set[str], *, is_sound: bool) -> Iterator[Step]:
    footer = subject.footer
    if footer is None or footer.is_fixed:
        return
    # As it stands there, byte for byte; an old one gets the last reserved byte that it lacks.
    packed = subject.file.read(footer.at, footer.footer_bytes).ljust(FOOTER_BYTES, b"\0")
    if subject.has_tail and codes & {"footer-copy-invalid", "footer-copy-differs"}:
        yield _copy_step(packed)
    if not is_sound or subject.used_end is None:
        return
    if not subject.has_tail:
        yield _tail_step(subject, packed, subject.used_end)
    elif "file-tail-unused" in codes:
        yield _cut_step(subject, packed, subject.used_end)


def _copy_step(packed: bytes) -> Step:
    def apply(file: BlockFile) -> None:
        file.write(packed, 0)
        file.sync()

    writes = np.array([(0, FOOTER_BYTES)], np.int64)
    return Step("footers", "write the copy of the footer anew from the footer", apply, writes=writes)


def _tail_step(subject: VhdFile, packed: bytes, at: int) -> Step:
    def apply(file: BlockFile) -> None:
        file.write(packed, at)
        file.resize(at + FOOTER_BYTES)
        file.sync()

    size = subject.file.size()
    behind = size - at - FOOTER_BYTES
    return Step(
        "footers",
        f"write the footer anew from its copy, behind the last use of the file, at {at}",
        apply,
        writes=np.array([(at, FOOTER_BYTES)], np.int64),
        erases=np.array([(at + FOOTER_BYTES, behind)], np.int64) if behind > 0 else NO_RANGES,
    )


def _cut_step(subject: VhdFile, packed: bytes, at: int) -> Step:
    def apply(file: BlockFile) -> None:
        file.write(packed, at)
        file.sync()
        file.resize(at + FOOTER_BYTES)
        file.sync()

    behind = subject.file.size() - at - FOOTER_BYTES
    return Step(
        "file-end",
        f"set the length of the file to {at + FOOTER_BYTES} bytes, with the footer at its end",
        apply,
        writes=np.array([(at, FOOTER_BYTES)], np.int64),
        erases=np.array([(at + FOOTER_BYTES, behind)], np.int64),
    )
