"""The check of a raw disk: its file has no structure that could be damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.disk.raw import SECTOR_BYTES

if TYPE_CHECKING:
    from hvreplica.disk.check.chain import Chain
    from hvreplica.disk.check.findings import Findings, Statistics
    from hvreplica.files import BlockFile


def check_raw(file: BlockFile, findings: Findings, statistics: Statistics, chain: Chain | None) -> None:
    """Check the only thing that can be wrong."""
    del chain
    statistics.virtual_bytes = statistics.file_bytes
    statistics.log = "none"
    if file.size() % SECTOR_BYTES:
        findings.add(
            "size-not-sectors",
            "the size is no multiple of 512 bytes",
            offset=file.size(),
            expected="a multiple of 512",
            actual=file.size(),
        )
