"""LAYOUTS names every structure that the VHDX modules declare, and the page about the format shows each."""

from __future__ import annotations

from hvreplica.formats import vhdx, vhdx_bat, vhdx_header, vhdx_locator, vhdx_log, vhdx_metadata, vhdx_region
from hvreplica.formats.layout import Layout
from tests.support.source import ROOT


def test_every_declared_structure_is_listed() -> None:
    declared = {
        value.name
        for module in (vhdx_header, vhdx_region, vhdx_log, vhdx_bat, vhdx_metadata, vhdx_locator)
        for value in vars(module).values()
        if isinstance(value, Layout)
    }
    assert {layout.name for layout in vhdx.LAYOUTS} == declared
    assert len(vhdx.LAYOUTS) == len(declared)


def test_page_shows_every_table_as_it_is_declared() -> None:
    page = (ROOT / "docs" / "formats" / "vhdx.md").read_text(encoding="utf-8")
    for layout in vhdx.LAYOUTS:
        assert layout.table() in page
        assert layout.table() in vhdx.field_tables()
