"""What the replication tests drive: a guest that writes and remembers, a server that comes and goes."""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk
from hvreplica.files import OS_FILES
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from hvreplica.files import FileSystem
    from hvreplica.replication.results import ReplicateResult

MIB = 1 << 20
DISK = Path("/primary/web01.vhdx")
STATE = Path("/primary/state")
VM = "web01"


class Guest:
    """A disk in files that can lose power, and what it must hold. The disk itself is always durable."""

    def __init__(self, seed: int, *, disk_bytes: int = 24 * MIB, vm: str = VM) -> None:
        self.vm = vm
        self.rng = random.Random(seed)
        self.model = bytearray(disk_bytes)
        self._master = FaultFiles("/primary")
        create_disk(
            self._master, DISK, virtual_bytes=disk_bytes, block_bytes=MIB, clock=SYSTEM, format="vhdx"
        )
        self.files = self._master
        self.write(8 * MIB, piece_bytes=MIB // 2)

    def write(self, total_bytes: int, *, piece_bytes: int = 4096) -> None:
        """Write random pieces at random 4 KiB offsets, and zeros over one of them now and then."""
        with contextlib.closing(open_disk(self.files, DISK, writable=True, clock=SYSTEM)) as disk:
            for _ in range(max(total_bytes // piece_bytes, 1)):
                offset = self.rng.randrange((len(self.model) - piece_bytes) // 4096) * 4096
                data = bytes(piece_bytes) if self.rng.random() < 0.1 else self.rng.randbytes(piece_bytes)
                disk.write(data, offset)
                self.model[offset : offset + piece_bytes] = data
            disk.flush()
        self.files.settle()

    def zero(self, offset: int, length: int) -> None:
        """Give a range back, as a trim does."""
        with contextlib.closing(open_disk(self.files, DISK, writable=True, clock=SYSTEM)) as disk:
            disk.write_zeroes(offset, length)
            disk.flush()
        self.model[offset : offset + length] = bytes(length)
        self.files.settle()

    def replicate(self, served: Served, **options: object) -> ReplicateResult:
        """Run one call against the server as it is now."""
        return hvreplica.replicate(
            self.vm, [DISK], to=served.address, tls=served.tls, state=STATE, files=self.files, **options
        )


class Served:
    """A server on loopback in a thread of this process."""

    def __init__(self, store: Path, tls: Path, *, files: FileSystem = OS_FILES) -> None:
        self.store = store
        self.tls = tls
        self._files = files
        self.start()

    def start(self) -> None:
        """Serve the store, on a new port."""
        self.server = hvreplica.Server(self.store, listen="127.0.0.1:0", tls=self.tls, files=self._files)
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        host, port = self.server.address
        return f"{host}:{port}"

    def close(self) -> None:
        """Stop in good order; may be called twice."""
        self.server.close()
        self._thread.join()

    def damage(self, disk_offset: int, length: int = 1) -> None:
        """Let the VM's first disk lose some bytes that its file holds."""
        path = self.store / VM / "disks" / "0.vhdx"
        with open_disk(OS_FILES, path, format="vhdx", clock=SYSTEM) as disk:
            stretch = next(iter(disk.stretches(disk_offset, disk_offset + length)))
            assert stretch.file_offset is not None
            place = stretch.file_offset
        data = bytearray(path.read_bytes())
        for at in range(place, place + length):
            data[at] ^= 0x5A
        with path.open("r+b") as file:
            file.seek(place)
            file.write(data[place : place + length])

    def content(self, vm: str = VM, index: int = 0) -> bytes:
        """Return what the guest would read from the newest point, by way of an export."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "export.raw"
            hvreplica.point_export(self.store, vm, output, disk=index, format="raw")
            return output.read_bytes()
