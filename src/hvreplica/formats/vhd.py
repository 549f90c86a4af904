"""All structures of VHD 1.0 that are declared here, in the order of the specification.

docs/formats/vhd.md is made from LAYOUTS; code imports from the module of the structure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvreplica.formats.vhd_bat import VHD_BAT_ENTRY
from hvreplica.formats.vhd_batmap import BATMAP_HEADER
from hvreplica.formats.vhd_footer import FOOTER
from hvreplica.formats.vhd_header import DYNAMIC_HEADER
from hvreplica.formats.vhd_locator import LOCATOR_ENTRY

if TYPE_CHECKING:
    from hvreplica.formats.layout import Layout

LAYOUTS: tuple[Layout, ...] = (FOOTER, DYNAMIC_HEADER, LOCATOR_ENTRY, VHD_BAT_ENTRY, BATMAP_HEADER)


def field_tables() -> str:
    """Return the Markdown tables of all structures, as docs/formats/vhd.md shows them."""
    return "\n".join(layout.table() for layout in LAYOUTS)
