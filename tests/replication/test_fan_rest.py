"""Disks at rest with two replicas, each with a state folder of its own: policies, a planned failover to one, the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.errors import Fenced, InvalidTransition
from tests.replication.two_sites import VM, TwoSites

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def sites(tmp_path: Path, tls: Path, rng: random.Random) -> Iterator[TwoSites]:
    sites = TwoSites(tmp_path, tls, rng, sizes=(12 << 20,))
    with sites.closing:
        yield sites


def test_two_replicas_of_disks_at_rest_and_a_planned_failover_to_one(sites: TwoSites) -> None:
    first, second = sites.folder / "first", sites.folder / "second"
    main, inner = sites.state, sites.state / "replicas" / "second"

    def cycle(store: Path, **options: object) -> hvreplica.ReplicateResult:
        sites.state = main if store == first else inner
        return sites.replicate(store, **options)

    def equal(store: Path) -> bool:
        return [sites.serve(store).content(VM)] == [bytes(model) for model in sites.models]

    policy = hvreplica.PointPolicy(recovery_points=2, recovery_point_every_s=0)
    for number in range(4):
        sites.write(4)
        cycle(first, points=policy)
        if number % 2 == 0:
            cycle(second)
    assert equal(first)
    assert len(hvreplica.point_list(first, VM)) == 3
    assert len(hvreplica.point_list(second, VM)) == 1, "of one hour, the newest"
    cycle(second, prepare=True)
    assert equal(second)
    with pytest.raises(InvalidTransition, match="another of its replicas"):
        cycle(first, prepare=True)
    assert hvreplica.status(main).replication_state == "Replicating"
    assert [each.status.replication_state for each in hvreplica.status(main).replicas] == [
        "PreparedForFailover"
    ]
    with pytest.raises(InvalidTransition, match="another of its replicas"):
        hvreplica.Capture(VM, sites.disks, state=main, socket=sites.folder / "nbd.sock")
    assert cycle(first).kind == "none", "what is shipped harms nobody: nothing writes any more"
    hvreplica.failover_planned(second, VM)
    with pytest.raises(Fenced):
        hvreplica.cancel_prepare(inner, **sites.link(second))
    sites.run_at(second)
    sites.state = sites.folder / "new"
    sites.write(3)
    assert sites.replicate(first, takeover=True).kind == "delta"
    assert equal(first)
    assert len(hvreplica.point_list(first, VM)) == 3, "its points stay, by its own policy"
    sites.disks = [sites.folder / "disk0.vhdx"]
    with pytest.raises(Fenced):
        cycle(first)
