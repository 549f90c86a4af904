"""A store in this process, whose one VM gets cycles at once: a replica without a primary and a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from bench.harness import SEED
from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.formats.hrl import NIL_GUID
from hvreplica.formats.messages import PointPolicy
from hvreplica.hrl import LogWriter
from hvreplica.store import AlreadyHave, DiskSpec, LogSpec, Store
from hvreplica.units import MIB

if TYPE_CHECKING:
    import uuid

BLOCK = 4096
WINDOW_BYTES = 4 * MIB
_START_S = 1.7e9
EVERY = PointPolicy(recovery_points=24, recovery_point_every_s=0)
NO_OLDER = PointPolicy(recovery_points=0)


class Replica:
    """A VM of one disk, full of `pattern` at its first point. Use as a context manager."""

    vm = "web01"

    def __init__(self, root: Path, *, disk_bytes: int, policy: PointPolicy) -> None:
        self.root = root
        self.disk_bytes = disk_bytes
        self.pattern = np.random.default_rng(SEED).bytes(WINDOW_BYTES)
        self._cycles = 0
        self._store = Store.create_or_open(OS_FILES, root, clock=SYSTEM)
        self._replica = self._store.claim(
            self.vm,
            relationship_id=SYSTEM.guid(),
            generation=1,
            certificate="",
            disks=[DiskSpec(0, disk_bytes, 512, 4096, 2 * MIB, "0.vhdx")],
            policy=policy,
        )
        self._point: uuid.UUID = SYSTEM.guid()
        self._log: uuid.UUID | None = None
        sink = self._replica.begin_initial(SYSTEM.guid(), point_id=self._point, instant_s=_START_S)
        assert not isinstance(sink, AlreadyHave)
        sink.resume_from(0, 0)
        for start in range(0, disk_bytes, WINDOW_BYTES):
            length = min(WINDOW_BYTES, disk_bytes - start)
            sink.write(0, start, length, np.array([[start, length]], np.int64), self.pattern[:length])
        sink.commit()
        self._replica.apply()

    def receive(self, extents: np.ndarray, content: bytes) -> int:
        """Take one cycle in: these extents, (offset, length) in order, were written. Not applied yet.

        Returns the length of its log.
        """
        self._cycles += 1
        log_id, path = SYSTEM.guid(), self.root.parent / f"{self.vm}.hrl"
        writer = LogWriter.create(
            OS_FILES, path, log_id=log_id, previous_log_id=self._log, data_write_guid=None, clock=SYSTEM
        )
        with writer:
            writer.append(extents, content)
        spec = LogSpec(0, log_id, self._log or NIL_GUID, writer.close().log_bytes)
        point_id = SYSTEM.guid()
        sink = self._replica.begin_logs(
            SYSTEM.guid(),
            point_id=point_id,
            previous_point_id=self._point,
            instant_s=_START_S + 300 * self._cycles,
            logs=[spec],
        )
        assert not isinstance(sink, AlreadyHave)
        sink.resume_from(0, 0)
        with path.open("rb") as log:
            start = 0
            while data := log.read(WINDOW_BYTES):
                sink.write(0, start, len(data), np.array([[start, len(data)]], np.int64), data)
                start += len(data)
        sink.commit()
        path.unlink()
        self._point, self._log = point_id, log_id
        return spec.log_bytes

    def apply(self) -> None:
        """Apply what was received, and do what the VM's policy asks for."""
        self._replica.apply()

    def verify_oldest(self) -> None:
        """Prove that the oldest point is the pattern, over and over."""
        window = bytearray(WINDOW_BYTES)
        oldest = self._store.points(self.vm)[0].id
        with self._store.open_point(self.vm, oldest) as point:
            for start in range(0, self.disk_bytes, WINDOW_BYTES):
                view = memoryview(window)[: self.disk_bytes - start]
                point.disks[0].read_into(view, start)
                assert view == self.pattern[: len(view)], f"another content in the window at {start}"

    @property
    def disk(self) -> Path:
        """The replica's disk."""
        return self.root / self.vm / "disks" / "0.vhdx"

    @property
    def parts(self) -> list[Path]:
        """The undo parts."""
        return sorted((self.root / self.vm / "points").glob("*.hru"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._store.close()


def written_bytes() -> int:
    """Return the bytes that this process has written to files so far, by calls of any kind."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    return 0


def blocks(offsets: np.ndarray) -> np.ndarray:
    """Return the extents of blocks, sorted."""
    return np.column_stack((np.sort(offsets), np.full(len(offsets), BLOCK, np.int64)))
