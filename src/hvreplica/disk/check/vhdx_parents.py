"""Level "parents" of a VHDX: whether a differencing disk names its parent. Spec: [MS-VHDX] 2.6.2.6."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.formats.vhdx_metadata import PARENT_LOCATOR_ITEM

if TYPE_CHECKING:
    from hvreplica.disk.check.findings import Findings
    from hvreplica.disk.check.vhdx_file import VhdxFile


def check_parents(subject: VhdxFile, findings: Findings) -> None:
    """Check the parent locator."""
    if subject.metadata is None or subject.parameters is None:
        return
    rows = [e for e in subject.metadata.entries if e.item_id == PARENT_LOCATOR_ITEM and not e.is_user]
    if subject.parameters.has_parent and not rows:
        findings.add(
            "parent-locator-missing",
            "this is a differencing disk, and it names no parent",
            offset=subject.metadata.at,
            field="item_id",
            expected=PARENT_LOCATOR_ITEM,
            spec="[MS-VHDX] 2.6.2.6",
        )
    if rows and not subject.parameters.has_parent:
        findings.add(
            "parent-locator-unused",
            "this disk has a parent locator, and no parent",
            offset=rows[0].at,
            field="item_id",
            actual=PARENT_LOCATOR_ITEM,
            spec="[MS-VHDX] 2.6.2.6",
        )
