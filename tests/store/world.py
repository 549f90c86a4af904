"""A primary and its store in a few verbs: what the guest wrote is a bytearray, and the replica must equal it."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hvreplica.disk import open_disk
from hvreplica.formats.messages import PointPolicy
from hvreplica.hrl import LogWriter
from hvreplica.store import AlreadyHave, DiskSpec, LogSpec, Store
from tests.support.faultfile import FaultFiles

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.store import InitialSink, LogSink, VmReplica

MIB = 1 << 20
GRAIN_BYTES = 4096
NIL = uuid.UUID(int=0)
NOTHING = np.zeros((0, 2), np.int64), b""  # extents and data of a window of zeros
INSTANT_S = 1_700_000_000.0
NO_OLDER = PointPolicy(recovery_points=0)
EVERY = PointPolicy(recovery_point_every_s=0)


def guid(number: int) -> uuid.UUID:
    """Return a GUID that a test can tell from others."""
    return uuid.UUID(int=(0xABC << 64) + number)


def data_extents(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[np.ndarray, bytes]:
    """Return (extents, data) of the grains that are not all zero, as a sender's frame has them."""
    view = np.frombuffer(data, np.uint8)
    rows = []
    for start in range(0, len(view), GRAIN_BYTES):
        grain = view[start : start + GRAIN_BYTES]
        if grain.any():
            if rows and rows[-1][0] + rows[-1][1] == offset + start:
                rows[-1][1] += len(grain)
            else:
                rows.append([offset + start, len(grain)])
    table = np.array(rows, np.int64).reshape(-1, 2)
    pieces = [bytes(view[first - offset : first - offset + length]) for first, length in table.tolist()]
    return table, b"".join(pieces)


@dataclass
class Cycle:
    """One cut: its logs as bytes, and what the disks hold then."""

    transfer_id: uuid.UUID
    point_id: uuid.UUID
    previous_point_id: uuid.UUID
    logs: list[LogSpec]
    contents: list[bytes]
    disks: dict[int, bytes]

    @property
    def sizes(self) -> dict[int, int]:
        """The disks of the point, with their sizes."""
        return {index: len(content) for index, content in self.disks.items()}


