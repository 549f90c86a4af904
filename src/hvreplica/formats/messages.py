"""The control messages between primary and replica: msgpack maps, one tagged union for each direction.

The primary asks, the replica answers each question once; before its answer the replica may send any number of
Working. Data never travels here: it goes as frames (formats/wire.py) over connections that began with Attach.

    primary                          replica
    Claim                     ->     Claimed | Refused          fencing, trust, what the replica holds
    FingerprintsRequest       ->     Fingerprints | Refused     only for a resync
    ChangesRequest            ->     Changes | Refused          only of a replica that was a primary
    BeginInitial | BeginLogs  ->     Ready | AlreadyHave | Refused
    LogTimes                  ->     Noted | Refused            beside logs of which they are known
      (Attach -> Attached on each data connection, then frames)
    Checkpoint                ->     Durable | Refused          frames that survive a power cut of the replica
    EndTransfer               ->     Committed | Refused        the primary may forget what it sent
    Apply                     ->     Applied | Refused          the point is listed and can be exported
    RepairBlocks              ->     Repaired | Refused         only where Applied names damaged disks
    RepairEnd                 ->     Repaired | Refused
    Prepare                   ->     Prepared | Refused         the VM is off: the point may be promoted

Unknown fields are allowed, so that a newer peer may say more; lengths and ranges are bounded here, once.
"""

from __future__ import annotations

import uuid  # noqa: TC003 - msgspec resolves the annotations at run time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from hvreplica.formats.times import TIMES_BYTES_MAX

PROTOCOL_VERSION = 1
# 2: copies made while the VM writes; disks that are resized, added and removed. 3: what is kept of points,
# their kinds and consistency; planned failover and the way back. 4: when the entries of logs came.
REVISION = 4
TIMES_REVISION = 4
RECOVERY_POINTS_MAX = 24  # as many as Hyper-V lets one choose
VM_NAME_CHARS_MAX = 100  # Hyper-V's own limit for the name of a virtual machine
DISKS_MAX = 64  # what one SCSI controller of a Hyper-V VM holds
DISK_BYTES_MAX = 64 << 40  # [MS-VHDX] 2.6.2.4
LOG_BYTES_MAX = 1 << 50
FINGERPRINT_BLOCKS_MAX = 32_768  # 512 KiB of fingerprints, half of the largest message
REPAIR_BLOCK_BYTES = 4096
REPAIR_BLOCKS_MAX = 128  # 512 KiB of data, half of the largest message
CHANGES_MAX = 32_768  # ranges in one message, as many bytes
CUTS_MAX = 512  # more than a primary lets wait
TEXT_CHARS_MAX = 2_000
GONE_MAX = 4_096  # points told of in one answer; a message has at most 1 MiB
SESSION_BYTES = 16

