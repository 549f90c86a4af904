"""All structures of [MS-VHDX] that are declared here, in the order of the specification.

docs/formats/vhdx.md is made from LAYOUTS; code imports from the module of the structure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.formats.vhdx_bat import BAT_ENTRY
from hvreplica.formats.vhdx_header import FILE_IDENTIFIER, HEADER
from hvreplica.formats.vhdx_locator import PARENT_LOCATOR_ENTRY, PARENT_LOCATOR_HEADER
from hvreplica.formats.vhdx_log import DATA_DESCRIPTOR, DATA_SECTOR, LOG_ENTRY_HEADER, ZERO_DESCRIPTOR
from hvreplica.formats.vhdx_metadata import (
    FILE_PARAMETERS,
    LOGICAL_SECTOR_SIZE,
    METADATA_TABLE_ENTRY,
    METADATA_TABLE_HEADER,
    PHYSICAL_SECTOR_SIZE,
    VIRTUAL_DISK_ID,
    VIRTUAL_DISK_SIZE,
)
from hvreplica.formats.vhdx_region import REGION_TABLE_ENTRY, REGION_TABLE_HEADER

if TYPE_CHECKING:
    from hvreplica.formats.layout import Layout

LAYOUTS: tuple[Layout, ...] = (
    FILE_IDENTIFIER,
    HEADER,
    REGION_TABLE_HEADER,
    REGION_TABLE_ENTRY,
    LOG_ENTRY_HEADER,
    ZERO_DESCRIPTOR,
    DATA_DESCRIPTOR,
    DATA_SECTOR,
    BAT_ENTRY,
    METADATA_TABLE_HEADER,
    METADATA_TABLE_ENTRY,
    FILE_PARAMETERS,
    VIRTUAL_DISK_SIZE,
    VIRTUAL_DISK_ID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    PARENT_LOCATOR_HEADER,
    PARENT_LOCATOR_ENTRY,
)


def field_tables() -> str:
    """Return the Markdown tables of all structures, as docs/formats/vhdx.md shows them."""
    return "\n".join(layout.table() for layout in LAYOUTS)
