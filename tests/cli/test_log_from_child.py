"""`log from-child` as a user types it: words, JSON, exit codes, and what stays on the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import hvreplica
from tests.disk.test_merge import chain, identity, make, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.command_line import Run

    Invoke = Callable[..., Run]


@pytest.fixture(params=["vhdx", "vhd"])
def disks(request: pytest.FixtureRequest, tmp_path: Path, seed: int) -> list[Path]:
    return chain(tmp_path, request.param, seed=seed)


@pytest.mark.parametrize("skip", [[], ["--skip-equal"]])
def test_the_log_makes_the_parent_show_what_the_child_shows(
    invoke: Invoke, disks: list[Path], skip: list[str]
) -> None:
    expected, log = read(disks[2]), disks[0].with_name("a.hrl")
    run = invoke("log", "from-child", disks[2], log, *skip, "--json")
    assert (run.code, run.err) == (0, "")
    assert (run.answer["base"], run.answer["path"]) == (str(disks[1]), str(log))
    assert run.answer["child_virtual_bytes"] == run.answer["base_virtual_bytes"] == len(expected)
    assert run.answer["data_bytes"] > 0
    header = hvreplica.log_info(log)
    assert (header.closed, header.log_id) == (True, run.answer["log_id"])
    guid = identity(disks[2])
    assert header.data_write_guid == (str(guid) if guid else "00000000-0000-0000-0000-000000000000")
    assert invoke("log", "apply", log, disks[1]).code == 0
    assert read(disks[1]) == expected


def test_all_layers_above_a_base_become_one_log(invoke: Invoke, disks: list[Path]) -> None:
    expected, log = read(disks[2]), disks[0].with_name("a.hrl")
    run = invoke("log", "from-child", disks[2], log, "--base", disks[0])
    assert run.code == 0
    assert f"changed since {disks[0]}" in run.out
    assert hvreplica.log_apply(log, disks[0]).bytes_written > 0
    assert read(disks[0]) == expected


def test_a_log_that_is_there_is_replaced_only_when_asked_for(invoke: Invoke, disks: list[Path]) -> None:
    log = disks[0].with_name("a.hrl")
    log.write_bytes(b"precious")
    run = invoke("log", "from-child", disks[1], log)
    assert run.code == 70
    assert "--overwrite" in run.err
    assert log.read_bytes() == b"precious"
    assert invoke("log", "from-child", disks[1], log, "--overwrite").code == 0
    assert hvreplica.log_verify(log).entries > 0


def test_the_chain_is_never_overwritten(invoke: Invoke, disks: list[Path]) -> None:
    before = [path.read_bytes() for path in disks]
    for path in disks:
        assert invoke("log", "from-child", disks[2], path, "--overwrite").code == 51
    assert [path.read_bytes() for path in disks] == before
    assert {path.suffix for path in disks[0].parent.iterdir()} == {disks[0].suffix}


def test_what_is_no_child_or_no_parent_is_refused(invoke: Invoke, disks: list[Path]) -> None:
    log = disks[0].with_name("a.hrl")
    assert invoke("log", "from-child", disks[0], log).code == 81
    run = invoke("log", "from-child", disks[1], log, "--base", disks[2], "--json")
    assert run.code == 82
    assert run.error["expected"] == str(disks[0])
    disks[0].unlink()
    assert invoke("log", "from-child", disks[1], log).code == 81
    assert not log.exists()


def test_a_longer_child_says_what_to_do(invoke: Invoke, tmp_path: Path) -> None:
    base = make(tmp_path / "base.vhdx")
    size = len(read(base))
    child = make(tmp_path / "child.vhdx", size=2 * size, parent=base, seed=2)
    run = invoke("log", "from-child", child, tmp_path / "a.hrl")
    assert run.code == 0
    assert f"grow the parent to {2 * size} bytes" in run.out