@dataclass
class Primary:
    """A VM with small disks. `changes` are the guest's writes since the last cut."""

    clock: Clock
    specs: list[DiskSpec]
    vm: str = "web01"
    relationship_id: uuid.UUID = field(default_factory=lambda: guid(1))
    generation: int = 1
    disks: dict[int, bytearray] = field(default_factory=dict)
    changes: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    last_log: dict[int, uuid.UUID] = field(default_factory=dict)
    last_point: uuid.UUID | None = None
    has_claimed: bool = False
    removed: list[int] = field(default_factory=list)
    policy: PointPolicy | None = None

    def __post_init__(self) -> None:
        """Begin with empty disks, or with copies of those that were given."""
        indexes = [spec.index for spec in self.specs]
        empty = {spec.index: bytes(spec.virtual_bytes) for spec in self.specs}
        self.disks = {index: bytearray(self.disks.get(index, empty[index])) for index in indexes}
        self.changes = {index: list(self.changes.get(index, [])) for index in indexes}
        self.last_log = {index: self.last_log.get(index, NIL) for index in indexes}

    def claim(self, store: Store) -> VmReplica:
        """Become the writer; each claim but the first is a new generation."""
        self.generation += self.has_claimed
        self.has_claimed = True
        return store.claim(
            self.vm,
            relationship_id=self.relationship_id,
            generation=self.generation,
            certificate="sha256:01",
            disks=self.specs,
            removed=self.removed,
            policy=self.policy,
        )

    def resize(self, disk_index: int, virtual_bytes: int) -> None:
        """Give a disk another size; what it grows by is zero."""
        content = self.disks[disk_index][:virtual_bytes]
        self.disks[disk_index] = content + bytes(virtual_bytes - len(content))
        self.changes[disk_index] = [
            (offset, min(length, virtual_bytes - offset))
            for offset, length in self.changes[disk_index]
            if offset < virtual_bytes
        ]
        self.specs = [
            dataclasses.replace(spec, virtual_bytes=virtual_bytes) if spec.index == disk_index else spec
            for spec in self.specs
        ]

    def add(self, spec: DiskSpec) -> None:
        """Give the VM one more disk."""
        self.specs = [*self.specs, spec]
        self.disks[spec.index] = bytearray(spec.virtual_bytes)
        self.changes[spec.index] = []
        self.last_log[spec.index] = NIL

    def remove(self, disk_index: int) -> None:
        """Take a disk away."""
        self.specs = [spec for spec in self.specs if spec.index != disk_index]
        self.removed.append(disk_index)
        for held in (self.disks, self.changes, self.last_log):
            del held[disk_index]

    def write(self, disk_index: int, disk_offset: int, data: bytes) -> None:
        """Let the guest write."""
        self.disks[disk_index][disk_offset : disk_offset + len(data)] = data
        self.changes[disk_index].append((disk_offset, len(data)))

    def scribble(self, rng: random.Random, count: int = 4, sectors: int = 16) -> None:
        """Let the guest write here and there, zeros too."""
        for _ in range(count):
            index = rng.choice(list(self.disks))
            length = rng.randint(1, sectors) * 512
            offset = rng.randrange(0, (len(self.disks[index]) - length) // 512 + 1) * 512
            self.write(index, offset, bytes(length) if rng.random() < 0.25 else rng.randbytes(length))

    def image(self) -> dict[int, bytes]:
        """Return what the disks hold now."""
        return {index: bytes(disk) for index, disk in self.disks.items()}

    def cut(self, *, without: tuple[int, ...] = ()) -> Cycle:
        """Close a log for each changed disk, at one instant; `without`: disks that stay as they are."""
        files = FaultFiles("/primary")
        logs, contents = [], []
        for index, changes in self.changes.items():
            if index in without:
                continue
            if not changes and logs:
                continue
            log_id, path = self.clock.guid(), Path(f"/primary/{index}.hrl")
            writer = LogWriter.create(
                files,
                path,
                log_id=log_id,
                previous_log_id=self.last_log[index],
                data_write_guid=guid(99),
                clock=self.clock,
            )
            for offset, length in changes:
                data = bytes(self.disks[index][offset : offset + length])
                writer.append(np.array([[offset, length]], np.int64), data)
            summary = writer.close()
            logs.append(LogSpec(index, log_id, self.last_log[index], summary.log_bytes))
            contents.append(files.content_of(path))
            self.last_log[index] = log_id
        self.changes = {index: rows if index in without else [] for index, rows in self.changes.items()}
        assert self.last_point is not None
        image = {index: content for index, content in self.image().items() if index not in without}
        cycle = Cycle(self.clock.guid(), self.clock.guid(), self.last_point, logs, contents, image)
        self.last_point = cycle.point_id
        return cycle

    def begin_initial(
        self, replica: VmReplica, number: int = 100, point: int | None = None, **options: Any
    ) -> InitialSink | AlreadyHave:
        """Announce (or go on with) the initial transfer of this number; its point has the same number."""
        point_id = guid(number if point is None else point)
        return replica.begin_initial(guid(number), point_id=point_id, instant_s=INSTANT_S, **options)

    def replicate(self, store: Store, number: int = 100, **options: Any) -> VmReplica:
        """Do a whole initial replication; later cuts follow it."""
        replica = self.claim(store)
        sink = self.begin_initial(replica, number, **options)
        if not isinstance(sink, AlreadyHave):
            send_disks(sink, self.image())
            sink.commit()
        self.last_point = guid(number)
        self.last_log = dict.fromkeys(self.last_log, NIL)
        self.changes = {index: [] for index in self.changes}
        return replica

    def begin_logs(self, replica: VmReplica, cycle: Cycle) -> LogSink | AlreadyHave:
        """Announce a cycle."""
        return replica.begin_logs(
            cycle.transfer_id,
            point_id=cycle.point_id,
            previous_point_id=cycle.previous_point_id,
            instant_s=INSTANT_S + 60,
            logs=cycle.logs,
            disks=cycle.sizes,
        )

    def ship(self, replica: VmReplica, cycle: Cycle) -> None:
        """Send a cycle and let it be acknowledged; not applied yet."""
        sink = self.begin_logs(replica, cycle)
        if not isinstance(sink, AlreadyHave):
            send_logs(sink, cycle)
            sink.commit()


def send_disks(
    sink: InitialSink, image: dict[int, bytes], *, window_bytes: int = MIB, flush_every: int = 0
) -> None:
    """Send what the sink does not hold durably yet."""
    sent = 0
    for index, content in image.items():
        position = sink.position(index)
        sink.resume_from(index, position)
        for offset in range(position, len(content), window_bytes):
            window = content[offset : offset + window_bytes]
            sink.write(index, offset, len(window), *data_extents(window, offset))
            sent += 1
            if flush_every and sent % flush_every == 0:
                sink.flush()


def send_logs(sink: LogSink, cycle: Cycle, *, window_bytes: int = 64 << 10, flush_every: int = 0) -> None:
    """Send what the sink does not hold durably yet."""
    for place, content in enumerate(cycle.contents):
        position = sink.position(place)
        sink.resume_from(place, position)
        for count, offset in enumerate(range(position, len(content), window_bytes), 1):
            window = content[offset : offset + window_bytes]
            sink.write(place, offset, len(window), *data_extents(window, offset))
            if flush_every and count % flush_every == 0:
                sink.flush()


def replica_path(root: Path, vm: str = "web01", disk_index: int = 0) -> Path:
    """Return where the replica of a disk stands, for VMs with plain names."""
    return root / vm / "disks" / f"{disk_index}.vhdx"


def read_disk(files: FileSystem, path: Path, clock: Clock, format_name: str = "vhdx") -> bytes:
    """Return the guest's bytes of a small disk."""
    disk = open_disk(files, path, format=format_name, clock=clock)
    try:
        buffer = bytearray(disk.virtual_bytes)
        disk.read_into(buffer, 0)
        return bytes(buffer)
    finally:
        disk.close()


def read_replica(files: FileSystem, root: Path, primary: Primary) -> dict[int, bytes]:
    """Return what the replica's disks hold."""
    return {
        spec.index: read_disk(files, replica_path(root, primary.vm, spec.index), primary.clock)
        for spec in primary.specs
    }


@contextlib.contextmanager
def ram_folder() -> Iterator[Path]:
    """Make a folder in memory where there is such a place: the catalog syncs at each commit."""
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if ram.is_dir() else None) as name:
        yield Path(name)


def small_disk(index: int = 0, size_mib: int = 4) -> DiskSpec:
    """Return a disk that a test can hold in memory."""
    return DiskSpec(index, size_mib * MIB, 512, 4096, MIB, f"disk{index}.vhdx")
