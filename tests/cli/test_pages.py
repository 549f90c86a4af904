"""docs/cli says what the verbs say."""

from __future__ import annotations

from pathlib import Path

from hvreplica.cli.main import cli
from hvreplica.cli.pages import pages

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli"


def test_pages_cover_every_command() -> None:
    made = pages()
    assert set(made) == {"index.md", *(f"{name}.md" for name in cli.commands)}
    assert "### " not in made["disk.md"]
    for verb in ("info", "map", "create", "convert", "compare"):
        assert f"\n## hvreplica disk {verb}\n" in made["disk.md"]


def test_pages_name_options_defaults_and_variables() -> None:
    line = next(line for line in pages()["replicate.md"].splitlines() if "--compression" in line)
    assert "auto\\|zstd\\|lz4\\|none" in line
    assert "Default: `auto`" in line
    assert "`HVREPLICA_REPLICATE_COMPRESSION`" in line
    assert "\b" not in "".join(pages().values())


def test_folder_holds_these_pages_and_no_others() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")} == pages()
