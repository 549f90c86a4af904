"""`disk check` and `disk repair` as a user types them: words, JSON, exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import hvreplica
from tests.disk.damage import CORRUPT, MENDABLE, harmed, make_patient

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.command_line import Run

    Invoke = Callable[..., Run]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.vhdx"


def test_a_clean_disk_is_told_in_two_lines(invoke: Invoke, path: Path) -> None:
    make_patient(path)
    run = invoke("disk", "check", path)
    assert (run.code, run.err) == (0, "")
    assert run.out == "4 of 9216 blocks of 1.0 MiB in 8.0 MiB\nvhdx clean\n"


def test_findings_are_grouped_by_level_one_a_line(invoke: Invoke, path: Path) -> None:
    patient = harmed(path, "header 1 signature")
    CORRUPT["state 4"].harm(patient)
    MENDABLE["leaked tail"].harm(patient)
    run = invoke("disk", "check", path)
    assert run.code == 2
    lines = run.out.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["structure:", "bat:", "leaks:"]
    assert lines[1].startswith("  repairable header-signature: a header does not start as one")
    assert "offset 65536" in lines[1]
    assert "[MS-VHDX] 2.2.2" in lines[1]
    assert lines[-1].startswith("vhdx corrupt")
    assert lines[-1].endswith("(1 warning, 1 repairable, 1 corrupt)")


def test_json_carries_the_whole_report(invoke: Invoke, path: Path) -> None:
    harmed(path, "leaked tail of odd length")
    run = invoke("disk", "check", path, "--json")
    assert run.code == 0
    answer = run.answer
    assert (answer["format"], answer["status"], answer["verdict"]) == ("vhdx", 0, "clean")
    assert answer["counts"] == {"info": 0, "warning": 2, "repairable": 0, "corrupt": 0}
    assert {finding["code"] for finding in answer["findings"]} == {"file-tail-unused", "file-end-unaligned"}
    assert all(finding["repair"] == "file-end" for finding in answer["findings"])
    assert answer["statistics"]["tail_bytes"] == 5 * (1 << 20) + 1
    assert hvreplica.disk_check(path).status == 0


@pytest.mark.parametrize(("name", "code"), [("header 1 zeroed", 1), ("state 4", 2), ("leaked tail", 0)])
def test_the_exit_code_is_the_state_of_the_disk(invoke: Invoke, path: Path, name: str, code: int) -> None:
    harmed(path, name)
    assert invoke("disk", "check", path).code == code
    assert invoke("disk", "repair", path, "--dry-run").code == code
    assert invoke("disk", "repair", path).code == (2 if code == 2 else 0)


def test_levels_may_be_chosen(invoke: Invoke, path: Path) -> None:
    harmed(path, "state 4")
    assert invoke("disk", "check", path, "--level", "structure", "--level", "log").code == 0
    assert invoke("disk", "check", path, "--level", "bat").code == 2


@pytest.mark.parametrize(
    "words", [("check",), ("check", "a", "--level", "all"), ("repair", "a", "--backup"), ("check", "a", "b")]
)
def test_wrong_usage_is_no_corrupt_disk(invoke: Invoke, words: tuple[str, ...]) -> None:
    run = invoke("disk", *words)
    assert run.code == 5
    assert run.out == ""
    assert "error" in run.err


def test_what_is_no_disk_has_the_code_of_its_error(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("disk", "check", tmp_path / "absent").code == 70
    (tmp_path / "a").write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    assert invoke("disk", "check", tmp_path / "a").code == 13


def test_repair_tells_what_it_did_and_undo_takes_it_back(invoke: Invoke, path: Path, tmp_path: Path) -> None:
    harmed(path, "header 2 checksum")
    before = path.read_bytes()
    would = invoke("disk", "repair", path, "--dry-run")
    assert would.out.splitlines()[0] == "would: headers: write the bad header copy anew from the good one"
    assert path.read_bytes() == before
    backup = tmp_path / "b.bak"
    run = invoke("disk", "repair", path, "--backup", backup)
    assert run.code == 0
    assert run.out.splitlines() == [
        "done: headers: write the bad header copy anew from the good one",
        f"backup: {backup}",
        "vhdx clean",
    ]
    assert invoke("disk", "repair", path).out.splitlines()[0] == "there is nothing to repair"
    assert invoke("disk", "repair", path, "--undo", backup, "--dry-run").code == 5
    undone = invoke("disk", "repair", path, "--undo", backup, "--json")
    assert undone.code == 0
    assert undone.answer["file_bytes"] == len(before)
    assert path.read_bytes() == before


def test_the_backup_has_a_name_of_its_own_unless_one_is_given(invoke: Invoke, path: Path) -> None:
    harmed(path, "leaked tail")
    answer = invoke("disk", "repair", path, "--json").answer
    assert answer["backup"].startswith(f"{path}.repair-")
    assert answer["backup"].endswith(".bak")
    assert [action["action"] for action in answer["actions"]] == ["headers", "file-end"]
    assert answer["after"]["status"] == answer["status"] == 0
