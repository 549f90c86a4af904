#!/usr/bin/env python3
"""Write the generated parts of docs/ from the code, or with --check say which are stale.

- docs/errors.md: whole, from hvreplica.errors
- docs/formats/*.md: the table under each "### name (n bytes, spec)" heading, from the Layout in
  hvreplica.formats
- docs/check.md: the table of codes, from hvreplica.disk.check.codes
- docs/cli/*.md: whole, from the commands' own help
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hvreplica.formats
from hvreplica import errors
from hvreplica.cli.exit import CODES
from hvreplica.disk.check.codes import CODES as CHECK_CODES
from hvreplica.formats.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
HEADING = re.compile(r"^### .+ \(\d+ bytes, .+\)$", re.MULTILINE)
CHECK_TABLE = re.compile(r"(<!-- codes: [^\n]*-->\n).*?(<!-- end of codes -->)", re.DOTALL)
TABLE = re.compile(HEADING.pattern + r"\n\n(?:\|[^\n]*\n)+", re.MULTILINE)

_ERRORS_TOP = """# Errors and exit codes

<!-- Made by scripts/make_docs.py from src/hvreplica/errors.py: edit that. -->

Every error of ours says what is wrong, in which file or with which peer, at which offset and field, what was
expected and what was found, and what to do next. The command line tells it on stderr and ends with the code
of its class. In Python, catch `HvReplicaError` for all, a family for one kind, or a class for one reason.
*Retryable* means that the same call may succeed later without any change by you.
"""
_ERRORS_OTHERS = """
## Other codes

| code | name | meaning |
|---:|---|---|
"""
_ERRORS_END = """
A code keeps its meaning for ever; a new reason gets a new code inside its family's ten.
"""


def error_classes() -> Iterator[tuple[int, type[errors.HvReplicaError]]]:
    """Yield (depth, class) of the whole tree, parents first, by exit code."""

    def below(
        parent: type[errors.HvReplicaError], depth: int
    ) -> Iterator[tuple[int, type[errors.HvReplicaError]]]:
        yield depth, parent
        for child in sorted(parent.__subclasses__(), key=lambda each: each.exit_code):
            if child.__module__ == errors.__name__:
                yield from below(child, depth + 1)

    return below(errors.HvReplicaError, 0)


def errors_page() -> str:
    """Return docs/errors.md."""
    parts = [_ERRORS_TOP]
    for depth, each in error_classes():
        sentence = re.split(r"(?<=\.)\s", (each.__doc__ or "").strip())[0]
        if depth == 0:
            parts.append("\n| code | class | retryable | meaning |\n|---:|---|---|---|\n")
            sentence = "any error of ours without a code of its own"
        elif depth == 1:
            parts.append(
                f"\n## {each.__name__}\n\n| code | class | retryable | meaning |\n|---:|---|---|---|\n"
            )
        retryable = "yes" if each.retryable else ""
        parts.append(f"| {each.exit_code} | `{each.__name__}` | {retryable} | {sentence} |\n")
    parts.append(_ERRORS_OTHERS)
    parts += [f"| {code} | `{name}` | {_cell(meaning)} |\n" for code, name, meaning in CODES]
    parts.append(_ERRORS_END)
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def layouts() -> dict[str, Layout]:
    """Return every declared structure by the heading that documents it."""
    found: dict[str, Layout] = {}
    for info in pkgutil.walk_packages(hvreplica.formats.__path__, "hvreplica.formats."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if isinstance(value, Layout):
                found[value.table().split("\n", 1)[0]] = value
    return found


def with_tables(text: str, known: dict[str, Layout]) -> str:
    """Return a page with the table of each known structure made again."""

    def table(match: re.Match[str]) -> str:
        layout = known.get(match[0].split("\n", 1)[0])
        return match[0] if layout is None else layout.table()

    return TABLE.sub(table, text)


def with_check_codes(text: str) -> str:
    """Return docs/check.md with its table of codes made again."""
    rows = ["| level | code | severity | meaning | repair |", "|---|---|---|---|---|"]
    rows += [
        f"| {code.level} | `{name}` | {code.severity} | {_cell(code.meaning)} | {code.repair or ''} |"
        for name, code in CHECK_CODES.items()
    ]
    table = "\n".join(rows)
    return CHECK_TABLE.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)


def cli_pages() -> dict[Path, str]:
    """Return the pages of docs/cli, made by hvreplica.cli itself; none where it makes none."""
    try:
        module = importlib.import_module("hvreplica.cli.pages")
    except ModuleNotFoundError:
        return {}
    return {DOCS / "cli" / name: text for name, text in module.pages().items()}


def pages() -> dict[Path, str]:
    """Return every page that is generated, whole or in part, as it should be."""
    known = layouts()
    made = {DOCS / "errors.md": errors_page(), **cli_pages()}
    check = DOCS / "check.md"
    made[check] = with_check_codes(check.read_text(encoding="utf-8"))
    for path in sorted((DOCS / "formats").glob("*.md")):
        made[path] = with_tables(path.read_text(encoding="utf-8"), known)
    return made


def undocumented() -> list[str]:
    """Return the structures that no page of docs/formats shows, and the headings that belong to none."""
    known = layouts()
    shown: set[str] = set()
    faults = []
    for path in sorted((DOCS / "formats").glob("*.md")):
        for match in HEADING.finditer(path.read_text(encoding="utf-8")):
            shown.add(match[0])
            if match[0] not in known:
                faults.append(f"{path.name} has {match[0]!r}, which no module of formats declares")
    return faults + [f"no page of docs/formats has {heading!r}" for heading in sorted(known.keys() - shown)]


def stale() -> list[Path]:
    """Return the pages that differ from what the code says."""
    return [
        path
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str]) -> int:
    """Write what is stale, or with --check only name it."""
    check = arguments == ["--check"]
    if arguments and not check:
        print("usage: make_docs.py [--check]", file=sys.stderr)
        return 2
    faults = undocumented()
    changed = stale()
    if not check:
        made = pages()
        for path in changed:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[path], encoding="utf-8")
    for path in changed:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults or (check and changed)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
