"""One session's hold on a VM of the store: what the replica has, and the transfers that change it."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange, InvalidTransition
from hvreplica.store.adopted import AdoptedFiles
from hvreplica.store.apply import finish
from hvreplica.store.blocks import BlockReader
from hvreplica.store.check import find_damage
from hvreplica.store.fencing import fenced
from hvreplica.store.gate import Gate
from hvreplica.store.lost_logs import drop_unreadable
from hvreplica.store.prepared import record_prepared
from hvreplica.store.records import DiskSpec, TransferRow, validate_disks
from hvreplica.store.repair import Repair
from hvreplica.store.retain import Retained, retain
from hvreplica.store.room import room
from hvreplica.store.sinks import InitialSink, LogSink
from hvreplica.store.transfers import begin_initial, begin_logs, last_logs, last_point
from hvreplica.store.verify import judge_vm

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from hvreplica.progress import ProgressCallback
    from hvreplica.store.adopted import AdoptedRecord
    from hvreplica.store.home import VmHome
    from hvreplica.store.records import AlreadyHave, DiskRow, LogSpec, Owner


class VmReplica:
    """What Store.claim() returns. Any thread may call it; after a newer claim every call raises Fenced.

    One transfer at a time: beginning one ends the sink of the one before. close() when the session ends.
    """

    def __init__(
        self, home: VmHome, owner: Owner, announced: Sequence[DiskSpec], removed: Sequence[int]
    ) -> None:
        self._home = home
        self._owner = owner
        self._announced = {spec.index: spec.virtual_bytes for spec in announced}
        self._present = {index: size for index, size in self._announced.items() if index not in removed}
        self._gate = Gate()
        self._lock = threading.RLock()
        self._sink: InitialSink | LogSink | None = None
        self._reader: BlockReader | None = None
        self.retained = Retained()
        self._repair = Repair(home, owner)
        self._lost: list[str] = []

    @property
    def vm(self) -> str:
        """The VM's name."""
        return self._home.name

    @property
    def phase(self) -> str:
        """What comes next: "empty" needs an initial replication, "initial" the rest of it, "ready" logs."""
        with self._home.catalog.snapshot():
            transfer = self._home.catalog.transfer(self._home.vm_id, "initial")
            if transfer is not None and transfer.state == "receiving":
                return "initial"
            return "empty" if self.last_point is None else "ready"

    @property
    def last_point(self) -> uuid.UUID | None:
        """The newest point that was received whole, applied or not; the next logs must follow it."""
        with self._home.catalog.snapshot():
            transfer = self._home.catalog.transfer(self._home.vm_id, "initial")
            if transfer is not None and transfer.state == "renaming":
                return transfer.point_id
            point = last_point(self._home)
        return None if point is None else point.id

    @property
    def transfer(self) -> uuid.UUID | None:
        """The unfinished transfer of all disks or of logs; beginning it again continues it."""
        transfer = self._home.catalog.transfer(self._home.vm_id, "initial", "logs")
        return None if transfer is None or transfer.state == "renaming" else transfer.id

    @property
    def disks(self) -> tuple[DiskRow, ...]:
        """The announced disks by index; last_log_id is that of the log received last, applied or not."""
        with self._home.catalog.snapshot():
            last = last_logs(self._home)
            rows = self._home.catalog.disks(self._home.vm_id)
        return tuple(
            dataclasses.replace(row, last_log_id=last[row.spec.index])
            for row in rows
            if row.spec.index in self._announced
        )

    @property
    def last_sizes(self) -> dict[int, int]:
        """The disks of last_point, with their sizes in bytes."""
        with self._home.catalog.snapshot():
            point_id = self.last_point
            return {} if point_id is None else self._home.catalog.members(self._home.vm_id, point_id)

    @property
    def damage(self) -> list[str]:
        """A sentence for each file that cannot be built upon; begin_initial() mends it."""
        scans = self._home.catalog.scans(self._home.vm_id).values()
        unreadable = [scan.damage or "" for scan in scans if scan.is_unreadable]
        return find_damage(self._home) + unreadable + self._lost

    def drop_unreadable(self) -> None:
        """Let points go that wait for a log which cannot be read, for a resync; durable on return.

        Where the disks need such a log `damage` says so from now on. Raises: Locked while another process
        reads the disks, Fenced.
        """
        with self._gate, self._lock:
            lost = drop_unreadable(self._home)
            self._lost = [] if lost is None else [lost]

    @property
    def adopted(self) -> AdoptedRecord | None:
        """What is known of an old primary that this replica was made of; None once logs came."""
        with self._home.catalog.snapshot():
            return AdoptedFiles(self._home).current()

    def changes(self, disk_index: int, disk_offset: int) -> tuple[NDArray[np.int64], bool]:
        """Return what the old primary wrote to a disk from an offset on, and whether that is all of it.

        int64 (n, 2), sorted and disjoint. Raises: InvalidTransition for another replica, StoreError, Fenced.
        """
        with self._gate, self._lock:
            files = AdoptedFiles(self._home)
            if files.current() is None:
                raise InvalidTransition(f"VM {self.vm!r} was not made of an old primary, or went on since")
            return files.ranges(disk_index, disk_offset)

    def begin_initial(
        self,
        transfer_id: uuid.UUID,
        *,
        point_id: uuid.UUID,
        instant_s: float,
        consistent: bool = True,
        consistency: str = "crash",
        joining: Sequence[int] = (),
        expected_bytes: int = 0,
    ) -> InitialSink | AlreadyHave:
        """Begin to build the VM's disks, or continue if `transfer_id` is unfinished (see sink.continued).

        Another unfinished transfer is dropped. The disks that are there stay as they are until commit().
        instant_s: the point in time that the disks show, Unix seconds. consistent: whether they show one;
        else the copy becomes a point with the next logs. consistency: of the point. joining: these disks
        alone, which no point has yet: they belong to the points whose logs name them, and logs of the others
        may be received in turns with them. expected_bytes: what the primary knows to send; 0 if unknown.
        Raises: Fenced, StoreFull, StoreError, InvalidTransition, FieldOutOfRange.
        """
        with self._gate, self._lock, room(self._home.files, self._home.paths.folder):
            self._release()
            wanted = TransferRow(
                id=transfer_id,
                kind="join" if joining else "initial",
                state="receiving",
                point_id=point_id,
                previous_point_id=None,
                instant_s=instant_s,
                started_s=self._home.clock.now_s(),
                positions={},
                disks=self._sizes(joining or self._present),
                consistent=consistent,
                point_kind="initial",
                consistency=consistency,
            )
            sink = begin_initial(self._home, self._owner, wanted, expected_bytes=expected_bytes)
            self._sink = sink if isinstance(sink, InitialSink) else None
            return sink

    def begin_logs(
        self,
        transfer_id: uuid.UUID,
        *,
        point_id: uuid.UUID,
        previous_point_id: uuid.UUID,
        instant_s: float,
        logs: Sequence[LogSpec],
        disks: dict[int, int] | None = None,
        nature: tuple[str, str] = ("standard", "crash"),
        expected_bytes: int = 0,
    ) -> LogSink | AlreadyHave:
        """Begin to receive one cycle's closed logs, or continue if `transfer_id` is unfinished.

        logs: in the order of applying; a target of the sink is a place in it. disks: index -> virtual bytes
        of the disks that the point has; by default those announced. nature: kind and consistency of it.
        AlreadyHave: the point was received. Raises: ChainBroken if previous_point_id is not the newest point
        or a log does not follow the last one of its disk; InvalidTransition before the initial replication;
        ReplicaDiverged for a disk of which no copy is here; Fenced, StoreFull, StoreError, FieldOutOfRange.
        """
        with self._gate, self._lock, room(self._home.files, self._home.paths.folder):
            self._release()
            wanted = TransferRow(
                id=transfer_id,
                kind="logs",
                state="receiving",
                point_id=point_id,
                previous_point_id=previous_point_id,
                instant_s=instant_s,
                started_s=self._home.clock.now_s(),
                positions={},
                disks=self._present if disks is None else self._validated(disks),
                logs=tuple(logs),
                point_kind=nature[0],
                consistency=nature[1],
            )
            sink = begin_logs(self._home, self._owner, wanted, expected_bytes=expected_bytes)
            self._sink = sink if isinstance(sink, LogSink) else None
            return sink

    def apply(self, *, progress: ProgressCallback | None = None) -> uuid.UUID:
        """Bring the disks to the newest point received and return it. Durable on return, repeatable.

        What the VM's policy does not keep goes then: see `retained`. Goes on although a newer session claims
        the VM: what was acknowledged belongs to the replica.
        Raises: Locked while another process reads the disks (what waits stays durable; apply again later).
        """
        with self._gate, self._lock:
            self._drop_reader()
        finish(self._home, progress=progress)
        self.retained = retain(self._home)
        point_id = self.last_point
        if point_id is None:
            raise InvalidTransition(
                f"VM {self.vm!r} has no complete replica yet", hint="its initial replication comes first"
            )
        return point_id

    def prepare(self, point_id: uuid.UUID) -> uuid.UUID:
        """Take note that the VM is off at its primary and that a point is all of it; return the point.

        Durable on return; holds until the VM is claimed again. Raises: FailoverRefused where it is not the
        newest one; as apply().
        """
        self.apply()
        with self._gate, self._lock:
            record_prepared(self._home, self._owner, point_id)
        return point_id

    def fingerprints(self, target: int, first_block: int, block_count: int, block_bytes: int) -> bytes:
        """Return the XXH3-128 of blocks of a disk on its newest point, 16 bytes each, zeros for zero blocks.

        The last block is short where the disk ends in it. Unallocated blocks are not read. Until the next
        begin, apply or close the disk is held against changes. Raises: FieldOutOfRange, NoSuchPoint, Locked,
        Fenced.
        """
        with self._gate, self._lock:
            self._home.require_owner(self._owner)
            return self._open_reader(target).fingerprints(first_block, block_count, block_bytes)

    def next_data(self, target: int, disk_offset: int) -> int:
        """Return the first offset not below `disk_offset` that may hold data; the disk's length if none."""
        with self._gate, self._lock:
            return self._open_reader(target).next_data(disk_offset)

    @property
    def damaged_disks(self) -> list[int]:
        """The disks that do not hold what they should, where the primary may know it; see repair()."""
        return [index for index in self._repair.wanted() if index in self._present]

    def repair(self, disk_index: int, blocks: Sequence[int], data: Buffer) -> None:
        """Put blocks of a damaged disk right, in place; durable on return. See store/repair.py.

        blocks: numbers of blocks of 4096 bytes, ascending; data: their bytes. Raises: FieldOutOfRange for
        blocks that the disk does not have, or other data than they hold; InvalidTransition, Fenced, Locked,
        StoreFull.
        """
        with self._gate, self._lock:
            self._drop_reader()
            self._repair.write(disk_index, blocks, data)

    def end_repair(self, disk_index: int, *, is_proven: bool) -> bool:
        """Record that the primary has compared all of a disk; return whether it is whole now.

        is_proven: whether it found each block to be what it should. Points that are whole again can be had
        again on return.
        """
        with self._gate, self._lock:
            self._drop_reader()
            is_whole = self._repair.end(disk_index, is_proven=is_proven)
        if is_whole:
            judge_vm(self._home)
        return is_whole

    def close(self) -> None:
        """End the session; what it did not commit stays unfinished. Waits for calls that are inside."""
        self._end(lambda: InvalidTransition(f"this session of VM {self.vm!r} has ended"))

    def fence(self) -> None:
        """End the session because a newer one has claimed the VM; every later call raises Fenced."""
        self._end(lambda: fenced(self.vm))

    def _sizes(self, indexes: Iterable[int]) -> dict[int, int]:
        unknown = sorted(set(indexes) - self._present.keys())
        if unknown:
            raise FieldOutOfRange(
                "the claim did not announce this disk",
                field="disks",
                expected=f"of {sorted(self._present)}",
                actual=unknown[0],
            )
        return {index: self._present[index] for index in sorted(indexes)}

    def _validated(self, disks: dict[int, int]) -> dict[int, int]:
        """Hold sizes to what their disks can have: they may be older or newer than what was announced."""
        rows = {row.spec.index: row.spec for row in self._home.catalog.disks(self._home.vm_id)}
        specs = [
            dataclasses.replace(rows.get(index, DiskSpec(index, virtual_bytes)), virtual_bytes=virtual_bytes)
            for index, virtual_bytes in disks.items()
        ]
        validate_disks(specs)
        return disks

    def _end(self, reason: Callable[[], Exception]) -> None:
        sink = self._sink
        if sink is not None:
            sink.close(reason)  # first, so that a long call inside of it notices
        self._gate.shut(reason)
        with self._lock:
            self._release(reason)

    def _release(self, reason: Callable[[], Exception] | None = None) -> None:
        self._drop_reader()
        if self._sink is not None:
            self._sink.close(reason)
            self._sink = None

    def _drop_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open_reader(self, target: int) -> BlockReader:
        if self._reader is None or self._reader.target != target:
            self._drop_reader()
            self._reader = BlockReader(self._home, target)
        return self._reader
