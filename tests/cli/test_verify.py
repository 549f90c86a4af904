"""`store verify` and `point verify`: what they print, and that damage is an exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.store import Store
from tests.store.world import Primary, small_disk
from tests.support.fakeclock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.command_line import Run

DATA_AT = 64 << 10


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store of two VMs with one point each."""
    with Store.create_or_open(OS_FILES, tmp_path / "store", clock=SYSTEM) as opened:
        for name in ("web01", "web02"):
            primary = Primary(FakeClock(seed=1), [small_disk(0, 2)], vm=name)
            primary.write(0, DATA_AT, name.encode() * 1000)
            primary.replicate(opened).close()
    return tmp_path / "store"


def damage(store: Path, vm: str = "web01") -> Path:
    path = store / vm / "disks" / "0.vhdx"
    with open_disk(OS_FILES, path, format="vhdx", clock=SYSTEM) as disk:
        place = next(iter(disk.stretches(DATA_AT, DATA_AT + 512))).file_offset
    assert place is not None
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return path


def test_a_sound_store_is_told_and_is_no_error(invoke: Callable[..., Run], store: Path) -> None:
    run = invoke("store", "verify", "--store", store)
    assert run.code == 0
    assert [line.split(";")[0] for line in run.out.splitlines()] == [
        "web01: 1 point is sound, 0 damaged",
        "web02: 1 point is sound, 0 damaged",
    ]
    assert invoke("point", "verify", "--store", store, "--vm", "web02").code == 0


def test_damage_is_told_and_is_exit_code_1(invoke: Callable[..., Run], store: Path) -> None:
    path = damage(store)
    run = invoke("store", "verify", "--store", store, "--json", "--rate-limit", "1G")
    assert run.code == 1
    [first, second] = json.loads(run.out)["vms"]
    assert (first["vm"], [point["state"] for point in first["points"]]) == ("web01", ["damaged"])
    assert first["damage"] == [f"{path} does not hold what was written to it"]
    assert [point["state"] for point in second["points"]] == ["ok"]
    assert invoke("store", "verify", "--store", store, "--vm", "web02").code == 0
    listed = json.loads(invoke("point", "list", "--store", store, "--vm", "web01", "--json").out)
    assert [point["state"] for point in listed] == ["damaged"]


def test_one_point_is_verified_by_its_id(invoke: Callable[..., Run], store: Path) -> None:
    damage(store, "web02")
    listed = json.loads(invoke("point", "list", "--store", store, "--vm", "web02", "--json").out)
    run = invoke("point", "verify", "--store", store, "--vm", "web02", "--point", listed[0]["id"])
    assert run.code == 1
    assert "DAMAGED" in run.out
    assert listed[0]["id"] in run.out
    lost = invoke("point", "verify", "--store", store, "--vm", "web02", "--point", "0" * 32)
    assert lost.code not in {0, 1}
    assert "no point" in lost.err


@pytest.mark.parametrize("text", ["7", "7x", "-1d", "d", "1e3s", ""])
def test_a_duration_that_is_none_is_refused(invoke: Callable[..., Run], tmp_path: Path, text: str) -> None:
    run = invoke("serve", "--store", tmp_path, "--tls", tmp_path, "--verify-every", text)
    assert run.code == 2
    assert "is not a duration" in run.err
