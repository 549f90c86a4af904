"""The demo: it shows what it says, cleans up whatever happens, and fails where the two sides differ."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hvreplica.cli import demo_guest, demo_process
from tests.support.command_line import TIMEOUT_S, Run, environment
from tests.support.tools import find_tool, require_tool, run_tool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20


def test_demo_proves_both_sides_equal_with_a_real_file_system(
    hvreplica: Callable[..., Run], tmp_path: Path
) -> None:
    require_tool("mkfs.ext4")
    kept = tmp_path / "kept"
    run = hvreplica("demo", "--size", "128M", "--keep", kept, "--json")
    assert run.code == 0, run.err
    answer = run.answer
    assert answer["equal"] is True
    assert answer["guest"] == "ext4"
    assert answer["guest_files"] > 10
    assert [step["kind"] for step in answer["steps"]] == ["initial", "delta", "none"]
    initial, delta, none = answer["steps"]
    assert 0 < delta["wire_bytes"] < initial["wire_bytes"]
    assert 0 < answer["guest_changed_bytes"] == delta["changed_bytes"]
    assert (none["changed_bytes"], none["point"]) == (0, delta["point"])
    assert answer["proof"]["primary_sha256"] == answer["proof"]["replica_sha256"]
    life = answer["life"]
    assert (life["equal"], life["points_kept"]) == (True, 2)
    assert life["union_bytes"] > 0
    assert 0 < life["wire_bytes"] < initial["wire_bytes"]
    assert life["file_system_sound"] is (True if find_tool("nbdcopy") else None)
    assert answer["folder"] == str(kept)
    check_exported_file_system(kept)


def check_exported_file_system(kept: Path) -> None:
    """Ask e2fsck whether what came out at the replica is a sound file system with the guest's new files."""
    raw = kept / "export.img"
    run_tool("qemu-img", "convert", "-O", "raw", kept / "export.vhdx", raw)
    run_tool("e2fsck", "-fn", raw)
    listed = run_tool("debugfs", "-R", "ls -p /work", raw)
    assert "/000-" in str(listed)


@pytest.fixture
def without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_guest, "_tool", lambda name: None)  # noqa: ARG005


@pytest.mark.usefixtures("without_tools")
def test_demo_works_without_any_tool(invoke: Callable[..., Run], tmp_path: Path) -> None:
    run = invoke("demo", "--size", "32M", env={"TMPDIR": str(tmp_path)})
    assert run.code == 0, run.err
    assert "both sides are equal" in run.out
    assert "plain files" in run.out
    assert "not installed here" in run.out
    assert "not checked here" in run.out
    assert "2 of 2 of before the failovers are what they were" in run.out
    words = run.out.split()
    assert [words.count(kind) for kind in ("initial", "delta", "none")] == [2, 2, 2], "a step and a row each"


@pytest.mark.usefixtures("without_tools")
def test_demo_fails_where_the_sides_differ(
    invoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_guest, "digest", str)
    run = invoke("demo", "--size", "32M")
    assert run.code == 1
    assert "THE TWO SIDES DIFFER" in run.out


@pytest.mark.usefixtures("without_tools")
def test_demo_fails_where_a_disk_is_not_what_it_should_be_after_a_failover(
    invoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_guest, "data_digest", str)
    run = invoke("demo", "--size", "32M")
    assert run.code == 1
    assert "A DISK IS NOT WHAT IT SHOULD BE" in run.out


def test_demo_keeps_nothing_of_others(invoke: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x", encoding="ascii")
    assert invoke("demo", "--keep", tmp_path).code == 60
    assert invoke("demo", "--size", "1M").code == 2


@pytest.mark.usefixtures("without_tools")
def test_demo_tells_why_a_process_failed(invoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_process.sys, "executable", "/bin/false")
    run = invoke("demo", "--size", "32M", "--json")
    assert (run.code, run.error["class"]) == (3, "ProcessFailed")
    assert "did not start" in run.error["message"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_demo_that_is_stopped_leaves_nothing(number: int, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hvreplica", "demo", "--size", "64M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(tmp_path)),
    )
    assert process.stdout is not None
    line = next((line for line in process.stdout if " replica " in line), "")
    assert "serve listens on" in line
    server = int(line.partition("(")[2].partition(")")[0])
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_guest_without_a_file_system_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_guest, "_tool", lambda name: None)  # noqa: ARG005
    images = []
    for name in ("a.img", "b.img"):
        guest = demo_guest.make_guest(tmp_path / name, 32 * MIB)
        words = demo_guest.change_guest(guest)
        assert "scattered" in words
        images.append(guest.image.read_bytes())
        assert len(images[-1]) == 32 * MIB
    assert images[0] == images[1]
