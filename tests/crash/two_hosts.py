"""Two hosts whose files can lose power, and a VM that lives on one of them at a time: every verb, in one process.

What a crash is: the host's files fail with Killed from a counted step on, in its server and in the verb; then
the host comes back with all that was written, or with what a power cut leaves of it. The catalogs are real
SQLite files in a folder of memory: a transaction of theirs that was committed is there after either.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np

import hvreplica
from hvreplica.disk import create_disk, open_disk
from hvreplica.hrl import LogWriter
from hvreplica.progress import quiet
from hvreplica.replication.live import cut_live
from hvreplica.replication.opening import state_for
from hvreplica.replication.primary import Primary
from hvreplica.replication.serve import Server
from hvreplica.replication.state import StateFolder
from hvreplica.replication.work import Tally, Work, make_link
from hvreplica.store import Store
from hvreplica.store.open_point import open_point
from tests.store.failover_world import read_whole
from tests.store.history import put_catalog
from tests.support.crash import worlds_after
from tests.support.fake_machine import FakeLog, FakeMachine
from tests.support.fakeclock import FakeClock
from tests.support.faultfile import FaultFiles, Killed

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from hvreplica.disk.open import Format
    from hvreplica.store.home import VmHome

MIB = 1 << 20
VM = "web01"
WORLDS = 8  # of a power cut, of which one is drawn


class Host:
    """A host with a store, which a server serves from the first time that it is wanted."""

    def __init__(self, folder: Path, name: str, clock: FakeClock) -> None:
        self.name, self.folder, self.clock = name, folder, clock
        self.store = folder / "store"
        self.store.mkdir(parents=True)
        self.address = f"{name}.example:8084"
        self.files = FaultFiles(folder)
        self.server: Server | None = None
        self.points: dict[uuid.UUID, dict[int, bytes]] = {}

    @property
    def link(self) -> dict[str, Any]:
        """How to reach the server, which is started where it was not."""
        if self.server is None:
            self.server = Server(
                self.store, listen=self.address, tls=self.folder, files=self.files, clock=self.clock
            )
            damage = [vm.damage for vm in self.server._store.status().vms if vm.damage]
            assert damage == [], self.files.story
        return {"to": self.address, "tls": self.folder}

    @contextlib.contextmanager
    def home(self) -> Iterator[VmHome]:
        """Open the VM in the store, as a verb beside the server does."""
        with contextlib.closing(Store.open_reading(self.files, self.store, clock=self.clock)) as store:
            yield store.home(VM)

    @property
    def has_vm(self) -> bool:
        """Whether the store knows the VM."""
        if not (self.store / "catalog.db").exists():
            return False
        with contextlib.closing(Store.open_reading(self.files, self.store, clock=self.clock)) as store:
            return any(vm.name == VM for vm in store.status().vms)

    def stop(self) -> None:
        """End the server in good order."""
        server, self.server = self.server, None
        if server is not None:
            server.close()

    def crash(self, rng: random.Random, *, power: bool) -> None:
        """Come back after Killed, or now: without the server."""
        server, self.server = self.server, None
        if server is not None:
            server._listener.close()
            server._store._parts.catalog.close()
        if power:
            self.files = rng.choice(
                worlds_after(self.files.trace(), seed=rng.getrandbits(30), subsets=WORLDS)
            )
        else:
            self.files = self.files.after_kill()

    def dying(self, step: int, rng: random.Random, *, power: bool, verb: Callable[[], Any]) -> bool:
        """Call a verb with the host dying at that step of it; return whether it did.

        Where it did, the verb has ended somehow or other, and the host is back.
        """
        self.files.settle()
        self.files.kill_at(step)
        try:
            verb()
        except Killed:
            pass
        except Exception:
            if not self.files._killed:
                self.files.heal()
                raise
        if not self.files._killed:
            self.files.heal()
            return False
        self.crash(rng, power=power)
        return True


class StampedMachine(FakeMachine):
    """Logs each write with its second and in order, as capture does where logs are to be kept."""

    def __init__(self, files: FaultFiles, disks: Sequence[Any], logs: Path, *, clock: FakeClock) -> None:
        super().__init__(files, disks, logs, clock=clock)
        self._stamps: list[list[float]] = [[] for _ in disks]

    def write(self, index: int, disk_offset: int, data: bytes, *, logged: bool = True) -> None:
        super().write(index, disk_offset, data, logged=logged)
        self._stamps[index].append(self._clock.now_s())

    def _close(self, index: int, epoch: Any, content: bytes, previous_log_id: uuid.UUID, known: Any) -> Any:
        if epoch.grains:
            return super()._close(index, epoch, content, previous_log_id, known)
        log_id = self._clock.guid()
        path = self.logs / f"{log_id}.hrl"
        with LogWriter.create(
            self.files,
            path,
            log_id=log_id,
            previous_log_id=previous_log_id,
            data_write_guid=None,
            clock=self._clock,
        ) as writer:
            for stamp, (offset, data) in zip(self._stamps[index], epoch.writes, strict=True):
                writer.append(np.array([[offset, len(data)]], np.int64), data, time_s=stamp)
            done = writer.close()
        return FakeLog(
            index,
            log_id,
            previous_log_id,
            path,
            done.log_bytes,
            done.entries,
            done.data_bytes,
            is_ordered=True,
        )


class TwoHosts:
    """The VM with its disks begins on host a. models: what they hold. state: the folder of their primary."""

    def __init__(
        self, folder: Path, seed: int, sizes: Sequence[int] = (2 * MIB,), kind: Format = "vhdx"
    ) -> None:
        self.rng = random.Random(seed)
        self.clock = FakeClock(seed=seed)
        self.a = Host(folder / "a", "a", self.clock)
        self.b = Host(folder / "b", "b", self.clock)
        self.models = [bytearray(size) for size in sizes]
        self.here, self.there = self.a, self.b  # where the VM runs, and its other site
        self.disks = [self.a.folder / f"disk{index}.{kind}" for index in range(len(sizes))]
        self.state = self.a.folder / "state"
        for path, size in zip(self.disks, sizes, strict=True):
            create_disk(
                self.a.files,
                path,
                virtual_bytes=size,
                block_bytes=MIB if kind == "vhdx" else None,
                clock=self.clock,
                format=kind,
            )
        self.write(12)

    def close(self) -> None:
        """End both servers."""
        self.a.stop()
        self.b.stop()

    def save(self) -> Callable[[], None]:
        """Stop both servers, and return what brings files and catalogs back to where they are now."""
        self.close()
        kept = []
        for host in (self.a, self.b):
            path = host.store / "catalog.db"
            kept.append((host, host.files.after_kill(), path.read_bytes() if path.exists() else None))

        def restore() -> None:
            for host, files, catalog in kept:
                host.stop()
                host.files = files.after_kill()
                put_catalog(host.store, catalog)

        return restore

    def write(
        self,
        count: int = 4,
        *,
        host: Host | None = None,
        disks: Sequence[Path] | None = None,
        models: list[bytearray] | None = None,
    ) -> None:
        """Let the VM write where it runs, or on other disks: small, large and zeros; flushed."""
        host, rng = host or self.here, self.rng
        for path, model in zip(disks or self.disks, models or self.models, strict=True):
            with contextlib.closing(open_disk(host.files, path, writable=True, clock=self.clock)) as disk:
                for _ in range(count):
                    length = min(rng.choice((512, 4096, 4096, 65536, 300_032)), len(model))
                    at = rng.randrange((len(model) - length) // 512 + 1) * 512
                    kind = rng.random()
                    data = bytes(length) if kind < 0.25 else rng.randbytes(length)
                    if kind < 0.15:
                        disk.write_zeroes(at, length)
                    else:
                        disk.write(data, at)
                    model[at : at + length] = data
                disk.flush()

    @property
    def image(self) -> dict[int, bytes]:
        """What the VM's disks hold."""
        return {index: bytes(model) for index, model in enumerate(self.models)}

    def replicate(self, **options: Any) -> hvreplica.ReplicateResult:
        """Run a cycle from where the VM runs to the other site."""
        link = self.there.link
        return hvreplica.replicate(
            VM, self.disks, state=self.state, files=self.here.files, clock=self.clock, **link, **options
        )

    def run_live(self, count: int) -> list[tuple[float, dict[int, bytes]]]:
        """Let the VM write some times, seconds apart, all of it logged, and replicate that.

        The other site must have all that was written before. Return what the disks held at which second.
        """
        files, clock, link = self.here.files, self.clock, self.there.link
        seen = []
        with contextlib.ExitStack() as stack:
            folder = StateFolder(files, self.state, clock=clock)
            stack.callback(folder.release)
            disks = [
                stack.enter_context(open_disk(files, path, writable=True, clock=clock)) for path in self.disks
            ]
            state, ordered = state_for(folder, VM, disks, clock=clock)
            machine = StampedMachine(files, ordered, folder.logs, clock=clock)
            work = Work(
                folder=folder,
                state=state,
                disks=ordered,
                link=make_link(link["to"], link["tls"], "auto", 1),
                files=files,
                clock=clock,
                on_progress=quiet,
                tally=Tally("none", [0] * len(disks)),
                machine=machine,  # type: ignore[arg-type] # it has what is needed
            )
            stack.callback(work.close_tables)
            work.save()
            clock.advance(1)  # no write has the second of the cut before
            for _ in range(count):
                index, length = self.rng.randrange(len(disks)), self.rng.choice((512, 4096, 20_480))
                offset = self.rng.randrange((len(self.models[index]) - length) // 512 + 1) * 512
                data = self.rng.randbytes(length)
                machine.write(index, offset, data)
                self.models[index][offset : offset + length] = data
                seen.append((clock.now_s(), self.image))
                clock.advance(2)
            for disk in ordered:
                disk.flush()
            cut_live(work)
            primary = Primary(work)
            stack.callback(primary.close)
            primary.run()
        return seen

    def run_at(self, host: Host) -> None:
        """Let the VM run on the active disks of that host."""
        self.here, self.there = host, self.a if host is self.b else self.b
        self.disks = [host.store / VM / "active" / f"{index}.vhdx" for index in range(len(self.models))]
        self.state = host.store / VM / "primary"

    def adopt(self, host: Host, state: Path) -> hvreplica.AdoptReport:
        """Make a replica of the VM's disks at its old site."""
        return hvreplica.store_adopt(host.store, VM, state=state, files=host.files, clock=self.clock)

    def reverse(self) -> hvreplica.ReverseResult:
        """Let where the VM runs become its primary."""
        link = self.there.link
        return hvreplica.failover_reverse(
            self.here.store, VM, **link, files=self.here.files, clock=self.clock
        )


def read_disk(host: Host, path: Path) -> bytes:
    """Return what a disk holds, with its parents."""
    with contextlib.closing(open_disk(host.files, path, format="vhdx", clock=host.clock)) as disk:
        return read_whole(disk)


def check_points(host: Host) -> list[uuid.UUID]:
    """Hold every listed point of a host to what it must show; return those that are, oldest first."""
    if not host.has_vm:
        return []
    found = []
    with host.home() as home:
        for point in home.catalog.points(home.vm_id):
            assert point.state != "damaged", (point.damage, host.files.story)
            if point.state != "complete":
                continue
            found.append(point.id)
            with open_point(home, point.id) as opened:
                shown = {index: read_whole(disk) for index, disk in opened.disks.items()}
            if point.id in host.points:
                assert shown == host.points[point.id], (
                    f"point {len(found) - 1} of {host.name}, {point.kind}; {host.files.story}"
                )
            else:
                host.points[point.id] = shown  # one that a verb has made; from now on it must stay
    return found
