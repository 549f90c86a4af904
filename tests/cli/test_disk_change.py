"""`disk resize`, `disk compact`, and all that `create`, `convert` and --parent can be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.command_line import Run

    Invoke = Callable[..., Run]


def write(path: Path, disk_offset: int, data: bytes) -> None:
    with open_disk(OS_FILES, path, writable=True, clock=SYSTEM) as disk:
        disk.write(data, disk_offset)


@pytest.mark.parametrize("name", ["a.vhdx", "a.vhd", "a.img"])
def test_resize_tells_both_sizes(invoke: Invoke, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert invoke("disk", "create", path, "--size", "40M").code == 0
    write(path, 39 * MIB, b"x" * 512)
    run = invoke("disk", "resize", path, "--size", "1G", "--json")
    assert (run.code, run.answer["virtual_bytes_before"], run.answer["virtual_bytes"]) == (0, 40 * MIB, GIB)
    refused = invoke("disk", "resize", path, "--size", "20M")
    assert refused.code == 15
    assert f"the smallest size that loses nothing is {39 * MIB + 512}" in refused.err
    assert invoke("disk", "resize", path, "--size", str(39 * MIB + 512)).code == 0
    assert hvreplica.disk_info(path).virtual_bytes == 39 * MIB + 512


def test_compact_tells_what_it_won(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    invoke("disk", "create", path, "--size", "64M", "--block-size", "1M")
    write(path, 0, b"x" * (8 * MIB))
    write(path, 0, bytes(6 * MIB))
    run = invoke("disk", "compact", path, "--json")
    assert (run.code, run.answer["won_bytes"], run.answer["released_blocks"]) == (0, 6 * MIB, 6)
    again = invoke("disk", "compact", path)
    assert (again.code, again.out.splitlines()[0]) == (0, "0 B won: the file has 6.0 MiB instead of 6.0 MiB")


def test_compact_of_a_fixed_disk_is_refused_with_a_way_out(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    invoke("disk", "create", path, "--size", "4M", "--type", "fixed")
    run = invoke("disk", "compact", path)
    assert run.code == 61
    assert "disk convert" in run.err


@pytest.mark.parametrize("ending", ["avhdx", "avhd"])
def test_child_is_made_told_moved_and_found_again(invoke: Invoke, tmp_path: Path, ending: str) -> None:
    base, child = tmp_path / f"base.{ending[1:]}", tmp_path / f"child.{ending}"
    invoke("disk", "create", base, "--size", "40M")
    write(base, 0, b"b" * 4096)
    made = invoke("disk", "create", child, "--parent", base, "--json").answer
    assert (made["type"], made["virtual_bytes"], made["parent"]) == ("differencing", 40 * MIB, str(base))
    elsewhere = tmp_path / "elsewhere" / "moved"
    elsewhere.parent.mkdir()
    base.rename(elsewhere)
    info = invoke("disk", "info", child, "--json")
    assert (info.code, info.answer["type"]) == (0, "differencing")
    assert info.answer["parent"].endswith(f"base.{ending[1:]}")
    assert invoke("disk", "info", child, "--parent", tmp_path / "nowhere").code == 81
    assert invoke("disk", "map", child).code == 81
    found = invoke("disk", "info", child, "--parent", elsewhere, "--json").answer
    assert found["parent"] == str(elsewhere)
    entries = invoke("disk", "map", child, "--parent", elsewhere, "--json").answer
    assert {entry.get("filename") for entry in entries if entry["data"]} == {str(elsewhere)}
    copy = tmp_path / "copy.vhdx"
    assert invoke("disk", "convert", child, copy).code == 81
    assert not copy.exists()
    assert invoke("disk", "convert", child, copy, "--parent", elsewhere).code == 0
    assert invoke("disk", "compare", child, copy, "--parent", elsewhere).code == 0
    assert invoke("disk", "compare", copy, child, "--parent-b", elsewhere).code == 0
    assert invoke("disk", "compare", copy, child, "--parent", elsewhere).code == 81
    assert invoke("disk", "compact", child, "--parent", elsewhere).code == 0
    assert invoke("disk", "resize", child, "--parent", elsewhere, "--size", "41M").code == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        pytest.param((), "--size", id="no size"),
        pytest.param(("--parent", "base.vhdx", "--type", "fixed"), "--type", id="a child of a type"),
        pytest.param(
            ("--parent", "base.vhdx", "--sector-size", "512"), "--sector-size", id="a child's sector"
        ),
        pytest.param(("--size", "1M", "--sector-size", "4096", "--format", "raw"), "--sector-size", id="raw"),
        pytest.param(("--size", "1049088", "--sector-size", "4096"), "4096", id="no multiple"),
        pytest.param(("--size", "1M", "--sector-size", "1024"), "1024", id="no such sector"),
    ],
)
def test_what_no_new_disk_can_be_is_wrong_usage(
    invoke: Invoke, tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    run = invoke("disk", "create", tmp_path / "a.vhdx", *arguments)
    assert run.code == 2
    assert word in run.err
    assert not (tmp_path / "a.vhdx").exists()


def test_sectors_of_4096_are_made_and_converted(invoke: Invoke, tmp_path: Path) -> None:
    a, b, c = tmp_path / "a.vhdx", tmp_path / "b.vhdx", tmp_path / "c.avhdx"
    assert invoke("disk", "create", a, "--size", "40M", "--sector-size", "4096").code == 0
    assert hvreplica.disk_info(a).logical_sector_bytes == 4096
    write(a, 4096, b"x" * 4096)
    assert invoke("disk", "convert", a, b, "--sector-size", "512", "--block-size", "1M").code == 0
    assert hvreplica.disk_info(b).logical_sector_bytes == 512
    assert invoke("disk", "convert", b, c, "--sector-size", "4096").code == 0
    assert hvreplica.disk_info(c).logical_sector_bytes == 4096
    assert invoke("disk", "compare", a, c).code == 0
    refused = invoke("disk", "convert", a, tmp_path / "d.vhd")
    assert refused.code == 15
    assert invoke("disk", "convert", a, tmp_path / "d.vhd", "--sector-size", "512").code == 0
