"""The verb that takes a planned failover back, before it has happened: the VM goes on at this site."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hvreplica.clock import SYSTEM
from hvreplica.errors import StateError
from hvreplica.files import OS_FILES
from hvreplica.progress import quiet
from hvreplica.replication.bookkeeping import Bookkeeper
from hvreplica.replication.control import CancelPrepareRequest
from hvreplica.replication.live_verbs import status
from hvreplica.replication.loop import CycleRunner
from hvreplica.replication.state import SOCKET_NAME, StateFolder
from hvreplica.replication.status import ReplicationStatus
from hvreplica.replication.work import CONNECTIONS_DEFAULT, Tally, Work, make_link
from hvreplica.transport.local import Owner

if TYPE_CHECKING:
    import os

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem

    PathLike = str | os.PathLike[str]


def cancel_prepare(
    state: PathLike,
    *,
    to: str | None = None,
    tls: PathLike | None = None,
    force: bool = False,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> ReplicationStatus:
    """Let a VM that was prepared for a planned failover run here again; nothing is done where it was not.

    to, tls: the replica, which is asked whether it was promoted; one that has never answered may be left out.
    force: do not ask it, for a replica that is gone: if it was promoted after all, both sides are active.
    Raises: Fenced where it was promoted; StateError where the VM has become a replica; HvReplicaError.
    """
    if (to is None) != (tls is None):
        message = "`to` and `tls` belong together"
        raise ValueError(message)
    link = None if to is None or tls is None else make_link(to, tls, "auto", CONNECTIONS_DEFAULT)
    folder_path = Path(state).absolute()
    owner = Owner.find(folder_path / SOCKET_NAME)
    if owner is not None:
        request = CancelPrepareRequest(to, None if tls is None else str(Path(tls).absolute()), force)
        answer = owner.ask("cancel-prepare", msgspec.to_builtins(request))
        return msgspec.convert(answer, type=ReplicationStatus)
    if not files.exists(folder_path):
        raise StateError("there is no such state folder", path=folder_path, hint="is it the one of --state?")
    with contextlib.ExitStack() as stack:
        folder = StateFolder(files, folder_path, clock=clock)
        stack.callback(folder.release)
        known = folder.load()
        if known is None:
            raise StateError("the folder holds no state of a VM", path=folder_path)
        work = Work(
            folder=folder,
            state=known,
            disks=[],
            link=link,
            files=files,
            clock=clock,
            on_progress=quiet,
            tally=Tally("none", []),
        )
        runner = CycleRunner(work, Bookkeeper(files, folder_path, clock=clock), link=link)
        stack.callback(runner.close)
        runner.cancel_prepare(force=force)
    return status(folder_path, files=files, clock=clock)
