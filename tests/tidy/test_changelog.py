"""A change that a user notices has a fragment in changelog.d, in the user's words."""

from __future__ import annotations

import re

from tests.support.source import ROOT

TYPES = ("added", "changed", "fixed", "removed", "security", "format")
NAME = re.compile(rf"(?P<issue>\d+)(?:-[a-z0-9-]+)?\.(?:{'|'.join(TYPES)})\.md")
LINES_MAX = 12


def test_fragments_are_named_by_issue_and_type() -> None:
    names = [path.name for path in (ROOT / "changelog.d").iterdir() if path.name != "README.md"]
    wrong = [name for name in names if not NAME.fullmatch(name)]
    assert not wrong, f"{wrong}: changelog.d/<issue>[-word].<{'|'.join(TYPES)}>.md"


def test_fragments_are_short_sentences() -> None:
    for path in (ROOT / "changelog.d").glob("[0-9]*.md"):
        text = path.read_text(encoding="utf-8").strip()
        assert text, path.name
        assert text.endswith("."), f"{path.name}: a sentence ends with a full stop"
        assert text.count("\n") < LINES_MAX, f"{path.name}: say it shorter"


def test_changelog_points_to_the_fragments() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "changelog.d" in text
    assert re.search(r"^## ", text, re.MULTILINE)