DiskIndex = Annotated[int, Meta(ge=0, lt=DISKS_MAX)]
DiskBytes = Annotated[int, Meta(ge=512, le=DISK_BYTES_MAX, multiple_of=512)]
ByteCount = Annotated[int, Meta(ge=0, le=LOG_BYTES_MAX)]
FrameCount = Annotated[int, Meta(ge=0, lt=1 << 62)]
Instant = Annotated[float, Meta(ge=0, lt=1e11)]
Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]
VmName = Annotated[str, Meta(min_length=1, max_length=VM_NAME_CHARS_MAX)]
Session = Annotated[bytes, Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
Generation = Annotated[int, Meta(ge=0, lt=1 << 53)]
PointKind = Literal["standard", "planned"]
Consistency = Literal["crash", "app"]
SectorBytes = Annotated[int, Meta(ge=512, le=4096)]


class Message(msgspec.Struct, frozen=True, tag_field="is"):
    """Any control message."""


class DiskShape(msgspec.Struct, frozen=True):
    """What the replica must make room for. label: the disk's file name at the primary, for people only.

    virtual_disk_id: what the guest sees of a VHDX; None where the file has none, or is not told.
    """

    index: DiskIndex
    virtual_bytes: DiskBytes
    logical_sector_bytes: SectorBytes
    physical_sector_bytes: SectorBytes
    block_bytes: Annotated[int, Meta(ge=0, le=256 << 20)]
    label: Annotated[str, Meta(max_length=255)]
    virtual_disk_id: uuid.UUID | None = None


class DiskSize(msgspec.Struct, frozen=True):
    """One disk of a point, with its size there."""

    index: DiskIndex
    virtual_bytes: DiskBytes


class LogShape(msgspec.Struct, frozen=True, omit_defaults=True):
    """One closed .hrl of a cycle.

    is_ordered: its entries are every write of the cycle, in the order of the guest's writes: nothing was read
    from the disk for it.
    """

    disk_index: DiskIndex
    log_id: uuid.UUID
    previous_log_id: uuid.UUID
    log_bytes: ByteCount
    is_ordered: bool = False


class PointPolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the primary wants kept of its points; None leaves what the replica has recorded.

    recovery_points: how many older points. recovery_point_every_s: one of each such period stays, 0: each
    one. keep: a rule in words, empty for none. budget_bytes: of what older points need, 0 for no bound;
    budget_percent: the same in percent of what the disks need. keep_logs_s: how long applied logs stay.
    app_consistent: whether cuts are made with the guest's file systems standing still.
    compress_after_points: how many of the newest points stay uncompressed, 0: all.
    """

    recovery_points: Annotated[int, Meta(ge=0, le=RECOVERY_POINTS_MAX)] | None = None
    recovery_point_every_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    keep: Annotated[str, Meta(max_length=TEXT_CHARS_MAX)] | None = None
    budget_bytes: Annotated[int, Meta(ge=0, le=1 << 62)] | None = None
    budget_percent: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    keep_logs_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    app_consistent: bool | None = None
    compress_after_points: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None


class Claim(Message, frozen=True, tag="claim"):
    """Ask to be the writer of a VM; first message of a control connection.

    disks: as they are now. removed: those that the VM does not have any more; one that is among `disks` too
    may be in points that are still to come. policy: what is to be kept from now on; None: as it is.
    reverse: by the site to which the VM was failed over; taken by a replica alone that was made of the old
    primary's disks, and not yet written since. resync: the primary believes no record of its own, so that
    points may go that wait for a log which cannot be read.
    """

    protocol: Annotated[int, Meta(ge=1, lt=1 << 16)]
    software: Text
    vm: VmName
    relationship_id: uuid.UUID
    generation: Generation
    disks: Annotated[list[DiskShape], Meta(min_length=1, max_length=DISKS_MAX)]
    removed: Annotated[list[DiskIndex], Meta(max_length=DISKS_MAX)] = []
    policy: PointPolicy | None = None
    reverse: bool = False
    resync: bool = False


class DiskState(msgspec.Struct, frozen=True):
    """What the replica holds of one disk.

    last_log_id: the log that was applied last; nil before the first. virtual_bytes: in its last point, or of
    its copy where no point has it yet; 0 where no whole copy is there, None where the replica does not tell.
    in_point: whether its last point has it.
    """

    index: DiskIndex
    last_log_id: uuid.UUID
    virtual_bytes: Annotated[int, Meta(ge=0, le=DISK_BYTES_MAX)] | None = None
    in_point: bool = True


class Adopted(msgspec.Struct, frozen=True):
    """What a replica says that was made of an old primary's disks.

    points: of the other site, one of which is what these disks were before the ranges that ChangesRequest
    asks for were written; oldest first. is_known: False where nobody knows what was written.
    """

    points: Annotated[list[uuid.UUID], Meta(max_length=CUTS_MAX)]
    is_known: bool


class Claimed(Message, frozen=True, tag="claimed"):
    """The claim stands.

    session: proves that a data connection belongs to it. phase: empty, initial or ready. last_point: the
    newest one that is there whole. transfer: the unfinished one. damage: why the replica's copy cannot be
    built upon, a sentence for each file; only a new initial replication mends it. revision: what the replica
    understands, see REVISION. adopted: of a replica that was made of an old primary, until logs came.
    """

    protocol: int
    software: Text
    session: Session
    phase: Annotated[str, Meta(pattern="^(empty|initial|ready)$")]
    last_point: uuid.UUID | None
    transfer: uuid.UUID | None
    disks: Annotated[list[DiskState], Meta(max_length=DISKS_MAX)]
    damage: Annotated[list[Text], Meta(max_length=4 * DISKS_MAX)]
    connections_max: Annotated[int, Meta(ge=1, le=64)]
    revision: Annotated[int, Meta(ge=1, lt=1 << 16)] = 1
    adopted: Adopted | None = None


class ChangesRequest(Message, frozen=True, tag="changes?"):
    """Ask what an old primary wrote to a disk of a replica that was made of it, from an offset on."""

    disk_index: DiskIndex
    disk_offset: Annotated[int, Meta(ge=0, le=DISK_BYTES_MAX)]


class Changes(Message, frozen=True, tag="changes"):
    """Rows of (disk_offset, length), see formats/ranges.py. is_last: whether there are none behind them."""

    ranges: Annotated[bytes, Meta(max_length=16 * CHANGES_MAX)]
    is_last: bool


class FingerprintsRequest(Message, frozen=True, tag="fingerprints?"):
    """Ask for fingerprints of the replica's disk, for a resync that ships only what differs."""

    disk_index: DiskIndex
    first_block: Annotated[int, Meta(ge=0, lt=1 << 53)]
    block_count: Annotated[int, Meta(ge=1, le=FINGERPRINT_BLOCKS_MAX)]
    block_bytes: Annotated[int, Meta(ge=512, le=1 << 20, multiple_of=512)]


class Fingerprints(Message, frozen=True, tag="fingerprints"):
    """16 bytes for each block asked for; empty where every one of them is zero."""

    data: Annotated[bytes, Meta(max_length=16 * FINGERPRINT_BLOCKS_MAX)]


class BeginInitial(Message, frozen=True, tag="initial"):
    """Begin or continue an initial replication.

    positions: for each disk, the bytes already known to be durable. consistent: False where the disks change
    while they are sent: what arrives is no point before the next logs were applied. consistency: of the point
    where they do not; a replica that does not know the field takes it for "crash". joining: these disks
    alone, added to a VM whose replica has a point; they belong to the points whose logs name them. A frame's
    target is a place in this list, or, where it is empty, in that of the claim's disks by index.
    """

    transfer_id: uuid.UUID
    point_id: uuid.UUID
    instant_s: Instant
    positions: Annotated[list[ByteCount], Meta(min_length=1, max_length=DISKS_MAX)]
    consistent: bool = True
    consistency: Consistency = "crash"
    joining: Annotated[list[DiskIndex], Meta(max_length=DISKS_MAX)] = []


class BeginLogs(Message, frozen=True, tag="logs"):
    """Begin or continue the shipping of one cycle's logs.

    positions: for each log, the bytes known to be durable. disks: those that the point has, with their sizes
    then; empty: those of the claim. What the replica has of a disk gets the size before its log is applied.
    kind, consistency: of the point; "planned" is the last cut before a planned failover, "app" one for which
    the guest's file systems stood still.
    """

    transfer_id: uuid.UUID
    point_id: uuid.UUID
    previous_point_id: uuid.UUID
    instant_s: Instant
    logs: Annotated[list[LogShape], Meta(min_length=1, max_length=DISKS_MAX)]
    positions: Annotated[list[ByteCount], Meta(min_length=1, max_length=DISKS_MAX)]
    disks: Annotated[list[DiskSize], Meta(max_length=DISKS_MAX)] = []
    kind: PointKind = "standard"
    consistency: Consistency = "crash"


class LogTimes(Message, frozen=True, tag="times"):
    """Say when the entries of a log of this transfer came. data: the file that formats/times.py describes.

    Nobody has to: without it points between cycles are of whole seconds.
    """

    log_id: uuid.UUID
    data: Annotated[bytes, Meta(max_length=TIMES_BYTES_MAX)]


class Attach(Message, frozen=True, tag="attach"):
    """First message of a data connection; frames follow after Attached."""

    session: Session
    transfer_id: uuid.UUID


class Checkpoint(Message, frozen=True, tag="checkpoint"):
    """Ask which frames are durable."""


class EndTransfer(Message, frozen=True, tag="end"):
    """All frames are on their way; frame_count: how many this session sent."""

    frame_count: FrameCount


class Apply(Message, frozen=True, tag="apply"):
    """Ask to apply what was committed."""

    point_id: uuid.UUID


class RepairBlocks(Message, frozen=True, tag="repair"):
    """Bring what blocks of a damaged disk should hold at the replica's newest point.

    blocks: numbers of blocks of REPAIR_BLOCK_BYTES, ascending. data: their bytes, one after another; the last
    block of the disk may be short.
    """

    disk_index: DiskIndex
    blocks: Annotated[
        list[Annotated[int, Meta(ge=0, lt=1 << 53)]], Meta(min_length=1, max_length=REPAIR_BLOCKS_MAX)
    ]
    data: Annotated[bytes, Meta(min_length=1, max_length=REPAIR_BLOCKS_MAX * REPAIR_BLOCK_BYTES)]


class RepairEnd(Message, frozen=True, tag="repair_end"):
    """All blocks of a disk were compared. proven: each one holds what it should, after what was brought."""

    disk_index: DiskIndex
    proven: bool


class Prepare(Message, frozen=True, tag="prepare"):
    """Tell the replica that the VM is off for a planned failover, and that this point is all of it."""

    point_id: uuid.UUID


class Ready(Message, frozen=True, tag="ready"):
    """Frames may come.

    positions: for each target, the bytes that need not be sent; never above the question's.
    """

    positions: Annotated[list[ByteCount], Meta(max_length=DISKS_MAX)]


class Noted(Message, frozen=True, tag="noted"):
    """The times came; a replica that keeps no logs, or takes them for damaged, does not keep them."""


class AlreadyHave(Message, frozen=True, tag="have"):
    """The replica has this point durably: an answer was lost, nothing needs to be sent."""

    point_id: uuid.UUID


class Attached(Message, frozen=True, tag="attached"):
    """Frames may come on this connection."""


class Durable(Message, frozen=True, tag="durable"):
    """Every frame with a sequence below `watermark` survives a power cut of the replica."""

    watermark: FrameCount


class Committed(Message, frozen=True, tag="committed"):
    """The point's data is durable at the replica."""

    point_id: uuid.UUID


class GonePoint(msgspec.Struct, frozen=True):
    """A point that the replica let go. instant_s: the time it showed. reason: a sentence."""

    point_id: uuid.UUID
    instant_s: Instant
    reason: Text


class Applied(Message, frozen=True, tag="applied", omit_defaults=True):
    """The point is listed and its disks are on it.

    gone: points that went by the VM's policy, or for its budget. warning: what the budget makes go next.
    damaged: disks that do not hold what they should; the primary is asked to compare them.
    """

    point_id: uuid.UUID
    gone: Annotated[list[GonePoint], Meta(max_length=GONE_MAX)] = []
    warning: Text | None = None
    damaged: Annotated[list[DiskIndex], Meta(max_length=DISKS_MAX)] = []


class Repaired(Message, frozen=True, tag="repaired"):
    """What was brought is durable. whole: whether the disk is known to hold what it should."""

    whole: bool


class Prepared(Message, frozen=True, tag="prepared"):
    """The point is there, applied and marked as planned; it may be promoted without loss until a claim."""

    point_id: uuid.UUID


class Working(Message, frozen=True, tag="working"):
    """The answer takes longer; the replica lives."""


class Refused(Message, frozen=True, tag="refused"):
    """No, and why.

    error: the name of the class in errors.py. generation: of the VM's owner, for a takeover. removed_disk: an
    index that a claim uses and that was a removed disk's; None where that is not the reason.
    """

    error: Annotated[str, Meta(max_length=64)]
    message: Text
    hint: Text
    generation: int = 0
    removed_disk: DiskIndex | None = None


Question = (
    Claim
    | FingerprintsRequest
    | ChangesRequest
    | BeginInitial
    | BeginLogs
    | LogTimes
    | Attach
    | Checkpoint
    | EndTransfer
    | Apply
    | RepairBlocks
    | RepairEnd
    | Prepare
)
Answer = (
    Claimed
    | Fingerprints
    | Changes
    | Ready
    | AlreadyHave
    | Noted
    | Attached
    | Durable
    | Committed
    | Applied
    | Repaired
    | Prepared
    | Working
    | Refused
)
