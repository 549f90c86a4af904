"""The verb `replicate` as a function, for programs that embed hvreplica: the command line calls this.

It takes paths, returns a typed result, tells its progress to a callback, and is safe to call twice. Errors
are HvReplicaError or OSError.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import SYSTEM
from hvreplica.files import OS_FILES
from hvreplica.progress import Progress, quiet
from hvreplica.replication.bookkeeping import Bookkeeper
from hvreplica.replication.control import ReplicateRequest
from hvreplica.replication.loop import CycleRunner
from hvreplica.replication.opening import check_start, check_vm, disk_paths, opened_disks, state_for
from hvreplica.replication.results import ReplicateResult
from hvreplica.replication.state import SOCKET_NAME, StateFolder
from hvreplica.replication.work import CONNECTIONS_DEFAULT, Tally, Work, make_link
from hvreplica.transport.local import Owner

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.formats.messages import PointPolicy
    from hvreplica.progress import ProgressCallback

    PathLike = str | os.PathLike[str]


def replicate(  # noqa: PLR0913 - a verb with its options, all but two by keyword
    vm: str,
    disks: Sequence[PathLike] = (),
    *,
    to: str | None = None,
    tls: PathLike | None = None,
    state: PathLike,
    compression: str = "auto",
    connections: int = CONNECTIONS_DEFAULT,
    resync: bool = False,
    takeover: bool = False,
    remove_disks: Sequence[str | int] = (),
    points: PointPolicy | None = None,
    prepare: bool = False,
    force: bool = False,
    app_consistent: bool = False,
    progress: ProgressCallback | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> ReplicateResult:
    """Bring the replica of `vm` at `to` to what its disks hold now: a whole copy first, then what changed.

    vm: 1 to 100 characters. disks: all files of the VM; may be left out where the state folder knows them. A
    disk is known again by its path, a VHDX that was moved by its VirtualDiskId; one that was resized is
    resized at the replica, one that is new is added with the next index. They must not change during the
    call, unless `hvreplica capture` serves them: then its process runs the cycle, from what it tracked.
    remove_disks: paths or indexes of disks that the VM does not have any more. to: HOST:PORT. tls: the folder
    with ca.pem, primary.pem and primary-key.pem. Both may be left out where capture knows its replica. state:
    a folder of this VM's own, made where absent. compression: auto, zstd, lz4 or none. connections: 1 to 16
    for data. points: what the replica shall keep of the VM's points from now on; by default what it was told
    before, 24 hourly ones at first. resync: trust no record, compare with the replica by fingerprints.
    takeover: become the primary of a VM that another one owned (implies resync). prepare: for a planned
    failover: the VM is off, this is its last cut, and capture and replicate refuse to start until
    cancel_prepare(); force: although clients of capture use its disks, which are cut off. app_consistent:
    what runs in the guest was brought to rest, and the point of what changed is to be called so; a first copy
    is not.

    On return the replica has applied the point durably. After any failure the next call goes on from there.
    Raises: HvReplicaError, OSError, ValueError for an argument out of its range.
    """
    check_vm(vm, disks)
    if (to is None) != (tls is None):
        message = "`to` and `tls` belong together"
        raise ValueError(message)
    link = None if to is None or tls is None else make_link(to, tls, compression, connections)
    folder_path = Path(state).absolute()
    owner = Owner.find(folder_path / SOCKET_NAME)
    if owner is not None:
        request = ReplicateRequest(
            vm=vm,
            disks=[str(Path(path).absolute()) for path in disks],
            to=to,
            tls=None if tls is None else str(Path(tls).absolute()),
            compression=compression,
            connections=connections,
            resync=resync,
            takeover=takeover,
            remove_disks=[str(name) for name in remove_disks],
            points=points,
            prepare=prepare,
            force=force,
            app_consistent=app_consistent,
        )
        return _asked(owner, request, progress or quiet)
    if link is None:
        message = "say where the replica is, with `to` and `tls`: no process captures this VM"
        raise ValueError(message)
    check_start(files, folder_path, disks, prepare=prepare)
    with contextlib.ExitStack() as stack:
        folder = StateFolder(files, folder_path, clock=clock)
        stack.callback(folder.release)
        work = _work(vm, disks, folder, stack, remove=remove_disks, prepare=prepare, files=files, clock=clock)
        work.link, work.points = link, points
        runner = CycleRunner(work, Bookkeeper(files, folder_path, clock=clock), link=link)
        stack.callback(runner.close)
        return runner.run(
            with_resync=resync,
            takeover=takeover,
            prepare=prepare,
            app_consistent=app_consistent,
            on_progress=progress or quiet,
        )


def _work(
    vm: str,
    disks: Sequence[PathLike],
    folder: StateFolder,
    stack: contextlib.ExitStack,
    *,
    remove: Sequence[str | int],
    prepare: bool,
    files: FileSystem,
    clock: Clock,
) -> Work:
    """Return the state of a call, saved, and its disks, open until `stack` ends."""
    paths = disk_paths(folder, disks, remove=remove, prepare=prepare)
    opened = stack.enter_context(opened_disks(files, paths, clock=clock))
    known, ordered = state_for(folder, vm, opened, remove=remove, prepare=prepare, clock=clock)
    work = Work(
        folder=folder,
        state=known,
        disks=ordered,
        link=None,
        files=files,
        clock=clock,
        on_progress=quiet,
        tally=Tally("none", [0] * len(ordered)),
    )
    work.save()
    return work


def _asked(owner: Owner, request: ReplicateRequest, progress: ProgressCallback) -> ReplicateResult:
    """Have the process that owns the state folder run the cycle."""
    answer = owner.ask(
        "replicate",
        msgspec.to_builtins(request),
        on_progress=lambda report: progress(msgspec.convert(report, type=Progress)),
    )
    result: ReplicateResult = msgspec.convert(answer, type=ReplicateResult)
    return result
