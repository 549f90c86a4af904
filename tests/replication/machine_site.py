"""A VM with several disks at rest that grow, shrink, move, come and go between the calls of `replicate`."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import TYPE_CHECKING

import hvreplica
from hvreplica.clock import SYSTEM
from hvreplica.disk import create_disk, open_disk, resize_disk
from hvreplica.replication.state import StateFolder
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    from hvreplica.replication.results import ReplicateResult
    from hvreplica.replication.state import PrimaryState
    from tests.replication.sites import Served

MIB = 1 << 20
STATE = Path("/primary/state")


class Vm:
    """Disks by name, with what each must hold; the files can lose power, the disks are always durable."""

    def __init__(self, seed: int, *sizes_mib: int, name: str = "web01") -> None:
        self.name = name
        self.rng = random.Random(seed)
        self.files = FaultFiles("/primary")
        self.models: dict[str, bytearray] = {}
        for number, size_mib in enumerate(sizes_mib):
            self.create(f"{number}.vhdx", size_mib * MIB)

    def create(self, disk: str, virtual_bytes: int, *, written_bytes: int = MIB) -> None:
        """Make one more disk with something on it."""
        format_name = disk.rsplit(".", 1)[1]
        create_disk(
            self.files,
            self.path(disk),
            virtual_bytes=virtual_bytes,
            block_bytes=MIB if format_name == "vhdx" else None,
            clock=SYSTEM,
            format=format_name,  # type: ignore[arg-type] # it is one of those
        )
        self.models[disk] = bytearray(virtual_bytes)
        self.write(disk, written_bytes, piece_bytes=64 << 10)

    def path(self, disk: str) -> Path:
        """Return where a disk stands."""
        return Path("/primary") / disk

    def write(self, disk: str, total_bytes: int, *, piece_bytes: int = 4096, at: int | None = None) -> None:
        """Write random pieces, at random places or one at `at`."""
        model = self.models[disk]
        with contextlib.closing(
            open_disk(self.files, self.path(disk), writable=True, clock=SYSTEM)
        ) as opened:
            for _ in range(max(total_bytes // piece_bytes, 1)):
                offset = self.rng.randrange((len(model) - piece_bytes) // 512 + 1) * 512 if at is None else at
                data = self.rng.randbytes(piece_bytes)
                opened.write(data, offset)
                model[offset : offset + piece_bytes] = data
            opened.flush()
        self.files.settle()

    def put(self, disk: str, at: int, data: bytes) -> None:
        """Write `data` at `at`."""
        with contextlib.closing(
            open_disk(self.files, self.path(disk), writable=True, clock=SYSTEM)
        ) as opened:
            opened.write(data, at)
            opened.flush()
        self.models[disk][at : at + len(data)] = data
        self.files.settle()

    def resize(self, disk: str, virtual_bytes: int) -> None:
        """Give a disk another size, as `hvreplica disk resize` does; what is cut off is zeroed before."""
        model = self.models[disk]
        if virtual_bytes < len(model):
            with contextlib.closing(
                open_disk(self.files, self.path(disk), writable=True, clock=SYSTEM)
            ) as opened:
                opened.write_zeroes(virtual_bytes, len(model) - virtual_bytes)
        resize_disk(self.files, self.path(disk), virtual_bytes, clock=SYSTEM)
        self.models[disk] = model[:virtual_bytes] + bytes(max(virtual_bytes - len(model), 0))
        self.files.settle()

    def rename(self, **names: str) -> None:
        """Rename files, all at once: old=new, without their ends."""
        renamed = {f"{old}.vhdx": f"{new}.vhdx" for old, new in names.items()}
        for old in renamed:
            self.files.replace(self.path(old), self.path(old + ".moving"))
        for old, new in renamed.items():
            self.files.replace(self.path(old + ".moving"), self.path(new))
        self.models = {renamed.get(disk, disk): model for disk, model in self.models.items()}
        self.files.settle()

    def remove(self, disk: str) -> None:
        """Take a disk from the VM; its file goes."""
        del self.models[disk]
        self.files.unlink(self.path(disk))
        self.files.settle()

    def replicate(self, served: Served, **options: object) -> ReplicateResult:
        """Run one call with the disks that there are."""
        return hvreplica.replicate(
            self.name,
            [self.path(disk) for disk in self.models],
            to=served.address,
            tls=served.tls,
            state=STATE,
            files=self.files,
            **options,  # type: ignore[arg-type] # as each test says
        )

    def state(self) -> PrimaryState:
        """Return what state.json says."""
        folder = StateFolder(self.files, STATE, clock=SYSTEM)
        state = folder.load()
        folder.release()
        assert state is not None
        return state

    def check(self, served: Served) -> None:
        """Refuse a newest point that is not what each disk holds now."""
        indexes = {tracked.path: index for index, tracked in enumerate(self.state().disks) if tracked.is_here}
        for disk, model in self.models.items():
            found = served.content(self.name, indexes[str(self.path(disk))])
            assert len(found) == len(model), disk
            assert found == model, disk
