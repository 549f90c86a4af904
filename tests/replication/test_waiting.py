"""Points that are at the replica and not on its disks yet: the reason is told, and a damaged log is healed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.errors import HvReplicaError
from hvreplica.formats.messages import PointPolicy
from hvreplica.image_lock import hold_image
from hvreplica.store import apply
from tests.replication.sites import MIB, STATE, VM, Guest, Served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hvreplica.store import VmStatus


@contextlib.contextmanager
def reader(served: Served) -> Iterator[None]:
    """Read the replica's disk as a qemu-img does that was not told to share it."""
    descriptor = os.open(served.store / VM / "disks" / "0.vhdx", os.O_RDONLY)
    try:
        assert hold_image(descriptor, writes=False)
        yield
    finally:
        os.close(descriptor)


def at_replica(served: Served) -> VmStatus:
    return hvreplica.store_status(served.store).vms[0]


def issues(guest: Guest) -> str:
    found = hvreplica.status(STATE, files=guest.files)
    return " | ".join(found.statistics.replication_health_issues)


@pytest.fixture
def guest(seed: int) -> Guest:
    return Guest(seed, disk_bytes=12 * MIB)


def test_point_that_waits_for_a_reader_is_told_with_the_reason(guest: Guest, served: Served) -> None:
    assert guest.replicate(served).waits_for is None
    guest.write(8192)
    with reader(served):
        result = guest.replicate(served)
        assert "0.vhdx" in (result.waits_for or "")
        told = at_replica(served).waits_for or ""
        assert told.startswith("disk 0 cannot be changed while another process has")
        assert "0.vhdx" in told
        assert "applies it later" in issues(guest)
    assert at_replica(served).waits_for is None
    assert at_replica(served).spool_bytes > 0
    assert guest.replicate(served).waits_for is None
    assert "later" not in issues(guest)
    assert served.content() == guest.model


@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize("place", ["header", "data", "gone"])
def test_resync_heals_a_damaged_log_that_waits(
    guest: Guest, served: Served, monkeypatch: pytest.MonkeyPatch, place: str, *, is_begun: bool
) -> None:
    """The point before stays the newest one until then; where the disks have begun to change, a whole copy comes."""
    guest.replicate(served, points=PointPolicy(recovery_point_every_s=0))
    first = bytes(guest.model)
    guest.write(40 * 4096)
    with reader(served), monkeypatch.context() as patch:
        if is_begun:
            patch.setattr(apply, "require_unused", lambda *_: None)
        guest.replicate(served)
    assert at_replica(served).points[-1].state == ("applying" if is_begun else "spooled")
    served.close()  # what a process has received it has checked
    (log,) = (served.store / VM / "spool").glob("*.hrl")
    spoil(log, place)
    served.start()
    with pytest.raises(HvReplicaError):
        guest.replicate(served)
    result = guest.replicate(served, resync=True)
    assert result.kind == ("initial" if is_begun else "delta")
    assert served.content() == guest.model
    guest.write(4096)
    assert guest.replicate(served).kind == "delta"
    assert served.content() == guest.model
    assert result.waits_for is None
    points = hvreplica.point_list(served.store, VM)
    assert [point.state for point in points] == ["complete"] * len(points)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "first.raw"
        hvreplica.point_export(served.store, VM, output, point=points[0].id, format="raw")
        assert output.read_bytes() == first


def spoil(log: Path, place: str) -> None:
    if place == "gone":
        log.unlink()
        return
    data = bytearray(log.read_bytes())
    data[100 if place == "header" else len(data) // 2] ^= 1
    log.write_bytes(data)
