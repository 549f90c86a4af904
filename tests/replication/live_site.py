"""A primary whose disks are tracked live by a FakeMachine, in files that can lose power."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.replication.live import cut_live
from hvreplica.replication.primary import Primary
from hvreplica.replication.state import StateFolder, track
from hvreplica.replication.work import Link, Tally, Work
from hvreplica.transport import client_context
from tests.support.fake_machine import FakeMachine
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from hvreplica.clock import Clock
    from hvreplica.progress import Progress
    from hvreplica.replication.live import RecordedCut
    from tests.replication.sites import Served

MIB = 1 << 20
STATE = Path("/primary/state")
VM = "web01"


class LiveSite:
    """One VM with live tracking. start() opens it, stop() leaves it as a process that ended."""

    def __init__(
        self, seed: int, *, disks_bytes: tuple[int, ...] = (24 * MIB,), clock: Clock = SYSTEM
    ) -> None:
        self.rng = random.Random(seed)
        self.clock = clock
        self.files = FaultFiles("/primary")
        self.paths = [Path(f"/primary/web01-{index}.vhdx") for index in range(len(disks_bytes))]
        for path, size_bytes in zip(self.paths, disks_bytes, strict=True):
            create_disk(
                self.files, path, virtual_bytes=size_bytes, block_bytes=MIB, clock=clock, format="vhdx"
            )
        self.reports: list[Progress] = []
        self.start()
        for index in range(len(disks_bytes)):
            self.write(4 * MIB, index=index, piece_bytes=MIB // 4)

    def start(self) -> None:
        """Open disks and state, as capture does when it starts."""
        self.folder = StateFolder(self.files, STATE, clock=self.clock)
        self.disks = [open_disk(self.files, path, writable=True, clock=self.clock) for path in self.paths]
        self.machine = FakeMachine(self.files, self.disks, self.folder.logs, clock=self.clock)
        self.work = Work(
            folder=self.folder,
            state=self.folder.load() or track(VM, self.disks, clock=self.clock),
            disks=self.disks,
            link=Link("", None, "auto", 2),  # type: ignore[arg-type] # each call says where to
            files=self.files,
            clock=self.clock,
            on_progress=self.reports.append,
            tally=Tally("none", [0] * len(self.disks)),
            machine=self.machine,
        )
        self.work.save()
        self.work.sweep_logs()

    def stop(self) -> None:
        """Close all; tracking keeps nothing, so the next start marks whole disks where a test says so."""
        self.work.close_tables()
        for disk in self.disks:
            disk.close()
        self.folder.release()

    def write(
        self,
        total_bytes: int,
        *,
        index: int = 0,
        piece_bytes: int = 4096,
        align: int = 4096,
        logged: bool = True,
    ) -> None:
        """Write random pieces at random places."""
        size_bytes = self.disks[index].virtual_bytes
        for _ in range(max(total_bytes // piece_bytes, 1)):
            at = self.rng.randrange((size_bytes - piece_bytes) // align + 1) * align
            data = bytes(piece_bytes) if self.rng.random() < 0.1 else self.rng.randbytes(piece_bytes)
            self.machine.write(index, at, data, logged=logged)

    def primary(self, served: Served, **options: bool) -> Primary:
        """Return what drives replicate calls to a server."""
        self.work.link = Link(served.address, client_context(served.tls), "auto", 2)
        return Primary(self.work, **options)

    def replicate(self, served: Served, **options: bool) -> Tally:
        """Run one call with a fresh tally and return what it did."""
        self.work.tally = Tally("none", [0] * len(self.disks))
        primary = self.primary(served, **options)
        try:
            primary.run()
        finally:
            primary.close()
        return self.work.tally

    def cut(self) -> RecordedCut:
        """Cut and record, as the verb does."""
        return cut_live(self.work)

    def equals(self, served: Served) -> bool:
        """Return whether the newest point is what the guest reads now, on every disk."""
        return all(
            served.content(VM, index) == self.machine.content(index) for index in range(len(self.disks))
        )
