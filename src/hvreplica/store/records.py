"""What the store holds about a VM, its disks, transfers and points: the rows of the catalog as values.

DiskSpec and LogSpec come from the primary and are checked here before anything is sized or named by them.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvreplica.errors import FieldOutOfRange
from hvreplica.formats.messages import DISK_BYTES_MAX, DISKS_MAX, LOG_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

NIL = uuid.UUID(int=0)
GENERATION_MAX = (1 << 63) - 1  # what SQLite stores
SECTOR_BYTES_CHOICES = (512, 4096)
BLOCK_BYTES_MIN = 1 << 20  # [MS-VHDX] 2.6.2.1, as is the upper bound
BLOCK_BYTES_MAX = 256 << 20
LOG_BYTES_MIN = 8192  # a header and one metadata block, the least that a closed log can be
_INSTANT_S_MAX = 1e11
_TEXT_CHARS_MAX = 255


def _require(ok: object, field: str, expected: object, actual: object) -> None:
    if not ok:
        raise FieldOutOfRange("the replica refuses this value", field=field, expected=expected, actual=actual)


def printable(text: str) -> str:
    """Return `text` fit to be shown on a terminal: no control characters, at most 255 characters."""
    return "".join(character if character.isprintable() else "?" for character in text[:_TEXT_CHARS_MAX])


def validate_instant(instant_s: float) -> None:
    """Refuse what is no point in time. Raises: FieldOutOfRange."""
    _require(
        math.isfinite(instant_s) and 0 <= instant_s < _INSTANT_S_MAX, "instant_s", "Unix seconds", instant_s
    )


@dataclass(frozen=True, slots=True)
class Owner:
    """Who may write a VM. certificate: how the primary proved who it is, for people and the record only."""

    relationship_id: uuid.UUID
    generation: int
    certificate: str

    def validate(self) -> None:
        """Refuse what cannot be stored. Raises: FieldOutOfRange."""
        _require(
            0 <= self.generation <= GENERATION_MAX, "generation", f"0 to {GENERATION_MAX}", self.generation
        )


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk as the primary announces it. block_bytes 0: the replica chooses. label: for people only.

    virtual_disk_id: the identity that the guest sees, None where the primary's file has none.
    """

    index: int
    virtual_bytes: int
    logical_sector_bytes: int = 512
    physical_sector_bytes: int = 4096
    block_bytes: int = 0
    label: str = ""
    virtual_disk_id: uuid.UUID | None = None

    def validate(self) -> None:
        """Refuse what no disk can be. Raises: FieldOutOfRange."""
        _require(0 <= self.index < DISKS_MAX, "disk index", f"0 to {DISKS_MAX - 1}", self.index)
        for name in ("logical_sector_bytes", "physical_sector_bytes"):
            _require(getattr(self, name) in SECTOR_BYTES_CHOICES, name, "512 or 4096", getattr(self, name))
        sector_bytes = self.logical_sector_bytes
        _require(
            0 < self.virtual_bytes <= DISK_BYTES_MAX and self.virtual_bytes % sector_bytes == 0,
            "virtual_bytes",
            f"{sector_bytes} to {DISK_BYTES_MAX}, a multiple of {sector_bytes}",
            self.virtual_bytes,
        )
        _require(
            self.block_bytes == 0
            or (BLOCK_BYTES_MIN <= self.block_bytes <= BLOCK_BYTES_MAX and self.block_bytes.bit_count() == 1),
            "block_bytes",
            f"0 or a power of two from {BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX}",
            self.block_bytes,
        )

    @property
    def key(self) -> tuple[int, int]:
        """What must stay as it is as long as the disk is replicated."""
        return self.index, self.logical_sector_bytes


def validate_disks(disks: Sequence[DiskSpec]) -> None:
    """Refuse a set of disks that no VM can have. Raises: FieldOutOfRange."""
    _require(1 <= len(disks) <= DISKS_MAX, "disks", f"1 to {DISKS_MAX}", len(disks))
    for disk in disks:
        disk.validate()
    indexes = [disk.index for disk in disks]
    _require(len(set(indexes)) == len(indexes), "disk index", "each one once", indexes)


@dataclass(frozen=True, slots=True)
class LogSpec:
    """One closed .hrl as the primary announces it. previous_log_id: nil where a chain begins.

    is_ordered: whether its entries are every write of its cycle, in the order of the guest's writes.
    """

    disk_index: int
    log_id: uuid.UUID
    previous_log_id: uuid.UUID
    log_bytes: int
    is_ordered: bool = False

    def validate(self, disk_indexes: set[int]) -> None:
        """Refuse what no log of these disks can be. Raises: FieldOutOfRange."""
        _require(
            self.disk_index in disk_indexes, "disk index", f"one of {sorted(disk_indexes)}", self.disk_index
        )
        _require(self.log_id != NIL, "log_id", "not the nil GUID", self.log_id)
        _require(
            LOG_BYTES_MIN <= self.log_bytes <= LOG_BYTES_MAX,
            "log_bytes",
            f"{LOG_BYTES_MIN} to {LOG_BYTES_MAX}",
            self.log_bytes,
        )


