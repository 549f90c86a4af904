"""A captured VM of two disks beside a served store, in one process."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.files import OS_FILES
from hvreplica.replication.capture_verb import Capture
from tests.support.live_client import SocketGuest

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from tests.replication.sites import Served

MIB = 1 << 20
VM = "web01"
SIZES = (16 * MIB, 6 * MIB + 512)


class Captured:
    """Two disks, what they must hold, and the capture of them that runs now."""

    def __init__(self, folder: Path, served: Served, rng: random.Random) -> None:
        self.folder, self.served, self.rng = folder, served, rng
        self.disks = [folder / "a.vhdx", folder / "b.raw"]
        self.models = [bytearray(size) for size in SIZES]
        self.state = folder / "state"
        self.link = {"to": served.address, "tls": served.tls}
        hvreplica.disk_create(self.disks[0], SIZES[0], block_bytes=MIB)
        hvreplica.disk_create(self.disks[1], SIZES[1], format="raw")

    @contextlib.contextmanager
    def running(self, **options: Any) -> Iterator[Capture]:
        with Capture(VM, self.disks, state=self.state, socket=self.folder / "nbd.sock", **options) as capture:
            thread = threading.Thread(target=capture.serve_forever)
            thread.start()
            try:
                yield capture
            finally:
                capture.stop()
                thread.join()

    @contextlib.contextmanager
    def guest(self, index: int = 0) -> Iterator[SocketGuest]:
        with SocketGuest(self.folder / "nbd.sock", str(index)) as guest:
            yield guest

    def write(
        self, guest: SocketGuest, count: int, *, index: int = 0, piece_bytes: int = 4096, align: int = 4096
    ) -> None:
        for _ in range(count):
            at = self.rng.randrange((SIZES[index] - piece_bytes) // align + 1) * align
            data = self.rng.randbytes(piece_bytes)
            guest.write(at, data)
            self.models[index][at : at + piece_bytes] = data
        guest.flush()

    def write_offline(self, count: int) -> None:
        """Write while nothing tracks the disk."""
        with contextlib.closing(open_disk(OS_FILES, self.disks[0], writable=True, clock=SYSTEM)) as disk:
            for _ in range(count):
                at, data = self.rng.randrange(SIZES[0] // 4096) * 4096, self.rng.randbytes(4096)
                disk.write(data, at)
                self.models[0][at : at + 4096] = data
            disk.flush()

    def replicate(self) -> hvreplica.ReplicateResult:
        return hvreplica.replicate(VM, state=self.state, **self.link)

    def equal(self) -> bool:
        return all(self.served.content(VM, index) == model for index, model in enumerate(self.models))
