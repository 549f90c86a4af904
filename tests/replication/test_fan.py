"""One captured VM with several replicas: each cut is for all of them, and each goes at its own pace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import hvreplica
from hvreplica.replication.replicas import Replica
from tests.replication.captured import VM, Captured
from tests.replication.sites import Served

if TYPE_CHECKING:
    import contextlib
    import random
    from collections.abc import Iterator
    from pathlib import Path

NEVER_S = 1e6  # a cycle at the start alone


class Fanned(Captured):
    """A captured VM with its replica and a second one, called east."""

    def __init__(self, folder: Path, served: Served, east: Served, rng: random.Random) -> None:
        super().__init__(folder, served, rng)
        self.east = east
        self.east_state = self.state / "replicas" / "east"
        self.east_link = {"to": east.address, "tls": east.tls}

    def both(self, **options: object) -> contextlib.AbstractContextManager[hvreplica.Capture]:
        """Capture, with cycles when they are asked for."""
        return self.running(replicas=[self.replica(**options)])

    def replica(self, **options: object) -> Replica:
        return Replica("east", self.east.address, self.east.tls, interval_s=NEVER_S, **options)  # type: ignore[arg-type]

    def to_east(self) -> hvreplica.ReplicateResult:
        return hvreplica.replicate(VM, state=self.east_state, **self.east_link)

    def east_equal(self) -> bool:
        return all(self.east.content(VM, index) == model for index, model in enumerate(self.models))

    def queues(self) -> tuple[int, int]:
        return tuple(len(hvreplica.status(state).pending) for state in (self.state, self.east_state))  # type: ignore[return-value]


@pytest.fixture
def east(tmp_path: Path, served: Served) -> Iterator[Served]:
    server = Served(tmp_path / "east", served.tls)
    yield server
    server.close()


@pytest.fixture
def site(tmp_path: Path, served: Served, east: Served, rng: random.Random) -> Fanned:
    return Fanned(tmp_path, served, east, rng)


def test_each_replica_gets_every_change_at_its_own_pace(site: Fanned) -> None:
    with site.both(), site.guest() as guest, site.guest(1) as second:
        site.write(guest, 30)
        site.replicate()
        site.to_east()
        site.replicate()
        for _ in range(3):
            site.write(guest, 5)
            site.write(second, 3, index=1)
            site.replicate()
            assert site.equal()
        assert site.queues() == (0, 3), "each cut waits for the slower one"
        assert len(hvreplica.point_list(site.east.store, VM)) == 1
        site.to_east()
        assert site.east_equal()
        site.write(guest, 5)
        site.to_east()
        assert site.east_equal()
        assert site.queues() == (1, 0)
        site.replicate()
        assert site.equal()
    assert not list((site.state / "logs").iterdir())
    assert not list((site.east_state / "logs").iterdir())
