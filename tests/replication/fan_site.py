"""A captured VM that feeds two replicas: the one of every capture, and one further east."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hvreplica
from hvreplica.replication.replicas import Replica
from tests.replication.captured import VM, Captured

if TYPE_CHECKING:
    import contextlib
    import random
    from pathlib import Path

    from tests.replication.sites import Served

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
