"""Two sites that take turns in running a VM, in one process: their stores, servers, disks and models."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from tests.replication.sites import Served

if TYPE_CHECKING:
    import random
    from pathlib import Path

MIB = 1 << 20
VM = "web01"


class TwoSites:
    """Site A begins as the primary, with disks of its own and a state folder; B as the replica.

    disks: where the VM runs now. models: what they must hold.
    """

    def __init__(
        self, folder: Path, tls: Path, rng: random.Random, *, sizes: tuple[int, ...] = (24 * MIB,)
    ) -> None:
        self.folder, self.tls, self.rng = folder, tls, rng
        self.sizes = sizes
        self.models = [bytearray(size) for size in sizes]
        self.state = folder / "state-a"
        self.disks = [folder / f"disk{index}.vhdx" for index in range(len(sizes))]
        for path, size in zip(self.disks, sizes, strict=True):
            hvreplica.disk_create(path, size, block_bytes=MIB)
        self.a, self.b = folder / "a", folder / "b"
        self.closing = contextlib.ExitStack()
        self.servers: dict[Path, Served] = {}

    def serve(self, store: Path) -> Served:
        """Return the server of a store, started where it was not."""
        if store not in self.servers:
            self.servers[store] = Served(store, self.tls)
            self.closing.callback(self.servers[store].close)
        return self.servers[store]

    def write(self, count: int, *, piece_bytes: int = 4096, models: list[bytearray] | None = None) -> None:
        """Write where the VM runs now. models: instead of the ones that count."""
        for path, model in zip(self.disks, models or self.models, strict=True):
            with contextlib.closing(open_disk(OS_FILES, path, writable=True, clock=SYSTEM)) as disk:
                for _ in range(count):
                    at = self.rng.randrange((len(model) - piece_bytes) // 512) * 512
                    data = self.rng.randbytes(piece_bytes)
                    disk.write(data, at)
                    model[at : at + piece_bytes] = data
                disk.flush()

    def link(self, store: Path) -> dict[str, Any]:
        """Return how to reach the server of a store."""
        return {"to": self.serve(store).address, "tls": self.tls}

    def replicate(self, store: Path, **options: Any) -> hvreplica.ReplicateResult:
        """Run a cycle from where the VM runs now."""
        return hvreplica.replicate(VM, self.disks, state=self.state, **self.link(store), **options)

    def run_at(self, store: Path) -> None:
        """Let the VM run on the disks that a failover in `store` has made."""
        self.disks = [store / VM / "active" / f"{index}.vhdx" for index in range(len(self.sizes))]
        self.state = store / VM / "primary"

    def fail_over(self, store: Path, **options: Any) -> None:
        """Promote the replica in `store`, its primary being lost."""
        hvreplica.failover_unplanned(store, VM, **options)
        self.run_at(store)

    def content(self, path: Path) -> bytes:
        """Return what a disk holds, with its parents."""
        with contextlib.closing(open_disk(OS_FILES, path, clock=SYSTEM)) as disk:
            data = bytearray(disk.virtual_bytes)
            disk.read_into(data, 0)
            return bytes(data)

    def replica_equals(self, store: Path, models: list[bytearray] | None = None) -> bool:
        """Return whether the newest point in `store` is what the VM holds."""
        wanted = enumerate(models or self.models)
        return all(self.serve(store).content(VM, index) == bytes(model) for index, model in wanted)
