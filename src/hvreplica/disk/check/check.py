"""Check the file of a disk: tell its format, run its levels, report. The file is only read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvreplica.disk.check.chain import Chain
from hvreplica.disk.check.codes import LEVELS, NEEDED_LEVELS
from hvreplica.disk.check.findings import Findings, Statistics
from hvreplica.disk.check.raw import check_raw
from hvreplica.disk.check.vhd import check_vhd
from hvreplica.disk.check.vhdx import check_vhdx
from hvreplica.disk.open import format_of
from hvreplica.disk.vhd.open import looks_like_vhd
from hvreplica.errors import FormatError
from hvreplica.formats.vhdx_header import FILE_SIGNATURE, HEADER_BYTES, HEADER_OFFSETS, unpack_header

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    from hvreplica.clock import Clock
    from hvreplica.disk.check.codes import Level
    from hvreplica.disk.check.findings import CheckReport
    from hvreplica.files import BlockFile, FileSystem

# What a file claims to be that says nothing of itself any more.
_BY_ENDING = {".vhdx": "vhdx", ".avhdx": "vhdx", ".vhd": "vhd", ".avhd": "vhd"}
CHECKS: Mapping[str, Callable[[BlockFile, Findings, Statistics, Chain | None], Any]] = {
    "raw": check_raw,
    "vhd": check_vhd,
    "vhdx": check_vhdx,
}


def check_disk(
    files: FileSystem,
    path: str | os.PathLike[str],
    *,
    levels: Iterable[Level] | None = None,
    parent: str | os.PathLike[str] | None = None,
    clock: Clock,
) -> CheckReport:
    """Return what is wrong with the disk in the file at `path`.

    levels: None runs all; a level is run together with those that it needs. parent: the file of the parent,
    where the names in a differencing disk do not lead to it. Damage never raises. Raises: OSError;
    UnsupportedVersion for the signatures of formats that are not read here.
    """
    file = files.open(Path(path))
    try:
        chain = Chain(files, Path(path), parent, clock)
        return check_open_file(file, LEVELS if levels is None else levels, chain)[0]
    finally:
        file.close()


def check_open_file(
    file: BlockFile, levels: Iterable[Level], chain: Chain | None = None
) -> tuple[CheckReport, Any]:
    """Return the report of an open file, and what the check of its format learned for a repair."""
    findings = Findings(needed for level in levels for needed in NEEDED_LEVELS[level])
    statistics = Statistics(file_bytes=file.size())
    name = _format_of(file)
    learned = CHECKS[name](file, findings, statistics, chain)
    return findings.report(str(file.path), name, statistics), learned


def _format_of(file: BlockFile) -> str:
    """Return the format, also of a file whose first bytes are damaged. Raises: UnsupportedVersion."""
    head = file.read(0, min(len(FILE_SIGNATURE), file.size()))
    if head == FILE_SIGNATURE:
        return "vhdx"
    if not looks_like_vhd(file) and any(_has_header(file, at) for at in HEADER_OFFSETS):
        return "vhdx"
    found = format_of(file)
    return _BY_ENDING.get(file.path.suffix.lower(), found) if found == "raw" else found


def _has_header(file: BlockFile, file_offset: int) -> bool:
    try:
        unpack_header(file.read(file_offset, HEADER_BYTES), file_offset=file_offset).validate()
    except FormatError:
        return False
    return True
