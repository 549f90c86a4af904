"""Documentation that can be made from the code equals what the code says now, and links lead somewhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from scripts import make_docs
from tests.support.source import ROOT

if TYPE_CHECKING:
    from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\((?!https?://|mailto:|#)(?P<target>[^)#\s]+)(?:#(?P<anchor>[^)\s]+))?\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def markdown() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_pages_are_fresh() -> None:
    stale = [str(path.relative_to(ROOT)) for path in make_docs.stale()]
    assert not stale, f"run make docs: {stale}"


def test_every_structure_is_documented() -> None:
    faults = make_docs.undocumented()
    assert not faults, "\n".join(faults)


def test_a_changed_field_makes_its_page_stale() -> None:
    heading, layout = next(iter(make_docs.layouts().items()))
    page = f"text before\n\n{layout.table()}\ntext after\n"
    wrong = page.replace("| 0 |", "| 1 |", 1)
    assert wrong != page
    assert make_docs.with_tables(wrong, {heading: layout}) == page


def test_links_lead_to_files_and_headings() -> None:
    broken = []
    for page in markdown():
        for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
            target = (page.parent / match["target"]).resolve()
            name = f"{page.relative_to(ROOT)}: {match[0]}"
            if not target.exists():
                broken.append(name)
            elif match["anchor"] and target.suffix == ".md" and match["anchor"] not in anchors(target):
                broken.append(f"{name} has no such heading")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_repository_has_its_frame(name: str) -> None:
    assert (ROOT / name).stat().st_size > 100


def test_every_page_is_reached_from_the_index() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md", ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            target = (page.parent / match["target"]).resolve()
            waiting += sorted(target.glob("*.md")) if target.is_dir() else [target]
    lost = [str(page.relative_to(ROOT)) for page in markdown() if page not in reached]
    assert not lost, f"no link leads to {lost}"