def validate_logs(logs: Sequence[LogSpec], disk_indexes: set[int]) -> None:
    """Refuse a set of logs that cannot be one cycle of these disks. Raises: FieldOutOfRange."""
    _require(1 <= len(logs) <= DISKS_MAX, "logs", f"1 to {DISKS_MAX}", len(logs))
    for log in logs:
        log.validate(disk_indexes)
    _require(len({log.log_id for log in logs}) == len(logs), "log_id", "each one once", "a repeated one")


@dataclass(frozen=True, slots=True)
class VmRow:
    """A VM. folder: its folder's name inside the store.

    policy: JSON of store/policy.py, None where nobody said. failover: JSON, None while the replica is at
    work.
    """

    id: int
    name: str
    folder: str
    owner: Owner
    claimed_s: float
    policy: str | None = None
    failover: str | None = None


@dataclass(frozen=True, slots=True)
class DiskRow:
    """A disk of the replica. What follows `spec` is as the last applied point left it; None before the first.

    file_bytes: length of its file. data_write_guid: of the replica's own VHDX. last_log_id: nil after an
    initial one. base_id: what the initial replication was called that brought it; unknown where an older
    hvreplica received it. removed_s: since when no point has it. digest: of its content, None where unknown.
    """

    spec: DiskSpec
    file_bytes: int | None = None
    data_write_guid: uuid.UUID | None = None
    last_log_id: uuid.UUID = NIL
    base_id: uuid.UUID | None = None
    removed_s: float | None = None
    digest: str | None = None

    @property
    def is_held(self) -> bool:
        """Whether a whole copy is here that later points may have."""
        return self.file_bytes is not None and self.removed_s is None


@dataclass(frozen=True, slots=True)
class TransferRow:
    """What is on its way. state: "receiving" | "renaming" (whole, disks take over).

    kind: "initial" (all disks) | "join" (disks that points will have from then on, beside the others) |
    "logs". positions: for each target, the bytes from its start that are durable. disks: index -> virtual
    bytes of those that it sends, or, with logs, of all that its point has. consistent: whether an initial one
    shows one instant. point_kind, consistency: of the point that it will be, see PointRow.
    """

    id: uuid.UUID
    kind: str
    state: str
    point_id: uuid.UUID
    previous_point_id: uuid.UUID | None
    instant_s: float
    started_s: float
    positions: dict[int, int]
    disks: dict[int, int]
    logs: tuple[LogSpec, ...] = ()
    consistent: bool = True
    point_kind: str = "standard"
    consistency: str = "crash"


@dataclass(frozen=True, slots=True)
class PointRow:
    """A recovery point. sequence: counts up within its VM.

    kind: "initial" | "standard" | "planned" (the last cut before a planned failover) | "manual" (made here).
    consistency: "crash" | "app" | "none" for a base. state: "spooled" (its logs are durable, the
    disks are on the point before) | "applying" (the disks are on neither) | "complete" (it can be had) |
    "damaged" (it could, but for what `damage` says) | "base" (the disks are whole and show no single
    instant: what the next logs need, and nothing to be had) | "superseded" (only remembered). bytes: what was
    received for it, disks or logs.
    """

    id: uuid.UUID
    sequence: int
    instant_s: float
    kind: str
    consistency: str
    state: str
    previous_id: uuid.UUID | None
    bytes: int
    received_s: float
    applied_s: float | None
    damage: str | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it can be had, or could be but for damage; its undo parts are kept then."""
        return self.state in {"complete", "damaged"}


@dataclass(frozen=True, slots=True)
class UndoRow:
    """One part of what keeps a point: what a disk held in some ranges before they were changed.

    point_id: the point that is kept by it. place: parts of one point and disk are read in this order, the
    first that covers a byte counts. kind: "undo", a log of its own (docs/formats/hru.md), or "whole", a VHDX
    of the whole disk, behind which nothing is looked at. file_bytes: length of its file. covered_bytes: of
    the guest's disk. log_id: the log whose applying it undoes, None where there are several or none.
    digest_change: what applying changed in the disk's digest, or the digest of a whole disk; None where that
    is not known.
    """

    point_id: uuid.UUID
    disk_index: int
    id: uuid.UUID
    kind: str
    file_bytes: int
    covered_bytes: int
    place: int = 0
    log_id: uuid.UUID | None = None
    digest_change: str | None = None


@dataclass(frozen=True, slots=True)
class KeptLogRow:
    """A log that is kept after it was applied, to make points between two cycles.

    point_id: the point that it led to. before_point_id: the point that it led from. instant_s: of point_id.
    is_ordered: whether its entries stand in the order of the guest's writes. kept_until_s: then it may go.
    """

    log_id: uuid.UUID
    disk_index: int
    previous_log_id: uuid.UUID
    log_bytes: int
    point_id: uuid.UUID
    before_point_id: uuid.UUID | None
    instant_s: float
    is_ordered: bool
    kept_until_s: float


@dataclass(frozen=True, slots=True)
class AlreadyHave:
    """The answer to a transfer whose point was received before. state: of the point, see PointRow."""

    point_id: uuid.UUID
    state: str
