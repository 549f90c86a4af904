"""The verb `replicate` between two sites: what it says it did, and that both sides are equal afterwards."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import Fenced, ReplicaDiverged, StateError, TrackingLost, Unreachable
from hvreplica.files import OS_FILES
from tests.replication.sites import DISK, MIB, STATE, VM, Guest, Served

if TYPE_CHECKING:
    from pathlib import Path


def test_replicate_first_call_ships_the_whole_disk(guest: Guest, served: Served) -> None:
    result = guest.replicate(served)
    assert (result.kind, result.logs) == ("initial", [])
    assert result.disks[0].virtual_bytes == len(guest.model)
    written = sum(any(guest.model[at : at + 4096]) for at in range(0, len(guest.model), 4096)) * 4096
    assert result.disks[0].changed_bytes == written
    assert result.wire_bytes > written // 2
    assert served.content() == guest.model
    assert [point.id for point in hvreplica.point_list(served.store, VM)] == [result.point]


def test_replicate_without_change_ships_nothing(guest: Guest, served: Served) -> None:
    first = guest.replicate(served)
    second = guest.replicate(served)
    assert (second.kind, second.point, second.logs) == ("none", first.point, [])
    assert second.disks[0].changed_bytes == 0


def test_replicate_after_writes_ships_only_the_changed_blocks(guest: Guest, served: Served) -> None:
    guest.replicate(served)
    before = bytes(guest.model)
    guest.write(40 * 4096)
    changed = sum(guest.model[at : at + 4096] != before[at : at + 4096] for at in range(0, len(before), 4096))
    result = guest.replicate(served, compression="none")
    assert result.kind == "delta"
    assert result.disks[0].changed_bytes == changed * 4096
    assert len(result.logs) == 1
    assert result.wire_bytes < changed * 4096 * 1.05 + 20_000  # the handshakes of a tiny cycle
    assert served.content() == guest.model
    assert guest.files.names(STATE / "logs") == []


def test_replicate_after_trim_gives_the_space_back_to_zeros(guest: Guest, served: Served) -> None:
    guest.replicate(served)
    guest.zero(3 * MIB, 5 * MIB)
    result = guest.replicate(served)
    assert result.kind == "delta"
    assert result.wire_bytes < MIB // 4
    assert served.content() == guest.model
    assert guest.replicate(served).kind == "none"


@pytest.mark.parametrize("compression", ["auto", "zstd", "lz4", "none"])
@pytest.mark.parametrize("connections", [1, 3])
def test_replicate_with_any_codec_gives_the_same_disk(
    guest: Guest, served: Served, compression: str, connections: int
) -> None:
    guest.replicate(served, compression=compression, connections=connections)
    guest.write(MIB)
    guest.replicate(served, compression=compression, connections=connections)
    assert served.content() == guest.model


def test_replicate_with_lost_state_is_fenced_until_takeover(guest: Guest, served: Served) -> None:
    guest.replicate(served)
    guest.write(20 * 4096)
    guest.files.unlink(STATE / "state.json")
    with pytest.raises(Fenced):
        guest.replicate(served)
    result = guest.replicate(served, takeover=True)
    assert result.kind == "delta"
    assert result.disks[0].changed_bytes <= 20 * 4096
    assert served.content() == guest.model


def test_replicate_by_the_old_primary_after_a_takeover_is_fenced(
    guest: Guest, served: Served, seed: int
) -> None:
    guest.replicate(served)
    other = Guest(seed + 1)
    other.replicate(served, takeover=True)
    assert served.content() == other.model
    guest.write(4096)
    with pytest.raises(Fenced):
        guest.replicate(served)
    assert served.content() == other.model


def test_replicate_with_damaged_fingerprints_asks_for_resync(guest: Guest, served: Served) -> None:
    guest.replicate(served)
    guest.write(20 * 4096)
    file = guest.files.open(STATE / "fingerprints" / "0.fp", writable=True)
    file.write(b"\xff", 20)
    file.close()
    with pytest.raises(TrackingLost, match="checksum"):
        guest.replicate(served)
    result = guest.replicate(served, resync=True)
    assert result.disks[0].changed_bytes <= 20 * 4096
    assert served.content() == guest.model
    guest.write(4096)
    assert guest.replicate(served).kind == "delta"
    assert served.content() == guest.model


def test_replicate_to_an_empty_store_is_refused_until_resync(
    guest: Guest, served: Served, tmp_path: Path, tls: Path
) -> None:
    guest.replicate(served)
    other = Served(tmp_path / "other", tls)
    try:
        with pytest.raises(ReplicaDiverged, match="no longer"):
            guest.replicate(other)
        assert guest.replicate(other, resync=True).kind == "initial"
        assert other.content() == guest.model
    finally:
        other.close()


def test_replicate_with_another_vm_name_is_refused(guest: Guest, served: Served) -> None:
    guest.replicate(served)
    with pytest.raises(StateError, match="another VM"):
        hvreplica.replicate("db01", [DISK], to=served.address, tls=served.tls, state=STATE, files=guest.files)


def test_replicate_without_a_server_says_where_it_looked(guest: Guest, served: Served) -> None:
    address = served.address
    served.close()
    with pytest.raises(Unreachable, match=address):
        guest.replicate(served)
    served.start()
    guest.replicate(served)
    assert served.content() == guest.model


def test_replicate_reports_progress_that_only_grows(guest: Guest, served: Served) -> None:
    seen: list[hvreplica.Progress] = []
    guest.replicate(served, progress=seen.append)
    initial = [report for report in seen if report.phase == "initial"]
    assert initial[-1].done_bytes == initial[-1].total_bytes == len(guest.model)
    assert all(a.done_bytes <= b.done_bytes for a, b in pairwise(initial))


@pytest.mark.parametrize(("kind", "block_bytes"), [("dynamic", 512 << 10), ("fixed", None)])
def test_vhd_is_replicated_into_a_vhdx_of_its_own_blocks(
    tmp_path: Path, served: Served, kind: str, block_bytes: int | None
) -> None:
    """No VHDX has blocks of 512 KiB, so the replica chooses."""
    disk, state = tmp_path / "a.vhd", tmp_path / "state"
    hvreplica.disk_create(disk, 5 * MIB, format="vhd", type=kind, block_bytes=block_bytes)
    options = {"to": served.address, "tls": served.tls, "state": state}
    for number in (1, 2):
        with open_disk(OS_FILES, disk, writable=True, clock=SYSTEM) as guest:
            guest.write(bytes([number]) * 70_000, number * MIB)
        assert hvreplica.replicate(VM, [disk], **options).kind == ("initial", "delta")[number - 1]
    expected = bytearray(5 * MIB)
    for number in (1, 2):
        expected[number * MIB : number * MIB + 70_000] = bytes([number]) * 70_000
    assert served.content() == expected
    hvreplica.point_export(served.store, VM, tmp_path / "out.vhd", format="vhd")
    assert hvreplica.disk_compare(disk, tmp_path / "out.vhd").equal
