"""Level "parents" of a VHDX: what its locator says, and whether the chain below it can be opened.

Spec: [MS-VHDX] 2.6.2.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.errors import FormatError
from hvreplica.formats.vhdx_locator import unpack_parent_locator
from hvreplica.formats.vhdx_metadata import PARENT_LOCATOR_ITEM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hvreplica.disk.check.chain import Chain
    from hvreplica.disk.check.findings import Findings, Statistics
    from hvreplica.disk.check.vhdx_file import VhdxFile
    from hvreplica.formats.vhdx_metadata import MetadataEntry

_LOCATOR: Mapping[str, str] = {
    "UnsupportedVersion": "parent-locator-type",
    "FieldOutOfRange": "parent-locator-malformed",
    "Overlap": "parent-locator-malformed",
    "Truncated": "parent-locator-malformed",
}


def check_parents(subject: VhdxFile, findings: Findings, statistics: Statistics, chain: Chain) -> None:
    """Check the parent locator, and then each parent down to the last."""
    if subject.metadata is None or subject.parameters is None:
        return
    rows = [e for e in subject.metadata.entries if e.item_id == PARENT_LOCATOR_ITEM and not e.is_user]
    if not subject.parameters.has_parent:
        if rows:
            findings.add(
                "parent-locator-unused",
                "this disk has a parent locator, and no parent",
                offset=rows[0].at,
                field="item_id",
                actual=PARENT_LOCATOR_ITEM,
                spec="[MS-VHDX] 2.6.2.6",
            )
        return
    if not rows:
        findings.add(
            "parent-locator-missing",
            "this is a differencing disk, and it names no parent",
            offset=subject.metadata.at,
            field="item_id",
            expected=PARENT_LOCATOR_ITEM,
            spec="[MS-VHDX] 2.6.2.6",
        )
    elif _is_sound(subject, rows[0], findings):
        chain.check(findings, statistics)


def _is_sound(subject: VhdxFile, entry: MetadataEntry, findings: Findings) -> bool:
    at = entry.offset + (subject.metadata.at if subject.metadata is not None else 0)
    try:
        unpack_parent_locator(subject.view.read(at, entry.length), file_offset=at).validate()
    except FormatError as error:
        findings.add_errors([error], _LOCATOR)
        return False
    return True
