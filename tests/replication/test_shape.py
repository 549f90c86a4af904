"""Disks that are resized, added, removed, moved and swapped under protection: told to the replica, never sent anew."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.errors import Fenced, NoSuchPoint, ReplicaDiverged, StateError, TrackingLost
from hvreplica.store import fencing
from tests.replication.machine_site import MIB, STATE, Vm
from tests.support.crash import worlds_after
from tests.support.faultfile import Killed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.replication.sites import Served


@pytest.fixture
def vm(seed: int, served: Served) -> Vm:
    """Return a VM with two disks that the replica has."""
    made = Vm(seed, 4, 3)
    assert made.replicate(served).kind == "initial"
    return made


def stages(vm: Vm) -> list[str]:
    return [disk.stage for disk in vm.state().disks]


def test_grown_disk_is_grown_at_the_replica(vm: Vm, served: Served) -> None:
    vm.resize("0.vhdx", 9 * MIB + 512)
    vm.write("0.vhdx", 4096, at=9 * MIB + 512 - 4096)
    result = vm.replicate(served)
    assert result.kind == "delta"
    assert result.disks[0].virtual_bytes == 9 * MIB + 512
    assert result.disks[0].changed_bytes <= 3 * 4096
    vm.check(served)
    assert vm.replicate(served).kind == "none"


def test_disk_that_only_grew_is_grown_once(vm: Vm, served: Served) -> None:
    vm.resize("1.vhdx", 8 * MIB)
    result = vm.replicate(served)
    assert (result.kind, sum(disk.changed_bytes for disk in result.disks)) == ("delta", 0)
    vm.check(served)
    assert vm.replicate(served).kind == "none"


def test_last_block_that_was_short_is_whole_after_growing(served: Served, seed: int) -> None:
    vm = Vm(seed)
    vm.create("0.vhdx", MIB + 512)
    vm.write("0.vhdx", 512, piece_bytes=512, at=MIB)
    vm.replicate(served)
    vm.resize("0.vhdx", 2 * MIB)
    vm.replicate(served)
    vm.check(served)
    vm.resize("0.vhdx", 2 * MIB + 1536)
    vm.write("0.vhdx", 512, piece_bytes=512, at=2 * MIB + 1024)
    vm.replicate(served)
    vm.check(served)


@pytest.mark.parametrize("regrown", [False, True])
def test_shrunk_disk_is_shrunk_at_the_replica(vm: Vm, served: Served, *, regrown: bool) -> None:
    vm.write("0.vhdx", 4096, at=4 * MIB - 4096)
    vm.replicate(served)
    vm.resize("0.vhdx", 2 * MIB)
    if regrown:
        vm.resize("0.vhdx", 5 * MIB)
    assert vm.replicate(served).kind == "delta"
    vm.check(served)
    assert vm.replicate(served).kind == "none"
    vm.resize("0.vhdx", 6 * MIB)
    vm.replicate(served)
    vm.check(served)  # nothing comes back that was cut off


def test_content_that_was_cut_off_and_comes_again_is_sent_again(vm: Vm, served: Served) -> None:
    """The replica lost it with the end of its disk: its fingerprints must have gone with it."""
    at = 4 * MIB - 4096
    vm.write("0.vhdx", 4096, at=at)
    content = bytes(vm.models["0.vhdx"][at:])
    vm.replicate(served)
    vm.resize("0.vhdx", 2 * MIB)
    vm.replicate(served)
    vm.resize("0.vhdx", 4 * MIB)
    vm.put("0.vhdx", at, content)
    vm.replicate(served)
    vm.check(served)


def test_added_disk_is_copied_alone_and_joins_the_points(vm: Vm, served: Served) -> None:
    vm.create("2.vhdx", 5 * MIB)
    vm.write("0.vhdx", 4096)
    result = vm.replicate(served, compression="none")
    assert result.kind == "delta"
    assert result.disks[0].changed_bytes <= 2 * 4096
    assert result.wire_bytes < 2 * MIB  # of 2 MiB on the others
    vm.check(served)
    assert stages(vm) == ["protected"] * 3
    assert vm.replicate(served).kind == "none"
    vm.write("2.vhdx", 4096)
    vm.replicate(served)
    vm.check(served)


def test_two_disks_added_at_once_arrive_one_after_the_other(vm: Vm, served: Served) -> None:
    vm.create("2.vhdx", 2 * MIB)
    vm.create("3.raw", 3 * MIB)
    vm.replicate(served)
    vm.check(served)
    assert stages(vm) == ["protected"] * 4


@pytest.mark.parametrize("name", ["/primary/0.vhdx", "0", 0])
def test_removed_disk_leaves_the_points(vm: Vm, served: Served, name: str | int, tmp_path: Path) -> None:
    vm.remove("0.vhdx")
    with pytest.raises(StateError) as caught:
        vm.replicate(served)
    assert "--remove-disk /primary/0.vhdx" in (caught.value.hint or "")
    assert vm.replicate(served, remove_disks=[name]).kind == "delta"
    assert stages(vm) == ["removed", "protected"]
    vm.check(served)
    with pytest.raises(NoSuchPoint, match="does not have disk 0"):
        hvreplica.point_export(served.store, vm.name, tmp_path / "out.raw", disk=0, format="raw")
    assert vm.replicate(served).kind == "none"
    vm.replicate(served, remove_disks=[name])  # again, as a script does
    vm.create("0.vhdx", 2 * MIB)
    vm.replicate(served)
    assert stages(vm) == ["removed", "protected", "protected"]
    vm.check(served)
    assert (served.store / vm.name / "disks" / "0.vhdx").exists()


def test_all_of_it_at_once(vm: Vm, served: Served) -> None:
    vm.create("2.vhdx", 2 * MIB)
    vm.resize("0.vhdx", 6 * MIB)
    vm.remove("1.vhdx")
    vm.write("0.vhdx", 4096, at=6 * MIB - 4096)
    vm.replicate(served, remove_disks=[1])
    vm.check(served)
    assert stages(vm) == ["protected", "removed", "protected"]


def test_moved_disk_is_known_by_its_identity(vm: Vm, served: Served) -> None:
    vm.rename(**{"0": "elsewhere"})
    vm.write("elsewhere.vhdx", 4096)
    assert vm.replicate(served).disks[0].changed_bytes <= 2 * 4096
    vm.check(served)
    assert vm.state().disks[0].path == "/primary/elsewhere.vhdx"


def test_swapped_disks_of_one_size_are_known_by_their_identity(served: Served, seed: int) -> None:
    vm = Vm(seed, 3, 3)
    vm.replicate(served)
    vm.rename(**{"0": "1", "1": "0"})
    assert vm.replicate(served).kind == "none"
    assert [disk.path for disk in vm.state().disks] == ["/primary/1.vhdx", "/primary/0.vhdx"]
    vm.write("0.vhdx", 4096)
    vm.replicate(served)
    vm.check(served)


def test_copied_disk_is_not_taken_for_its_original(vm: Vm, served: Served) -> None:
    file = vm.files.open(vm.path("0.vhdx"))
    octets = file.read(0, file.size())
    file.close()
    copy = vm.files.open(vm.path("copy.vhdx"), create=True)
    copy.write(octets, 0)
    copy.close()
    vm.models["copy.vhdx"] = bytearray(vm.models["0.vhdx"])
    vm.files.settle()
    vm.write("copy.vhdx", 4096)
    vm.replicate(served)
    assert [disk.path for disk in vm.state().disks] == [str(vm.path(name)) for name in vm.models]
    vm.check(served)


def test_order_of_known_disks_is_free(vm: Vm, served: Served) -> None:
    vm.models = dict(reversed(vm.models.items()))
    vm.write("1.vhdx", 4096)
    result = vm.replicate(served)
    assert [disk.path for disk in result.disks] == ["/primary/0.vhdx", "/primary/1.vhdx"]
    vm.check(served)


def test_renamed_file_without_an_identity_is_not_guessed(served: Served, seed: int) -> None:
    vm = Vm(seed)
    vm.create("a.raw", 2 * MIB)
    vm.replicate(served)
    vm.files.replace(vm.path("a.raw"), vm.path("b.raw"))
    vm.models = {"b.raw": vm.models["a.raw"]}
    with pytest.raises(StateError) as caught:
        vm.replicate(served)
    assert "b.raw is none of the disks" in (caught.value.hint or "")


def test_unknown_name_to_remove_is_refused(vm: Vm, served: Served) -> None:
    with pytest.raises(StateError, match="no such disk to remove"):
        vm.replicate(served, remove_disks=["/primary/other.vhdx"])
    with pytest.raises(StateError, match="named and removed at once"):
        vm.replicate(served, remove_disks=["0"])


def test_last_disk_cannot_be_removed(served: Served, seed: int) -> None:
    vm = Vm(seed, 2)
    vm.replicate(served)
    with pytest.raises(StateError, match="at least one disk"):
        hvreplica.replicate(
            vm.name, [], to=served.address, tls=served.tls, state=STATE, files=vm.files, remove_disks=["0"]
        )


def test_disk_with_other_sectors_is_another_disk(vm: Vm, served: Served) -> None:
    vm.files.unlink(vm.path("1.vhdx"))
    hvreplica.disk.create_disk(
        vm.files,
        vm.path("1.vhdx"),
        virtual_bytes=3 * MIB,
        format="vhdx",
        logical_sector_bytes=4096,
        clock=SYSTEM,
    )
    with pytest.raises(TrackingLost, match="another sector size") as caught:
        vm.replicate(served)
    assert "--remove-disk 1" in (caught.value.hint or "")


def test_disk_is_not_added_to_an_unfinished_first_copy(served: Served, seed: int) -> None:
    vm = Vm(seed, 4)
    vm.files.kill_at(23)
    with pytest.raises(Killed):
        vm.replicate(served)
    vm.files = vm.files.after_kill()
    assert vm.state().phase == "initial"
    vm.create("1.vhdx", 2 * MIB)
    with pytest.raises(StateError, match="once the first copy"):
        vm.replicate(served)
    vm.remove("1.vhdx")
    vm.resize("0.vhdx", 5 * MIB)
    assert vm.replicate(served).kind == "initial"
    vm.check(served)


def test_lost_state_is_found_again_after_a_resize(vm: Vm, served: Served) -> None:
    vm.resize("0.vhdx", 6 * MIB)
    vm.resize("1.vhdx", 2 * MIB)
    vm.files.unlink(STATE / "state.json")
    with pytest.raises(Fenced):
        vm.replicate(served)
    result = vm.replicate(served, takeover=True)
    assert result.kind == "delta"
    vm.check(served)
    assert vm.replicate(served).kind == "none"


@pytest.mark.parametrize("is_named", [False, True])
def test_lost_state_of_a_vm_that_lost_a_disk_keeps_the_indexes(
    vm: Vm, served: Served, monkeypatch: pytest.MonkeyPatch, *, is_named: bool
) -> None:
    # The index is told beside the words of the refusal, which are for people and may change.
    monkeypatch.setattr(fencing, "_describe", lambda row: f"{row.spec.index}: other words")
    vm.create("2.vhdx", 2 * MIB)
    vm.remove("1.vhdx")
    vm.replicate(served, remove_disks=["1"])
    vm.files.unlink(STATE / "state.json")
    with pytest.raises(Fenced):
        vm.replicate(served)
    vm.write("2.vhdx", 4096)
    result = vm.replicate(served, takeover=True, remove_disks=["1"] if is_named else [])
    assert result.kind == "delta"
    assert result.disks[1].changed_bytes <= 2 * 4096
    vm.check(served)
    assert stages(vm) == ["protected", "removed", "protected"]


def test_resync_takes_an_added_disk_along(vm: Vm, served: Served) -> None:
    vm.create("2.vhdx", 2 * MIB)
    vm.replicate(served, resync=True)
    vm.check(served)
    assert vm.replicate(served, resync=True).kind == "none"


def test_whole_copy_anew_has_the_disks_of_now(vm: Vm, served: Served) -> None:
    vm.create("2.vhdx", 2 * MIB)
    vm.remove("1.vhdx")
    vm.resize("0.vhdx", 5 * MIB)
    (served.store / vm.name / "disks" / "0.vhdx").unlink()
    with pytest.raises(ReplicaDiverged, match="damaged"):
        vm.replicate(served, remove_disks=["1"])
    assert vm.replicate(served, resync=True, remove_disks=["1"]).kind == "initial"
    vm.check(served)
    assert stages(vm) == ["protected", "removed", "protected"]


def change(vm: Vm, what: str) -> list[str]:
    """Let the VM's administrator do something; return which disks to remove."""
    if what == "grow":
        vm.resize("0.vhdx", 5 * MIB + 512)
    elif what == "shrink":
        vm.resize("0.vhdx", MIB + 512)
    elif what == "add":
        vm.create("new.vhdx", 2 * MIB, written_bytes=256 << 10)
    else:
        vm.remove("0.vhdx")
        return ["0"]
    return []


