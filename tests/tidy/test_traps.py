"""docs/formats/traps.md lists every trap once, and the tests that it names exist."""

from __future__ import annotations

import ast
import functools
import re

import pytest

from tests.support.source import ROOT, load

PAGE = ROOT / "docs" / "formats" / "traps.md"
TRAP_COUNT = 55
ROW = re.compile(r"^\| (\d+) \|(.*)\|$", re.MULTILINE)
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows() -> list[tuple[int, list[str]]]:
    """Return (number, cells) of every row."""
    found = ROW.findall(PAGE.read_text(encoding="utf-8"))
    return [(int(number), [cell.strip() for cell in rest.split(" | ")]) for number, rest in found]


@functools.cache
def names_in(name: str) -> set[str]:
    """Return the names of the functions in a module below tests/."""
    return {node.name for node in load(ROOT / "tests" / name).tree.body if isinstance(node, ast.FunctionDef)}


def test_every_trap_is_listed_once_in_order() -> None:
    assert [number for number, _ in rows()] == list(range(1, TRAP_COUNT + 1))


@pytest.mark.parametrize(
    ("number", "cells"), rows(), ids=lambda value: str(value) if isinstance(value, int) else ""
)
def test_row_names_tests_that_exist_or_a_reason(number: int, cells: list[str]) -> None:
    assert len(cells) == 3, f"trap {number}: what is the trap, what do we do, what shows it"
    assert all(len(cell) > 5 for cell in cells)
    named = TEST.findall(cells[2])
    assert named or re.match(r"no test: \w.{20,}", cells[2]), f"trap {number} has neither a test nor a reason"
    lost = [f"{module}::{test}" for module, test in named if test not in names_in(module)]
    assert not lost, f"trap {number} names tests that are not there: {lost}"


def test_tests_of_traps_are_all_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in ("interop/test_traps_vhd.py", "interop/test_traps_vhdx.py"):
        lost = [
            test for test in names_in(name) if test.startswith("test_") and f"{name}::{test}`" not in text
        ]
        assert not lost, f"{name}: {lost}"
