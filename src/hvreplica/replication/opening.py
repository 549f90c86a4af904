"""Open what replicate calls work on: the state folder, checked against the call, and the disks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from hvreplica.disk import open_disk
from hvreplica.errors import FieldOutOfRange, StateError
from hvreplica.formats import messages
from hvreplica.formats.hrl import SECTOR_BYTES
from hvreplica.replication.shape import removed_indexes, state_of_call
from hvreplica.replication.state import load_state
from hvreplica.replication.stopped import require_own_disks, require_running

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from hvreplica.clock import Clock
    from hvreplica.disk import Disk
    from hvreplica.files import FileSystem
    from hvreplica.replication.state import PrimaryState, StateFolder

    PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def opened_disks(files: FileSystem, paths: Sequence[Path], *, clock: Clock) -> Iterator[list[Disk]]:
    """Open disks to be read, in order, for the length of a with-block."""
    with contextlib.ExitStack() as stack:
        opened: list[Disk] = []
        for path in paths:
            disk = open_disk(files, path, clock=clock)
            stack.callback(disk.close)
            opened.append(disk)
        yield opened


def state_for(
    folder: StateFolder,
    vm: str,
    disks: Sequence[Disk],
    *,
    remove: Sequence[str | int] = (),
    prepare: bool = False,
    clock: Clock,
) -> tuple[PrimaryState, list[Disk]]:
    """Return the folder's state, brought in line with the call, and the disks by their indexes.

    remove: paths or indexes of disks that the VM does not have any more. prepare: the VM may be prepared for
    failover. Raises: StateError, TrackingLost,
    FieldOutOfRange.
    """
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
    return state_of_call(
        folder.load(), vm, disks, remove=remove, prepare=prepare, folder=folder.folder, clock=clock
    )


def disk_paths(
    folder: StateFolder,
    disks: Sequence[PathLike],
    *,
    remove: Sequence[str | int] = (),
    prepare: bool = False,
) -> list[Path]:
    """Return the disks of a call: those it names, else those that the folder knows.

    prepare: the VM may be prepared for failover. Raises: StateError, first of all for one that is stopped.
    """
    known = folder.load()
    if known is not None:
        require_running(known, folder.folder, prepare=prepare)
        require_own_disks(known, folder.folder)
    if disks:
        return [Path(path).absolute() for path in disks]
    if known is None:
        raise _unknown_disks(folder.folder)
    gone = removed_indexes(known, remove, folder.folder)
    return [Path(disk.path) for index, disk in enumerate(known.disks) if disk.is_here and index not in gone]


def check_start(files: FileSystem, folder: Path, disks: Sequence[PathLike], *, prepare: bool = False) -> None:
    """Refuse a call that cannot begin before it makes a state folder: `folder`, or disks, that are not there.

    prepare: the VM may be prepared for failover. Raises: InvalidTransition for one that is stopped here,
    whose disks may have left their places; StateError where neither call nor folder names disks;
    FileNotFoundError, OSError.
    """
    known = load_state(files, folder)
    if known is not None:
        require_running(known, folder, prepare=prepare)
        require_own_disks(known, folder)
    for path in disks:
        files.identity(Path(path).absolute())
    if not disks and known is None:
        raise _unknown_disks(folder)


def _unknown_disks(folder: Path) -> StateError:
    return StateError(
        "this state folder does not know the VM's disks yet",
        path=folder,
        hint="name each of them with --disk FILE; or is --state another folder?",
    )


def check_vm(vm: str, disks: Sequence[PathLike]) -> None:
    """Refuse what no VM can be. Raises: ValueError."""
    if not 1 <= len(vm) <= messages.VM_NAME_CHARS_MAX or not vm.isprintable():
        message = f"the VM's name must have 1 to {messages.VM_NAME_CHARS_MAX} printable characters"
        raise ValueError(message)
    if len(disks) > messages.DISKS_MAX:
        message = f"a VM has 1 to {messages.DISKS_MAX} disks"
        raise ValueError(message)
    if len({Path(path).absolute() for path in disks}) != len(disks):
        message = "a disk is named twice"
        raise ValueError(message)