@pytest.mark.parametrize("power", [True, False], ids=["power-cut", "killed"])
@pytest.mark.parametrize("what", ["grow", "shrink", "add", "remove"])
def test_call_cut_anywhere_continues(served: Served, seed: int, what: str, *, power: bool) -> None:
    """The VM's disks change, and the call that tells the replica is cut at one of its file events."""
    rng = random.Random(f"{seed} {what} {power}")
    event_count, cuts = rng.randrange(1, 4), 0
    while True:
        vm = Vm(seed, 2, 2, name=f"web{cuts}")
        vm.replicate(served)
        gone = change(vm, what)
        vm.write("1.vhdx", 4096)
        vm.files.kill_at(event_count)
        try:
            vm.replicate(served, remove_disks=gone)
        except Killed:
            cuts += 1
        else:
            break
        finally:
            vm.files.heal()
        where = f"seed {seed}, {what}, cut after {event_count} events: {vm.files.story}"
        worlds = worlds_after(vm.files.trace(), seed=rng.randrange(1 << 30), subsets=4) if power else []
        vm.files = rng.choice(worlds) if power else vm.files.after_kill()
        if rng.random() < 0.5:
            vm.write("1.vhdx", 3 * 4096)
        assert vm.replicate(served, remove_disks=gone).kind in {"delta", "none"}, where
        vm.check(served)
        assert vm.replicate(served).kind == "none", where
        event_count += 1 if settings().max_examples > 1000 else rng.randrange(3, 9)
    vm.check(served)
    assert cuts > 3, "a call has more file events than that"
