"""The verbs that ask how replication of a VM stands, or change it: cut, status, pause, resume.

Where a process owns the state folder it is asked; else the folder is used itself. Each is safe to call twice.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from hvreplica.capture.guest_agent import DEFAULT_FREEZE_LIMIT_S, checked_freeze_limit_s
from hvreplica.clock import SYSTEM
from hvreplica.errors import FormatError, StateError
from hvreplica.files import OS_FILES
from hvreplica.formats.journal import JournalState
from hvreplica.progress import quiet
from hvreplica.replication.bookkeeping import Bookkeeper, load_statistics
from hvreplica.replication.control import CutRequest, cut_result
from hvreplica.replication.live import cut_compared
from hvreplica.replication.opening import disk_paths, opened_disks
from hvreplica.replication.replica_folders import main_folder, replica_folder, replica_names
from hvreplica.replication.results import CutResult
from hvreplica.replication.shape import follow, indexes
from hvreplica.replication.state import SOCKET_NAME, StateFolder, load_state
from hvreplica.replication.statistics import Statistics
from hvreplica.replication.status import JournalStatus, NamedReplica, ReplicationStatus, make_status
from hvreplica.replication.stopped import require_running
from hvreplica.replication.work import Tally, Work
from hvreplica.tracking.journal import read_regions
from hvreplica.transport.local import Owner

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hvreplica.clock import Clock
    from hvreplica.files import FileSystem
    from hvreplica.replication.state import PrimaryState

    PathLike = str | os.PathLike[str]

_Result = TypeVar("_Result", CutResult, ReplicationStatus)


def cut(
    state: PathLike,
    *,
    freeze: PathLike | None = None,
    freeze_limit_s: float = DEFAULT_FREEZE_LIMIT_S,
    app_consistent: bool = False,
    on_instant: Callable[[], object] | None = None,
    files: FileSystem = OS_FILES,
    clock: Clock = SYSTEM,
) -> CutResult:
    """Cut the VM's disks at one instant; the logs wait in the state folder for the next replicate().

    freeze: the Unix socket of the guest's QEMU agent, whose file systems stand still for the instant, at most
    freeze_limit_s seconds; the point is then an app-consistent one. app_consistent: it is one without,
    because what runs in the guest was brought to rest by other means. on_instant: called once the guest goes
    on; the rest of the cut takes longer. Disks that no process captures are compared with what was
    replicated, and must not change meanwhile. Raises: HvReplicaError, OSError, ValueError.
    """
    checked_freeze_limit_s(freeze_limit_s)
    folder_path = _existing(files, state)
    owner = Owner.find(folder_path / SOCKET_NAME)

    def tell(_: object) -> None:
        if on_instant is not None:
            on_instant()

    if owner is not None:
        socket = None if freeze is None else str(Path(freeze).absolute())
        request = CutRequest(socket, freeze_limit_s, app_consistent)
        answer = owner.ask("cut", msgspec.to_builtins(request), on_progress=tell)
        return _converted(answer, CutResult)
    if freeze is not None:
        raise StateError(
            "no guest can be frozen: no process serves the VM's disks",
            path=folder_path,
            hint="serve them with `hvreplica capture`",
        )
    _known(load_state(files, folder_path), folder_path)  # before a lock is made in a folder of something else
    with contextlib.ExitStack() as stack:
        folder = StateFolder(files, folder_path, clock=clock)
        stack.callback(folder.release)
        known = _known(folder.load(), folder_path)
        require_running(known, folder_path)
        opened = stack.enter_context(opened_disks(files, disk_paths(folder, ()), clock=clock))
        ordered = follow(known, known.vm, opened, folder_path)
        work = Work(
            folder=folder,
            state=known,
            disks=ordered,
            link=None,
            files=files,
            clock=clock,
            on_progress=quiet,
            tally=Tally("none", [0] * len(opened)),
        )
        stack.callback(work.close_tables)
        result = cut_result(work, cut_compared(work, app_consistent=app_consistent))
    tell(result)
    return result


def status(state: PathLike, *, files: FileSystem = OS_FILES, clock: Clock = SYSTEM) -> ReplicationStatus:
    """Return how replication of the VM stands. Raises: StateError where the folder holds no state."""
    folder_path = _existing(files, state)
    owner = Owner.find(folder_path / SOCKET_NAME)
    if owner is not None:
        return _converted(owner.ask("status"), ReplicationStatus)
    known = _known(load_state(files, folder_path), folder_path)
    return _read_status(known, folder_path, files=files, clock=clock)


def pause(state: PathLike, *, files: FileSystem = OS_FILES, clock: Clock = SYSTEM) -> ReplicationStatus:
    """Begin no further cycle until resume(); tracking goes on. Raises: StateError, Locked."""
    return _changed("pause", state, files=files, clock=clock)


def resume(state: PathLike, *, files: FileSystem = OS_FILES, clock: Clock = SYSTEM) -> ReplicationStatus:
    """Go on with cycles, also where an error had stopped them. Raises: StateError, Locked."""
    return _changed("resume", state, files=files, clock=clock)


def reset_statistics(
    state: PathLike, *, files: FileSystem = OS_FILES, clock: Clock = SYSTEM
) -> ReplicationStatus:
    """Begin the statistics anew. Raises: StateError, Locked."""
    return _changed("reset-statistics", state, files=files, clock=clock)


def _changed(verb: str, state: PathLike, *, files: FileSystem, clock: Clock) -> ReplicationStatus:
    folder_path = _existing(files, state)
    owner = Owner.find(folder_path / SOCKET_NAME)
    if owner is not None:
        return _converted(owner.ask(verb), ReplicationStatus)
    _known(load_state(files, folder_path), folder_path)
    folder = StateFolder(files, folder_path, clock=clock)
    try:
        known = _known(folder.load(), folder_path)
        if verb == "reset-statistics":
            Bookkeeper(files, folder_path, clock=clock).reset()
        else:
            known.paused = verb == "pause"
            folder.save(known)
        return _read_status(known, folder_path, files=files, clock=clock)
    finally:
        folder.release()


def _read_status(
    known: PrimaryState, folder_path: Path, *, files: FileSystem, clock: Clock
) -> ReplicationStatus:
    main = main_folder(folder_path)
    journals = _read_journals(known, main, files=files)
    further = []
    for name in replica_names(files, folder_path) if main == folder_path else ():
        inner = replica_folder(folder_path, name)
        state = load_state(files, inner)
        if state is not None:
            further.append(NamedReplica(name, _read_status(state, inner, files=files, clock=clock)))
    record = load_statistics(files, folder_path) or Statistics(clock.now_s())
    found = make_status(known, record, now_s=clock.now_s(), journals=journals)
    return msgspec.structs.replace(found, replicas=further)


def _read_journals(known: PrimaryState, folder_path: Path, *, files: FileSystem) -> dict[int, JournalStatus]:
    """Return what a capture that ran last has left; where its journal is damaged that is the whole disk."""
    left = {}
    for index in indexes(known):
        path, virtual_bytes = folder_path / "journal" / f"{index}.ij", known.disks[index].virtual_bytes
        if not files.exists(path):
            continue
        try:
            header, regions = read_regions(files, path)
        except FormatError:
            left[index] = JournalStatus(virtual_bytes, clean=False)
        else:
            is_clean = header.state == JournalState.CLEAN
            left[index] = JournalStatus(int(regions[:, 1].sum()), clean=is_clean)
    return left


def _existing(files: FileSystem, state: PathLike) -> Path:
    """Return the folder, which these verbs do not make."""
    path = Path(state).absolute()
    if not files.exists(path):
        raise StateError(
            "there is no such state folder",
            path=path,
            hint="--state names the folder that `capture` or `replicate` made for the VM",
        )
    return path


def _known(state: PrimaryState | None, folder_path: Path) -> PrimaryState:
    if state is None:
        raise StateError(
            "the folder holds no state of a VM", path=folder_path, hint="capture or replicate the VM first"
        )
    return state


def _converted(answer: Any, kind: type[_Result]) -> _Result:
    return msgspec.convert(answer, type=kind)
