"""Every code that a check may give: its level, how bad it is, what mends it; docs/check.md is made from it.

A code keeps its meaning for ever. Severities:

    info         nothing is wrong, but worth knowing
    warning      other programs may stumble over it; the guest's data is whole
    repairable   the file breaks its format, and all that is needed to mend it is there
    corrupt      data may be wrong or lost, or the file cannot be judged; nothing here mends it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

Level = Literal["structure", "log", "bat", "leaks", "parents"]
Severity = Literal["info", "warning", "repairable", "corrupt"]
Repair = Literal["identifier", "headers", "region-tables", "log", "bat-entries", "footers", "file-end"]

LEVELS: tuple[Level, ...] = ("structure", "log", "bat", "leaks", "parents")
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "repairable", "corrupt")
# A level is run together with those whose outcome it reads.
NEEDED_LEVELS: Mapping[Level, tuple[Level, ...]] = {
    "structure": ("structure",),
    "log": ("structure", "log"),
    "bat": ("structure", "log", "bat"),
    "leaks": ("structure", "log", "bat", "leaks"),
    "parents": ("structure", "log", "parents"),
}


class Code(NamedTuple):
    """What is known of a code. repair: the action of `disk repair` that mends it, if there is one."""

    level: Level
    severity: Severity
    meaning: str
    repair: Repair | None = None


CODES: Mapping[str, Code] = {
    # structure
    "file-truncated": Code("structure", "corrupt", "the file ends inside its header section"),
    "file-too-long": Code("structure", "corrupt", "the file is longer than any VHDX can be"),
    "size-not-sectors": Code("structure", "warning", "a raw disk's size is no multiple of 512 bytes"),
    "identifier-signature": Code(
        "structure",
        "repairable",
        "the file does not start with `vhdxfile`, but all that follows is that of a VHDX",
        "identifier",
    ),
    "header-signature": Code(
        "structure", "repairable", "a header copy does not start as one; the other is valid", "headers"
    ),
    "header-checksum": Code(
        "structure", "repairable", "a header copy has a wrong checksum; the other is valid", "headers"
    ),
    "no-valid-header": Code("structure", "corrupt", "neither header copy is valid"),
    "header-sequence-equal": Code(
        "structure",
        "info",
        "both headers have one sequence number, as Disk2VHD writes; the first counts",
    ),
    "header-version": Code("structure", "corrupt", "a version of the format that is not known here"),
    "header-log-version": Code("structure", "corrupt", "a log that is not empty has an unknown version"),
    "header-log-misaligned": Code(
        "structure", "corrupt", "place or length of the log is no multiple of 1 MiB, or absurd"
    ),
    "header-log-missing": Code("structure", "corrupt", "the log is not empty, and has length 0"),
    "header-log-overlap": Code("structure", "corrupt", "the log lies in the header section"),
    "header-log-outside-file": Code("structure", "corrupt", "the file ends before its log does"),
    "region-table-signature": Code(
        "structure",
        "repairable",
        "a copy of the region table does not start as one; the other is valid",
        "region-tables",
    ),
    "region-table-checksum": Code(
        "structure",
        "repairable",
        "a copy of the region table has a wrong checksum; the other is valid",
        "region-tables",
    ),
    "region-table-count": Code(
        "structure",
        "repairable",
        "a copy of the region table has more than 2047 entries; the other is valid",
        "region-tables",
    ),
    "no-valid-region-table": Code("structure", "corrupt", "neither copy of the region table is valid"),
    "region-tables-differ": Code(
        "structure", "warning", "both copies of the region table are valid, and differ; the first counts"
    ),
    "region-duplicate": Code("structure", "corrupt", "a region is listed twice"),
    "region-misaligned": Code(
        "structure", "corrupt", "a region is not on a 1 MiB boundary behind the header section"
    ),
    "region-missing": Code("structure", "corrupt", "there is no BAT, or no metadata region"),
    "region-not-required": Code(
        "structure",
        "info",
        "BAT or metadata is not marked required, as by qemu; VirtualBox refuses that",
    ),
    "region-outside-file": Code("structure", "corrupt", "the file ends before a region does"),
    "region-overlap": Code("structure", "corrupt", "a region or the log lies in another one"),
    "region-unknown": Code("structure", "info", "a region that is not known and not required; it is kept"),
    "region-unknown-required": Code("structure", "corrupt", "the file needs a region that is not known here"),
    "metadata-signature": Code("structure", "corrupt", "the metadata table does not start as one"),
    "metadata-count": Code("structure", "corrupt", "the metadata table has too many entries"),
    "metadata-item-duplicate": Code("structure", "corrupt", "a metadata item is listed twice"),
    "metadata-item-flags": Code("structure", "corrupt", "a metadata item has unknown flags"),
    "metadata-item-length": Code("structure", "corrupt", "a metadata item has an impossible length"),
    "metadata-item-missing": Code("structure", "corrupt", "a metadata item that every VHDX has is missing"),
    "metadata-item-outside-region": Code(
        "structure", "corrupt", "a metadata item lies outside of the metadata region"
    ),
    "metadata-item-overlap": Code("structure", "corrupt", "two metadata items overlap"),
    "metadata-item-size": Code("structure", "corrupt", "a known metadata item has a wrong length"),
    "metadata-item-unknown": Code(
        "structure", "info", "a metadata item that is not known and not required; it is kept"
    ),
    "metadata-item-unknown-required": Code(
        "structure", "corrupt", "the file is unfinished, or needs a metadata item that is not known here"
    ),
    "parameter-block-size": Code("structure", "corrupt", "the block size is not allowed"),
    "parameter-flags": Code("structure", "corrupt", "the file parameters have unknown flags"),
    "parameter-logical-sector-size": Code("structure", "corrupt", "the logical sector is not 512 or 4096"),
    "parameter-physical-sector-size": Code("structure", "corrupt", "the physical sector is not 512 or 4096"),
    "parameter-disk-size": Code("structure", "corrupt", "the size of the disk is not allowed"),
    # structure of a VHD
    "no-valid-footer": Code("structure", "corrupt", "VHD: neither footer nor a copy of it is valid"),
    "footer-missing": Code(
        "structure",
        "repairable",
        "VHD: no valid footer at the end, as a crash leaves it; the copy at the start is",
        "footers",
    ),
    "footer-copy-invalid": Code(
        "structure", "repairable", "VHD: the copy of the footer is not valid; the footer is", "footers"
    ),
    "footer-copy-differs": Code(
        "structure", "warning", "VHD: footer and copy are valid, and differ; the footer counts", "footers"
    ),
    "footer-old": Code("structure", "info", "VHD: a footer of 511 bytes, as Virtual PC wrote it"),
    "footer-version": Code("structure", "corrupt", "VHD: a version of the format that is not known here"),
    "footer-disk-type": Code("structure", "corrupt", "VHD: the type of the disk is not 2, 3 or 4"),
    "footer-disk-size": Code("structure", "corrupt", "VHD: the size of the disk is not allowed"),
    "footer-data-offset": Code("structure", "corrupt", "VHD: the dynamic disk header cannot stand there"),
    "footer-file-too-short": Code(
        "structure", "corrupt", "VHD: the file ends before the disk or its dynamic disk header does"
    ),
    "dynamic-header-cookie": Code("structure", "corrupt", "VHD: there is no dynamic disk header"),
    "dynamic-header-checksum": Code(
        "structure", "corrupt", "VHD: the dynamic disk header, which has no copy, has a wrong checksum"
    ),
    "dynamic-header-version": Code(
        "structure", "corrupt", "VHD: a dynamic disk header of a version that is not known here"
    ),
    "dynamic-header-block-size": Code("structure", "corrupt", "VHD: the block size is not allowed"),
    "dynamic-header-table-entries": Code(
        "structure", "corrupt", "VHD: the BAT has fewer entries than the disk has blocks"
    ),
    "dynamic-header-table-offset": Code("structure", "corrupt", "VHD: the BAT cannot stand there"),
    "batmap-invalid": Code(
        "structure", "warning", "VHD: the batmap that XenServer believes is missing or damaged"
    ),
    # log
    "log-dirty": Code("log", "repairable", "the file was not closed cleanly; its log can be replayed", "log"),
    "log-entry-torn": Code(
        "log", "info", "a log entry is not whole, as a power cut leaves it; it is not part of the replay"
    ),
    "log-file-too-short": Code(
        "log", "corrupt", "the file is shorter than FlushedFileOffset says it was: it was cut off"
    ),
    "log-no-sequence": Code("log", "corrupt", "the log is not empty, and no entries in it can be replayed"),
    "log-target": Code("log", "corrupt", "the log wants to change the headers, itself, or an absurd place"),
    "log-too-large": Code("log", "corrupt", "the log holds more than can be replayed here"),
    # bat
    "bat-too-short": Code("bat", "corrupt", "the BAT region is too short for the size of the disk"),
    "bat-state": Code("bat", "corrupt", "a BAT entry has a state that it cannot have"),
    "bat-reserved-bits": Code("bat", "corrupt", "a BAT entry with a place in the file has reserved bits set"),
    "bat-block-outside-file": Code("bat", "corrupt", "a block does not end inside the file"),
    "bat-block-in-structure": Code("bat", "corrupt", "a block lies in the header section, log or a region"),
    "bat-block-overlap": Code("bat", "corrupt", "two blocks lie in the same place"),
    "bat-bitmap-missing": Code(
        "bat",
        "corrupt",
        "a PARTIALLY_PRESENT block has no sector bitmap that tells its sectors",
    ),
    "bat-stale-bits": Code(
        "bat",
        "warning",
        "an entry without a place keeps an offset or reserved bits; Hyper-V refuses a ZERO block that does",
        "bat-entries",
    ),
    "bat-unused-entry": Code(
        "bat", "warning", "an entry that no block has is not 0, as qemu before 7.2.2 left some", "bat-entries"
    ),
    "bat-state-reserved": Code("bat", "info", "blocks have state 5, UNMAPPED before the format was final"),
    "bat-anchor-outside-file": Code(
        "bat", "warning", "an UNDEFINED or UNMAPPED block keeps a place that is not in the file"
    ),
    "bat-anchor-overlap": Code(
        "bat", "warning", "an UNDEFINED or UNMAPPED block keeps a place that something else has"
    ),
    "bat-blocks-unaligned": Code(
        "bat", "info", "VHD: data of blocks is not on a boundary of 4 KiB, as of qemu and VirtualBox"
    ),
    "bat-entry-beyond-disk": Code(
        "bat", "info", "VHD: entries behind those that the disk needs are not 0xffffffff"
    ),
    # leaks
    "space-unused": Code(
        "leaks", "info", "space inside of the file that nothing uses, as trimmed blocks leave it"
    ),
    "file-tail-unused": Code("leaks", "warning", "space behind the last use of the file", "file-end"),
    "file-end-unaligned": Code("leaks", "warning", "the file does not end on a 1 MiB boundary", "file-end"),
    # parents
    "parent-locator-missing": Code("parents", "corrupt", "a differencing disk that names no parent"),
    "parent-locator-malformed": Code(
        "parents", "corrupt", "the parent locator breaks its format, or lacks the parent's identity or path"
    ),
    "parent-locator-type": Code("parents", "corrupt", "the parent is of a kind that is not known here"),
    "parent-missing": Code("parents", "corrupt", "a parent is not where any of its names leads"),
    "parent-damaged": Code("parents", "corrupt", "a parent is damaged itself; check its file"),
    "parent-format": Code("parents", "corrupt", "a parent has another format than its child"),
    "parent-linkage": Code(
        "parents", "corrupt", "a parent is another disk, or was written to after its child was made"
    ),
    "parent-sector-size": Code("parents", "corrupt", "parent and child have sectors of different sizes"),
    "parent-loop": Code("parents", "corrupt", "the chain of parents leads back to a disk in it"),
    "parent-in-use": Code("parents", "warning", "a parent is open for writing, and was not looked at"),
    "parent-locator-unused": Code("parents", "warning", "a parent locator in a disk without a parent"),
}
