"""The check of a VHD: footers, dynamic disk header, BAT, space, parents. A VHD has no log.

Spec: VHD 1.0 (2006).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.disk.check.vhd_blocks import check_blocks, check_space
from hvreplica.disk.vhd.image import read_image
from hvreplica.errors import FormatError, HvReplicaError
from hvreplica.formats.vhd_batmap import BATMAP_CREATOR, BATMAP_HEADER
from hvreplica.formats.vhd_footer import (
    FOOTER,
    FOOTER_BYTES,
    OLD_FOOTER_BYTES,
    Footer,
    VhdType,
    choose_footer,
    unpack_footer,
)
from hvreplica.formats.vhd_header import DYNAMIC_HEADER, DYNAMIC_HEADER_BYTES, unpack_dynamic_header

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from hvreplica.disk.check.chain import Chain
    from hvreplica.disk.check.findings import Findings, Statistics
    from hvreplica.disk.vhd.image import Image
    from hvreplica.files import BlockFile

_FOOTER: Mapping[str, str] = {
    "UnsupportedVersion": "footer-version",
    "FieldOutOfRange disk_type": "footer-disk-type",
    "FieldOutOfRange current_size": "footer-disk-size",
    "FieldOutOfRange data_offset": "footer-data-offset",
    "Truncated": "footer-file-too-short",
}
_HEADER: Mapping[str, str] = {
    "BadSignature": "dynamic-header-cookie",
    "ChecksumMismatch": "dynamic-header-checksum",
    "UnsupportedVersion": "dynamic-header-version",
    "FieldOutOfRange block_size": "dynamic-header-block-size",
    "FieldOutOfRange max_table_entries": "dynamic-header-table-entries",
    "FieldOutOfRange table_offset": "dynamic-header-table-offset",
    "Overlap": "dynamic-header-table-offset",
    "Truncated": "bat-too-short",
}


@dataclass(slots=True)
class VhdFile:
    """What a check has learned of one VHD.

    footer: the one that counts. has_tail: whether that is the one at the end. image: of disks that are not
    fixed. offsets: where the bitmaps of blocks stand. used_end: file offset behind the last use, the footer
    at the end not counted. None where it could not be told.
    """

    file: BlockFile
    footer: Footer | None = None
    has_tail: bool = False
    image: Image | None = None
    offsets: NDArray[np.int64] | None = None
    used_end: int | None = None


def check_vhd(file: BlockFile, findings: Findings, statistics: Statistics, chain: Chain | None) -> VhdFile:
    """Run the levels of `findings` on `file`, which is only read, and return what was learned.

    chain: where to look for parents; without one they are left out. Never raises for damage. Raises: OSError.
    """
    subject = VhdFile(file)
    statistics.log = "none"
    _check_footers(subject, findings)
    if subject.footer is not None and not findings.has("corrupt"):
        statistics.virtual_bytes = subject.footer.current_size
        if subject.footer.is_fixed:
            _check_fixed(subject.footer, findings, statistics)
        else:
            _check_header(subject, subject.footer, findings)
    if subject.image is None:
        return subject
    statistics.block_bytes = subject.image.geometry.block_bytes
    statistics.blocks = subject.image.geometry.block_count
    if "bat" in findings.levels:
        subject.offsets = check_blocks(file, subject.image, findings, statistics)
    if "leaks" in findings.levels and subject.offsets is not None:
        subject.used_end = check_space(file, subject.image, subject.offsets, findings, statistics)
    if "parents" in findings.levels and chain is not None and subject.image.has_parent:
        _check_parents(subject.image, findings, statistics, chain)
    return subject


def _check_footers(subject: VhdFile, findings: Findings) -> None:
    size = subject.file.size()
    trailing = [
        _footer_at(subject.file, size - length, length) for length in (FOOTER_BYTES, OLD_FOOTER_BYTES)
    ]
    copy = _footer_at(subject.file, 0, FOOTER_BYTES)
    try:
        footer = choose_footer(trailing, copy, file_size_bytes=size)
    except FormatError as error:
        findings.add_error("no-valid-footer", error)
        return
    subject.footer = footer
    subject.has_tail = footer.at > 0 and footer.at + footer.footer_bytes == size
    if not subject.has_tail:
        findings.add(
            "footer-missing",
            "no valid footer of this disk stands at the end of the file; its copy at the start counts",
            offset=max(size - FOOTER_BYTES, 0),
            spec=FOOTER.spec,
            hint="`hvreplica disk repair` writes it again, and so does opening the disk for writing",
        )
    elif not footer.is_fixed:
        _check_copy(subject, footer, copy, findings)
    if footer.footer_bytes == OLD_FOOTER_BYTES:
        findings.add("footer-old", "the footer has 511 bytes, as Virtual PC wrote it", offset=footer.at)
    try:
        footer.validate_within(size)
    except FormatError as error:
        findings.add_errors([error], _FOOTER)


def _check_copy(subject: VhdFile, footer: Footer, copy: Footer | FormatError, findings: Findings) -> None:
    error = copy if isinstance(copy, FormatError) else None
    if isinstance(copy, Footer):
        try:
            copy.validate()
        except FormatError as invalid:
            error = invalid
    length = footer.footer_bytes
    if error is not None:
        findings.add_error("footer-copy-invalid", error)
    elif subject.file.read(0, length) != subject.file.read(footer.at, length):
        findings.add(
            "footer-copy-differs",
            "the copy of the footer differs from the footer at the end, which counts",
            offset=0,
            spec=FOOTER.spec,
        )


def _footer_at(file: BlockFile, file_offset: int, length: int) -> Footer | FormatError:
    try:
        return unpack_footer(
            file.read(file_offset, length) if file_offset >= 0 else b"", file_offset=file_offset
        )
    except FormatError as error:
        return error


def _check_fixed(footer: Footer, findings: Findings, statistics: Statistics) -> None:
    unused = statistics.file_bytes - footer.current_size - footer.footer_bytes
    if "leaks" not in findings.levels:
        return
    statistics.used_bytes = footer.current_size + footer.footer_bytes
    statistics.leaked_bytes, statistics.tail_bytes = unused, 0
    if unused:
        findings.add(
            "space-unused",
            f"{unused} bytes between the disk's end and the footer are in no use",
            offset=footer.current_size,
        )


def _check_header(subject: VhdFile, footer: Footer, findings: Findings) -> None:
    """Check the dynamic disk header, and leave what the file is in `subject`."""
    size = subject.file.size()
    at = footer.data_offset
    try:
        header = unpack_dynamic_header(subject.file.read(at, DYNAMIC_HEADER_BYTES), file_offset=at)
        header.validate()
        header.validate_within(size, virtual_bytes=footer.current_size)
    except FormatError as error:
        findings.add_errors([error], _HEADER)
        return
    subject.image = read_image(subject.file, footer)
    if footer.creator_application.startswith(BATMAP_CREATOR) and not subject.image.has_batmap:
        findings.add(
            "batmap-invalid",
            "XenServer made this file, and its batmap is missing or damaged; nothing here reads it",
            offset=header.table_offset,
            spec=BATMAP_HEADER.spec,
        )


def _check_parents(image: Image, findings: Findings, statistics: Statistics, chain: Chain) -> None:
    for entry in image.header.locators:
        try:
            entry.validate_within(statistics.file_bytes)
        except HvReplicaError as error:
            # One damaged name need not hide the parent that another one names.
            findings.add_error("parent-locator-malformed", error, severity="warning")
    if image.footer.disk_type == VhdType.DIFFERENCING and not image.parent_names:
        findings.add(
            "parent-locator-missing",
            "this is a differencing disk, and it names no parent",
            offset=image.header.at + DYNAMIC_HEADER.offset_of("parent_unicode_name"),
            field="parent_unicode_name",
            spec=DYNAMIC_HEADER.spec,
        )
        return
    chain.check(findings, statistics)
