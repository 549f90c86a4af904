"""The verbs as functions, for programs that embed hvreplica: the command line calls these and nothing else.

Each takes paths, returns a typed result, tells its progress to a callback, and is safe to call twice. Errors
are HvReplicaError or OSError.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.clock import SYSTEM
from hvreplica.disk import open_disk
from hvreplica.errors import FieldOutOfRange, StateError, TrackingLost
from hvreplica.files import OS_FILES
from hvreplica.formats import messages
from hvreplica.formats.hrl import SECTOR_BYTES
from hvreplica.replication.primary import Primary
from hvreplica.replication.results import DiskChange, ReplicateResult
from hvreplica.replication.state import StateFolder, check_same, track
from hvreplica.replication.work import Link, Tally, Work
from hvreplica.transport import COMPRESSIONS, client_context

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.progress import Progress, ProgressCallback
    from hvreplica.replication.state import PrimaryState

    PathLike = str | os.PathLike[str]

CONNECTIONS_DEFAULT = 2
CONNECTIONS_MAX = 16


def _quiet(_: Progress) -> None:
    """Tell nobody."""


def replicate(  # noqa: PLR0913 - a verb with its options, all but two by keyword
    vm: str,
    disks: Sequence[PathLike],
    *,
    to: str,
    tls: PathLike,
    state: PathLike,
    compression: str = "auto",
    connections: int = CONNECTIONS_DEFAULT,
    resync: bool = False,
    takeover: bool = False,
    progress: ProgressCallback | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> ReplicateResult:
    """Bring the replica of `vm` at `to` to what its disks hold now: a whole copy first, then what changed.

    vm: 1 to 100 characters. disks: the files, always in the same order; they must not change during the call.
    to: HOST:PORT. tls: the folder with ca.pem, primary.pem and primary-key.pem. state: a folder of this VM's
    own, made where absent. compression: auto, zstd, lz4 or none. connections: 1 to 16 for data. resync: trust
    no record, compare with the replica by fingerprints. takeover: become the primary of a VM that another one
    owned (implies resync).

    On return the replica has applied the point durably. After any failure the next call goes on from there.
    Raises: HvReplicaError, OSError, ValueError for an argument out of its range.
    """
    _check_arguments(vm, disks, compression, connections)
    link = Link(to, client_context(Path(tls)), compression, connections)
    start_s = clock.monotonic_s()
    with contextlib.ExitStack() as stack:
        folder = StateFolder(files, Path(state).absolute(), clock=clock)
        stack.callback(folder.release)
        opened: list[Disk] = []
        for path in disks:
            disk = open_disk(files, Path(path).absolute(), clock=clock)
            stack.callback(disk.close)
            opened.append(disk)
        work = Work(
            folder=folder,
            state=_state(folder, vm, opened, clock),
            disks=opened,
            link=link,
            files=files,
            clock=clock,
            on_progress=progress or _quiet,
            tally=Tally("none", [0] * len(opened)),
        )
        stack.callback(work.close_tables)
        work.save()
        Primary(work, with_resync=resync, takeover=takeover).run()
        return _result(work, round(clock.monotonic_s() - start_s, 3))


def _state(folder: StateFolder, vm: str, disks: Sequence[Disk], clock: Clock) -> PrimaryState:
    """Return the folder's state, checked against the call; a new one where nothing was replicated yet."""
    for disk in disks:
        if disk.virtual_bytes == 0 or disk.virtual_bytes % SECTOR_BYTES:
            raise FieldOutOfRange(
                "a disk must have whole sectors",
                path=disk.path,
                field="length",
                expected=f"a multiple of {SECTOR_BYTES} bytes, not 0",
                actual=disk.virtual_bytes,
                hint="extend a raw file with `truncate -s %512 FILE`",
            )
    known = folder.load()
    if known is None:
        return track(vm, disks, clock=clock)
    try:
        check_same(known, vm, disks, folder.folder)
    except (StateError, TrackingLost):
        if known.phase != "new":
            raise
        # Nothing was sent: the call may name another VM or other disks. The replica may know the identity.
        fresh = track(vm, disks, clock=clock)
        fresh.relationship_id, fresh.generation = known.relationship_id, known.generation
        return fresh
    return known


def _result(work: Work, seconds: float) -> ReplicateResult:
    if work.state.last_point is None:
        raise StateError(
            "the replica has no recovery point yet", path=work.folder.folder, hint="call replicate again"
        )
    return ReplicateResult(
        vm=work.state.vm,
        kind=work.tally.kind,
        disks=[
            DiskChange(str(disk.path), disk.virtual_bytes, changed_bytes)
            for disk, changed_bytes in zip(work.disks, work.tally.changed_bytes, strict=True)
        ],
        wire_bytes=work.tally.wire_bytes,
        seconds=seconds,
        logs=work.tally.shipped,
        point=str(work.state.last_point),
    )


def _check_arguments(vm: str, disks: Sequence[PathLike], compression: str, connections: int) -> None:
    if not 1 <= len(vm) <= messages.VM_NAME_CHARS_MAX or not vm.isprintable():
        message = f"the VM's name must have 1 to {messages.VM_NAME_CHARS_MAX} printable characters"
        raise ValueError(message)
    if not 1 <= len(disks) <= messages.DISKS_MAX:
        message = f"a VM has 1 to {messages.DISKS_MAX} disks"
        raise ValueError(message)
    if len({Path(path).absolute() for path in disks}) != len(disks):
        message = "a disk is named twice"
        raise ValueError(message)
    if compression not in COMPRESSIONS:
        message = f"compression is one of {', '.join(COMPRESSIONS)}, not {compression!r}"
        raise ValueError(message)
    if not 1 <= connections <= CONNECTIONS_MAX:
        message = f"connections must be 1 to {CONNECTIONS_MAX}"
        raise ValueError(message)
