"""Our own source as syntax trees, for tests/tidy."""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "hvreplica"


@dataclass(frozen=True, slots=True)
class Source:
    """One Python file. name: its path from src/hvreplica, or from the root outside of it, with slashes."""

    path: Path
    name: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return self.text.count("\n")

    def at(self, node: ast.AST) -> str:
        """Return the place of a node, for a message."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"

    def comments(self) -> list[tuple[int, str]]:
        """Return (line, text) of every comment and docstring."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        found = [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node, clean=False)
                if text is not None:
                    found.append((getattr(node, "lineno", 1), text))
        return found


@functools.cache
def load(path: Path) -> Source:
    """Return one file, parsed once in a run."""
    text = path.read_text(encoding="utf-8")
    root = SRC if path.is_relative_to(SRC) else ROOT
    tree = ast.parse(text, filename=str(path))
    return Source(path, path.relative_to(root).as_posix(), text, tree)


def sources(*folders: str) -> tuple[Source, ...]:
    """Return every Python file below the folders (from the root), sorted; "src/hvreplica" names our package."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(load(path) for path in paths)


def package() -> tuple[Source, ...]:
    """Return the modules of hvreplica."""
    return sources("src/hvreplica")


def imported(tree: ast.Module) -> list[tuple[ast.stmt, str]]:
    """Return (statement, dotted name) of every import; `from a import b` gives "a.b"."""
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node, f"{node.module or ''}.{alias.name}") for alias in node.names]
    return found


def imported_for_types(tree: ast.Module) -> set[ast.stmt]:
    """Return the import statements under `if TYPE_CHECKING:`, which nothing runs."""
    found: set[ast.stmt] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            found.update(child for child in ast.walk(node) if isinstance(child, (ast.Import, ast.ImportFrom)))
    return found


def dotted(node: ast.expr) -> str:
    """Return "a.b.c" of an attribute chain, or ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""
