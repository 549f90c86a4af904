"""The list of all structures of VHD 1.0."""

from __future__ import annotations

from hvreplica.formats import vhd
from tests.support.source import ROOT


def test_every_structure_is_listed_once_with_its_table() -> None:
    names = [layout.name for layout in vhd.LAYOUTS]
    assert len(set(names)) == len(names) == 5
    page = (ROOT / "docs" / "formats" / "vhd.md").read_text(encoding="utf-8")
    for layout in vhd.LAYOUTS:
        assert layout.table() in vhd.field_tables()
        assert layout.table() in page
        assert layout.spec
