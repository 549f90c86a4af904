"""`disk merge` and `disk rebase` as a user types them: words, JSON, exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import hvreplica
from tests.disk.test_merge import chain, make, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.command_line import Run

    Invoke = Callable[..., Run]


@pytest.fixture
def disks(tmp_path: Path, seed: int) -> list[Path]:
    return chain(tmp_path, "vhdx", seed=seed)


def test_a_merge_tells_what_it_did(invoke: Invoke, disks: list[Path]) -> None:
    expected = read(disks[2])
    run = invoke("disk", "merge", disks[2], "--json")
    assert (run.code, run.err) == (0, "")
    assert run.answer["parent"] == str(disks[1])
    assert run.answer["removed"] is True
    assert run.answer["copied_bytes"] > 0
    assert read(disks[1]) == expected
    run = invoke("disk", "merge", disks[1], "--keep")
    assert run.code == 0
    assert "copied" in run.out
    assert read(disks[0]) == read(disks[1]) == expected


def test_a_merge_that_would_break_others_names_them(invoke: Invoke, disks: list[Path]) -> None:
    run = invoke("disk", "merge", disks[1], "--json")
    assert run.code == 84
    assert str(disks[2]) in run.error["actual"]
    assert "--keep" in run.error["hint"]
    assert invoke("disk", "merge", disks[1], "--force").code == 0
    assert not disks[1].exists()


def test_a_rebase_tells_why_the_parent_is_right(invoke: Invoke, disks: list[Path]) -> None:
    expected = read(disks[1])
    other = make(disks[0].with_name("other.vhdx"), seed=11)
    run = invoke("disk", "rebase", disks[1], "--parent", other, "--json")
    assert (run.code, run.err) == (0, "")
    assert (run.answer["by"], run.answer["parent"]) == ("content", str(other))
    assert invoke("disk", "rebase", disks[1], "--parent", other, "--json").answer["by"] == "identity"
    assert read(disks[1]) == expected
    run = invoke("disk", "rebase", disks[1], "--parent", disks[0], "--unsafe")
    assert run.code == 0
    assert "unsafe" in run.out
    assert invoke("disk", "rebase", disks[1], "--parent", disks[2]).code == 83
    assert invoke("disk", "rebase", disks[1]).code == 2


def test_both_are_functions(disks: list[Path]) -> None:
    assert hvreplica.disk_rebase(disks[1], disks[0]).by == "identity"
    assert hvreplica.disk_merge(disks[2]).removed
