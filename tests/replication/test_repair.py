"""Damage at the replica is found by reading it again, and put right by the primary's next call where it can be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import HvReplicaError, PeerClosed
from hvreplica.formats import messages
from hvreplica.formats.messages import PointPolicy
from hvreplica.replication import repair
from hvreplica.replication.resync import fetch_fingerprints
from hvreplica.replication.session import ReplicaSession
from hvreplica.store.repair import Repair
from tests.replication.captured import Captured
from tests.replication.sites import MIB, VM, Guest, Served

if TYPE_CHECKING:
    import random

    from hvreplica.store import VmVerdict


EVERY = PointPolicy(recovery_points=24, recovery_point_every_s=0)


class Points:
    """A guest whose every cycle is a point, and what each one must show."""

    def __init__(self, guest: Guest, served: Served) -> None:
        self.guest = guest
        self.served = served
        self.images: dict[str, bytes] = {}

    def cycle(self) -> str:
        result = self.guest.replicate(self.served, points=EVERY)
        assert result.point is not None
        self.images[result.point] = bytes(self.guest.model)
        return result.point

    def verify(self) -> VmVerdict:
        return hvreplica.store_verify(self.served.store).vms[0]

    def states(self) -> dict[str, str]:
        return {point.id: point.state for point in hvreplica.point_list(self.served.store, VM)}

    def check(self) -> None:
        """Compare every point that can be had with what the guest had written."""
        for point_id, state in self.states().items():
            if state == "complete":
                with tempfile.TemporaryDirectory() as folder:
                    output = Path(folder) / "export.raw"
                    hvreplica.point_export(self.served.store, VM, output, point=point_id, format="raw")
                    assert output.read_bytes() == self.images[point_id], point_id

    def damage(self, disk_offset: int, length: int = 1) -> None:
        """Let the replica's disk lose some bytes."""
        self.served.damage(disk_offset, length)

    def used(self, count: int) -> list[int]:
        """Return offsets of blocks that hold data, far apart."""
        model = self.guest.model
        found = [at for at in range(0, len(model), 4096) if any(model[at : at + 4096])]
        return found[:: max(len(found) // count, 1)][:count]


@pytest.fixture
def points(guest: Guest, served: Served) -> Points:
    made = Points(guest, served)
    made.cycle()
    for _ in range(2):
        guest.write(MIB)
        made.cycle()
    return made


def damaged(verdict: VmVerdict) -> set[str]:
    return {point.id for point in verdict.points if point.state == "damaged"}


def test_damage_goes_back_in_place_and_all_points_are_whole_again(points: Points) -> None:
    offsets = points.used(3)
    points.damage(offsets[0])
    points.damage(offsets[1] + 5, 3 * 512)
    points.damage(offsets[2], 4096)
    verdict = points.verify()
    newest = points.guest.replicate(points.served).point
    assert newest in damaged(verdict)
    assert set(points.states().values()) == {"complete"}
    assert not points.verify().is_damaged
    points.check()
    points.guest.write(MIB)
    points.cycle()
    assert not points.verify().is_damaged
    points.check()


def test_what_the_guest_changed_since_comes_with_the_cycle_and_older_points_stay_damaged(
    points: Points,
) -> None:
    first, second = points.used(2)
    points.damage(first)
    points.damage(second)
    points.verify()
    images = dict(points.images)
    lost = bytes(points.guest.model[first : first + 4096])
    with open_disk(points.guest.files, Path("/primary/web01.vhdx"), writable=True, clock=SYSTEM) as disk:
        disk.write(b"n" * 4096, first)
    points.guest.model[first : first + 4096] = b"n" * 4096
    points.guest.files.settle()
    newest = points.cycle()
    assert points.states()[newest] == "complete"
    # Nobody has the bytes any more that these points shared; the other block went back for all of them.
    sharing = {point_id for point_id, image in images.items() if image[first : first + 4096] == lost}
    assert damaged(points.verify()) == sharing
    points.check()
    points.guest.write(MIB)
    points.cycle()
    assert damaged(points.verify()) == sharing
    points.check()


def test_a_repair_that_is_cut_is_found_again(points: Points, monkeypatch: pytest.MonkeyPatch) -> None:
    points.damage(points.used(1)[0])
    points.verify()
    whole = Repair.end

    def cut(self: Repair, *_: object, **__: object) -> bool:
        self._drifts.clear()
        raise OSError(5, "cut")

    monkeypatch.setattr(Repair, "end", cut)
    with pytest.raises(HvReplicaError):
        points.guest.replicate(points.served)
    monkeypatch.setattr(Repair, "end", whole)
    points.guest.write(MIB)
    points.cycle()
    assert "damaged" in points.states().values()
    assert not points.verify().is_damaged
    assert set(points.states().values()) == {"complete"}
    points.check()


def test_a_sound_replica_is_asked_nothing(points: Points, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvreplica.replication.primary.repair", None)
    assert not points.verify().is_damaged
    points.guest.write(MIB)
    points.cycle()


def test_a_repair_that_is_cut_and_begun_again_proves_nothing_of_what_has_changed(
    tmp_path: Path, served: Served, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second try finds the table as the first one left it."""
    real = ReplicaSession.ask

    def ask(session: ReplicaSession, question: Any, expected: Any) -> Any:
        if isinstance(question, messages.RepairEnd):
            proven.append(question.proven)
            if len(proven) == 1:
                raise PeerClosed("cut")
        return real(session, question, expected)

    def fetch(*values: Any) -> Any:
        guest.write(0, b"n" * 4096)  # after the cut, and before the repair looks at the disk
        return fetch_fingerprints(*values)

    proven: list[bool] = []
    site = Captured(tmp_path, served, rng)
    with site.running(), site.guest() as guest:
        guest.write(0, b"o" * 4096)
        site.replicate()
        site.replicate()
        served.damage(0)
        hvreplica.store_verify(served.store)
        monkeypatch.setattr(ReplicaSession, "ask", ask)
        monkeypatch.setattr(repair, "fetch_fingerprints", fetch)
        site.replicate()
        assert proven[:2] == [False, False]
        site.models[0][:4096] = b"n" * 4096
        assert site.equal()
