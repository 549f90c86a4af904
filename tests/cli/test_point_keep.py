"""`point plan`, `point delete`, `store policy`: what they say, what they change, and what they refuse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

import hvreplica
from hvreplica.cli.main import cli
from hvreplica.errors import FieldOutOfRange, NoSuchPoint
from hvreplica.files import OS_FILES
from hvreplica.replication.retention_verbs import make_wish, parse_budget
from tests.store.parts import Disk, opened_home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def disk(tmp_path: Path, seed: int) -> Iterator[Disk]:
    home = opened_home(tmp_path, OS_FILES)
    made = Disk(home, seed)
    for number in range(5):
        made.cycle(range(number, number + 6), kind="manual" if number == 1 else "standard")
    yield made
    home.catalog.close()


def run(disk: Disk, *arguments: str) -> tuple[int, Any, str]:
    """Return the exit code, the JSON answer, and the error."""
    root = str(disk.home.parts.root)
    done = CliRunner().invoke(cli, [*arguments, "--json", "--store", root, "--vm", "web01"])
    answer = json.loads(done.stdout) if done.stdout else None
    return done.exit_code, answer, done.stderr


def told(disk: Disk, *arguments: str) -> str:
    """Return what a person reads."""
    done = CliRunner().invoke(
        cli, [*arguments, "--store", str(disk.home.parts.root), "--vm", "web01"], terminal_width=400
    )
    assert done.exit_code == 0, done.output
    return done.stdout


def test_plan_shows_what_stays_why_and_what_goes_first(disk: Disk) -> None:
    code, plan, _ = run(disk, "point", "plan", "--keep", "last 2", "--points-budget", "1M")
    assert code == 0
    assert [(point["keep"], point["reasons"], point["budget_place"]) for point in plan["points"]] == [
        (False, [], 0),
        (True, ["manual"], 0),
        (False, [], 0),
        (True, ["last 2 of 2"], 1),
        (True, ["newest", "last 1 of 2"], 0),
    ]
    assert [point["id"] for point in plan["points"]] == [str(point_id) for point_id in disk.kept()]
    assert (plan["policy"]["keep"], plan["policy"]["recovery_points"]) == ("last 2", None)
    assert (plan["budget_bytes"], plan["warning"]) == (1 << 20, None)
    assert 0 < plan["used_bytes"] <= sum(point["bytes"] for point in plan["points"])
    assert len(disk.kept()) == 5
    _, stored, _ = run(disk, "point", "plan")
    assert stored["policy"].get("keep") is None, "a preview changes nothing"
    shown = told(disk, "point", "plan", "--keep", "last 2", "--points-budget", "10K")
    assert f"the next to go is {disk.kept()[3]}" in shown
    assert "3 stay, 2 go with the next cycle" in shown


def test_delete_lets_the_named_points_go_and_no_other(disk: Disk) -> None:
    first, second, third, *rest = disk.kept()
    code, gone, _ = run(disk, "point", "delete", "--point", str(third), "--point", str(first))
    assert code == 0
    assert [(point["id"], point["reason"]) for point in gone] == [
        (str(first), "a person deleted it"),
        (str(third), "a person deleted it"),
    ]
    assert disk.kept() == [second, *rest]
    disk.check()
    assert told(disk, "point", "delete", "--point", str(second)).startswith(f"{second} of ")


def test_delete_does_nothing_unless_all_can_go(disk: Disk) -> None:
    before = disk.kept()
    first, second, *_, newest = before
    lock = disk.home.files.lock(disk.home.paths.use(second), shared=True)
    for other, kind, exit_code in (
        (str(newest), "InvalidTransition", 61),
        (str(second), "PointInUse", 53),
        ("00000000-0000-0000-0000-000000000000", "NoSuchPoint", 52),
        ("no-id", "NoSuchPoint", 52),
    ):
        code, _, error = run(disk, "point", "delete", "--point", str(first), "--point", other)
        failure = json.loads(error)["error"]
        assert (failure["class"], code) == (kind, exit_code)
        assert failure["hint"]
        assert disk.kept() == before
    lock.release()


def test_policy_is_shown_and_changed(disk: Disk) -> None:
    _, shown, _ = run(disk, "store", "policy")
    assert shown["policy"] == {}, "what is left out is as it is at first"
    assert disk.home.catalog.vm("web01").policy is None  # type: ignore[union-attr]
    code, changed, _ = run(disk, "store", "policy", "--keep", "daily 3, last 2", "--points-budget", "50%")
    assert code == 0
    assert changed["policy"] == {"recovery_points": None, "keep": "last 2, daily 3", "budget_percent": 50.0}
    _, changed, _ = run(disk, "store", "policy", "--recovery-points", "3", "--recovery-point-every", "900")
    assert changed["policy"] == {
        "recovery_points": 3,
        "recovery_point_every_s": 900.0,
        "budget_percent": 50.0,
    }
    _, changed, _ = run(disk, "store", "policy", "--keep", "last 2", "--recovery-points", "3")
    assert (changed["policy"]["recovery_points"], changed["policy"]["keep"]) == (3, "last 2")
    _, changed, _ = run(disk, "store", "policy", "--keep", "none", "--points-budget", "3G")
    assert changed["policy"] == {"recovery_point_every_s": 900.0, "budget_bytes": 3 << 30}
    _, changed, _ = run(disk, "store", "policy", "--points-budget", "none")
    assert changed["policy"] == {"recovery_point_every_s": 900.0}
    assert "recovery points   24" in told(disk, "store", "policy")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--keep", "last 2, yearly 1", "the rule has an unknown word (character 8)"),
        ("--keep", "", "not a word and a number (character 0)"),
        ("--points-budget", "lots", "write for example 20G, 15% or none"),
        ("--points-budget", "0", "write for example"),
        ("--points-budget", "-5%", "write for example"),
        ("--points-budget", "nan%", "write for example"),
        ("--recovery-points", "25", "0<=x<=24"),
        ("--recovery-point-every", "-1", "x>=0"),
    ],
)
def test_options_that_mean_nothing_are_refused(disk: Disk, option: str, value: str, words: str) -> None:
    for verb in (("point", "plan"), ("store", "policy")):
        code, _, error = run(disk, *verb, option, value)
        assert code == 2
        assert words in json.loads(error)["error"]["message"]


def test_library_refuses_the_same(disk: Disk) -> None:
    root = disk.home.parts.root
    for arguments in ({"keep": "last"}, {"recovery_points": 25}, {"recovery_point_every": -1.0}):
        with pytest.raises(FieldOutOfRange):
            hvreplica.store_policy(root, "web01", **arguments)  # type: ignore[arg-type]
    with pytest.raises(NoSuchPoint, match="no VM"):
        hvreplica.point_plan(root, "web02")
    assert parse_budget(5000) == (5000, None)
    assert parse_budget("12.5 %") == (None, 12.5)
    assert make_wish(None, None, "none", None).keep == ""
